"""`PlugTokenizer`: text to ids and back, for the original vocabulary and for our own.

The original vocabulary is BERT WordPiece (21128 entries, lower-casing, one CJK character a
piece). Our own is byte-pair encoding over Chinese words and phrases with a byte for whatever the
alphabet lacks, so that decoding gives the text back exactly: line breaks, case, emoji and all.
Both stand on the `tokenizers` library; `plug.pretraining.vocabulary` trains a new one.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from plug.errors import UsageError
from plug.files import write_json, write_text
from plug.shipped import SHIPPED_DIRECTORY, SHIPPED_MODEL
from plug.tokenizer_files import (
    SPECIAL_TOKENS,
    check_components,
    read_tokenizer_json,
    read_vocabulary,
)

BYTE_TOKENS = [f"<0x{byte:02X}>" for byte in range(256)]
_BYTES = {token: bytes([byte]) for byte, token in enumerate(BYTE_TOKENS)}

# How our own vocabulary cuts text before merging: a line break, a Latin word with the blank before
# it, a run of Chinese, a digit, an opening quote or bracket (with the colon or comma before it), a
# run of other punctuation (up to the end of a sentence), blanks. Sentences
# (`corpus.split_sentences`) begin at such cuts, so encoding a text whole or sentence by sentence
# gives the same ids.
SENTENCE_END = r"[。！？；…!?]+[”’」』）》】)\"']*"
_OPENING = "“‘《（「『【〈"
_OTHER = r"[^\s\p{L}\p{N}：，" + _OPENING + "]"
PRE_TOKENIZATION = (
    r"\n| ?[A-Za-z]+|\p{Han}+|\p{N}|[：，]?[" + _OPENING + r"]|[：，]"
    rf"|{_OTHER}*?{SENTENCE_END}|{_OTHER}+|[^\S\n]+|."
)


class PlugTokenizer:
    """Text <-> ids on the `tokenizers` library; special tokens typed by a user stay text.

    Any number of threads may use one object: no call changes what another one sees.

    Attributes are named as in `transformers`: `vocab_size`, `pad_token_id`, `unk_token_id`,
    `cls_token_id`, `sep_token_id`, `mask_token_id`.

    Args:
        backend: becomes this object's own. It neither pads nor cuts from then on, whatever its file
            says, and reads special tokens as text.
    """

    def __init__(self, backend: Tokenizer) -> None:
        self.backend = backend
        backend.no_truncation()
        backend.no_padding()
        # The library keeps this mode in the object, for all threads. So it is set once, and a
        # second object, made when it is first needed, reads special tokens as such.
        backend.encode_special_tokens = True
        self._reading_special: Tokenizer | None = None
        self.vocab_size = backend.get_vocab_size()
        self.is_original = isinstance(backend.model, models.WordPiece)
        self.pad_token_id = self._special_id("pad_token")
        self.unk_token_id = self._special_id("unk_token")
        self.cls_token_id = self._special_id("cls_token")
        self.sep_token_id = self._special_id("sep_token")
        self.mask_token_id = self._special_id("mask_token")
        self.special_ids = frozenset(self._special_id(name) for name in SPECIAL_TOKENS)
        # For readers of tokenizer.json other than this class, such as `AutoTokenizer`.
        backend.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]",
            pair="[CLS] $A [SEP] $B:1 [SEP]:1",
            special_tokens=[("[CLS]", self.cls_token_id), ("[SEP]", self.sep_token_id)],
        )

    def _special_id(self, name: str) -> int:
        token_id = self.backend.token_to_id(SPECIAL_TOKENS[name])
        if token_id is None:
            raise UsageError(f"词表里没有特殊符号 {SPECIAL_TOKENS[name]}，这不是 PLUG 的词表。")
        return token_id

    @classmethod
    def load(cls, directory: Path | str) -> PlugTokenizer:
        """Return the tokenizer of a directory: its `tokenizer.json`, or an original's `vocab.txt`.

        Args:
            directory: a path, or the name of the shipped model.

        Raises:
            UsageError: neither file is there, or the file is not such a tokenizer.
        """
        is_shipped = str(directory) == SHIPPED_MODEL
        directory = SHIPPED_DIRECTORY if is_shipped else Path(directory).expanduser()
        if (path := directory / "tokenizer.json").is_file():
            return cls.from_tokenizer_file(path)
        if (path := directory / "vocab.txt").is_file():
            return cls.from_vocabulary_file(path)
        if not directory.is_dir():
            raise UsageError(
                f"找不到分词器 {directory}：它不是目录，也不是随附模型的名字 {SHIPPED_MODEL}。"
            )
        raise UsageError(f"{directory} 里没有 tokenizer.json，也没有 vocab.txt。请给出模型的目录。")

    @classmethod
    def from_tokenizer_file(cls, path: Path) -> PlugTokenizer:
        """Build the tokenizer from the pieces and merges of a `tokenizer.json`.

        The rest of the file must say what PLUG's tokenizers do; it is not read any further, since
        the library takes much of what makes no sense, and other tokens without a word.

        Raises:
            UsageError: the file is damaged, or a tokenizer of another kind.
        """
        file = read_tokenizer_json(path)
        try:
            if file.merges is None:
                tokenizer = cls._from_word_pieces(file.vocabulary)
            else:
                tokenizer = cls.from_pieces(file.vocabulary, file.merges)
        except UsageError:
            raise
        except Exception as error:  # the library raises bare Exception
            raise UsageError(f"{path} 不是有效的分词器文件：{str(error)[:200]}") from None
        check_components(file, tokenizer.backend, path)
        return tokenizer

    @classmethod
    def from_vocabulary_file(cls, path: Path | str) -> PlugTokenizer:
        """BERT WordPiece over a `vocab.txt`: one piece a line, the line number from 0 is its id.

        Raises:
            UsageError: the file cannot be read, or a piece stands there twice.

        Source: `BertTokenizer` of `transformers`, whose ids the reference uses.
        """
        return cls._from_word_pieces(read_vocabulary(Path(path)))

    @classmethod
    def _from_word_pieces(cls, vocabulary: dict[str, int]) -> PlugTokenizer:
        backend = Tokenizer(models.WordPiece(vocabulary, unk_token=SPECIAL_TOKENS["unk_token"]))
        backend.normalizer = normalizers.BertNormalizer()
        backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        backend.decoder = decoders.WordPiece()
        return cls._with_special_tokens(backend)

    @classmethod
    def from_pieces(
        cls, vocabulary: dict[str, int], merges: list[tuple[str, str]]
    ) -> PlugTokenizer:
        """Our own kind, from the pieces and merges of `plug.pretraining.vocabulary.train`."""
        model = models.BPE(
            vocab=vocabulary,
            merges=merges,
            unk_token=SPECIAL_TOKENS["unk_token"],
            byte_fallback=True,
        )
        backend = Tokenizer(model)
        backend.pre_tokenizer = pre_tokenizers.Split(Regex(PRE_TOKENIZATION), "isolated")
        backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
        return cls._with_special_tokens(backend)

    @classmethod
    def _with_special_tokens(cls, backend: Tokenizer) -> PlugTokenizer:
        known = [
            token for token in SPECIAL_TOKENS.values() if backend.token_to_id(token) is not None
        ]
        backend.add_special_tokens(known)
        return cls(backend)

    def save(
        self,
        directory: Path | str,
        *,
        model_max_length: int | None = None,
        by_character: bool = False,
    ) -> None:
        """Write `tokenizer.json` and the `tokenizer_config.json` that `AutoTokenizer` reads.

        Args:
            directory: exists.
            model_max_length: tokens that the model reads, where `AutoTokenizer` truncates; None
                where there is no model yet.
            by_character: let `AutoTokenizer` cut a text into characters, for a model that labels
                them. This class is told by its callers (`encode_characters`, `encode_each`).
        """
        directory = Path(directory)
        content = self.backend.to_str(pretty=True)  # not `save`: a full disk must be an OSError
        write_text(directory / "tokenizer.json", content)
        config: dict[str, Any] = {
            "tokenizer_class": "PlugTokenizerFast",  # of `plug.hf`
            "clean_up_tokenization_spaces": False,
            "split_special_tokens": True,  # "[SEP]" typed by a user stays text here too
            "model_input_names": ["input_ids", "token_type_ids", "attention_mask"],
            **SPECIAL_TOKENS,
            "eos_token": SPECIAL_TOKENS["sep_token"],  # else old Trainers drop the model's end
        }
        if model_max_length is not None:
            config["model_max_length"] = model_max_length
        if by_character:
            config["by_character"] = True
        write_json(directory / "tokenizer_config.json", config)

    def encode(self, text: str, *, allow_special_tokens: bool = False) -> list[int]:
        """Ids of ``text``, without [CLS] and [SEP] around them.

        Args:
            text: any text.
            allow_special_tokens: read "[SEP]", "[MASK]" … spelled in the text as those tokens.

        Raises:
            UsageError: the text holds a lone surrogate, which is no character.
        """
        return self.encode_batch([text], allow_special_tokens=allow_special_tokens)[0]

    def encode_batch(
        self, texts: Sequence[str], *, allow_special_tokens: bool = False
    ) -> list[list[int]]:
        """`encode` of each text, on all cores."""
        for text in texts:
            _check_surrogates(text)
        backend = self._backend_reading_special() if allow_special_tokens else self.backend
        return [one.ids for one in backend.encode_batch(texts, add_special_tokens=False)]

    def _backend_reading_special(self) -> Tokenizer:
        if self._reading_special is None:  # two threads may make it at once, both alike
            backend = Tokenizer.from_str(self.backend.to_str())
            backend.encode_special_tokens = False
            self._reading_special = backend
        return self._reading_special

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids, and for each the characters [start, end) of ``text`` that it covers."""
        _check_surrogates(text)
        encoding = self.backend.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def encode_characters(self, text: str) -> list[int]:
        """One piece a character (bytes where the vocabulary lacks it): for labels by character."""
        _check_surrogates(text)  # here, so that the message counts from the start of the text
        return [index for ids in self.encode_batch(list(text)) for index in ids]

    def encode_each(self, tokens: Sequence[str]) -> list[list[int]]:
        """Ids of each token by itself; [UNK] for what gives none, such as a blank."""
        known = list(dict.fromkeys(tokens))  # a text has few characters that differ
        ids_of = {
            token: ids or [self.unk_token_id]
            for token, ids in zip(known, self.encode_batch(known), strict=True)
        }
        return [ids_of[token] for token in tokens]

    def decode(self, ids: Iterable[int], *, is_cut: bool = False) -> str:
        """Text of ``ids``; special tokens are left out, [UNK] excepted (shown as it is named).

        Args:
            ids: any; bytes among them that make no character come out as U+FFFD.
            is_cut: the text may go on behind the ids; a character that lacks bytes at the end is
                left out.
        """
        stream = self.decoder_stream()
        text = "".join([*(stream.push(int(index)) for index in ids), stream.flush()])
        return text if is_cut or not stream.lacks_bytes else f"{text}\ufffd"

    def decoder_stream(self) -> DecoderStream:
        """A decoder fed one id at a time, for text that is shown as it is written."""
        return DecoderStream(self)


class DecoderStream:
    """Gives out text as ids come in, never a part of a character."""

    def __init__(self, tokenizer: PlugTokenizer) -> None:
        self._tokenizer = tokenizer
        self._hidden = tokenizer.special_ids - {tokenizer.unk_token_id}
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._last = ""  # character given out; the original vocabulary's blanks depend on it

    def push(self, token_id: int) -> str:
        """The text that is now complete; "" while bytes are missing."""
        if token_id in self._hidden:
            return ""
        piece = self._tokenizer.backend.id_to_token(token_id) or ""
        if self._tokenizer.is_original:
            text = _after(self._last, piece)
            self._last = text[-1:] or self._last
            return text
        byte = _BYTES.get(piece)
        return self._utf8.decode(piece.encode() if byte is None else byte)

    @property
    def lacks_bytes(self) -> bool:
        """Whether the last character has not all of its bytes yet."""
        return self._utf8.getstate()[0] != b""

    def flush(self) -> str:
        """What is left at the end: nothing, since a character that lacks bytes is left out."""
        return ""


def replace_original_punctuation(text: str) -> str:
    """Rewrite what the original vocabulary lacks, as the reference does on the way in.

    Source: AliceMind's generation script; closing quotes stay (and become [UNK]).
    """
    return text.replace("‘", "'").replace("“", '"').replace("——", "--")


def original_text(ids: Sequence[int], tokenizer: PlugTokenizer) -> str:
    """Text as the reference prints it: runs of [UNK] are one, shown as “; `##` removed."""
    kept = [
        index
        for position, index in enumerate(ids)
        if not (position and index == tokenizer.unk_token_id == ids[position - 1])
    ]
    tokens = [tokenizer.backend.id_to_token(int(index)) or "" for index in kept]
    return "".join(tokens).replace(SPECIAL_TOKENS["unk_token"], "“").replace("##", "")


_LATIN = re.compile(r"[A-Za-z0-9]")


def _after(last: str, piece: str) -> str:
    """A word piece as text: a blank before it between neighbouring Latin words alone."""
    if piece.startswith("##"):
        return piece[2:]
    return " " + piece if _LATIN.match(last) and _LATIN.match(piece) else piece


def _check_surrogates(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UsageError(
            f"文本第 {error.start + 1} 个字符是孤立的代理码位 U+{ord(text[error.start]):04X}，"
            "不是字符。请检查文本的编码。"
        ) from None

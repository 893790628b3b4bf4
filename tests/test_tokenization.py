"""Both vocabularies, against the golden cases, transformers' BertTokenizer, and by property."""

from __future__ import annotations

import json
import re
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import BertTokenizer

from plug.checkpoints.directory import find_model_directory
from plug.errors import UsageError
from plug.pretraining.corpus import split_sentences
from plug.pretraining.vocabulary import ALWAYS_PRESENT, train
from plug.tokenization import (
    BYTE_TOKENS,
    SPECIAL_TOKENS,
    PlugTokenizer,
    original_text,
    replace_original_punctuation,
)

SHIPPED = find_model_directory()

# What text may hold, the awkward parts of Unicode more often than they come.
ANY_TEXT = st.text(
    st.one_of(
        st.characters(codec="utf-8"),
        st.sampled_from("今天天气很好我们山上有座庙“”‘’—…。，！？；：（）()《》「」\"'[]<>#"),
        st.sampled_from("\r\n\t\v\f\0 \u3000\u00a0\u2028\u2029\u0085\u200b\u200d\ufeff\ufffd"),
        st.sampled_from("😀👨‍👩‍👧🇨🇳é́áÅ𠮷㐂ﷺ한กaZ09１Ａ"),
    ),
    max_size=60,
)
SENTENCE_ENDS = st.text(
    st.sampled_from("天气好Ab 1\n。！？；…!?”’」』）》】)\"'（“：，—(-"), max_size=60
)
by_property = settings(
    max_examples=200,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@pytest.fixture(scope="module")
def shipped() -> PlugTokenizer:
    return PlugTokenizer.load(SHIPPED)


@pytest.fixture(scope="module")
def trained() -> PlugTokenizer:
    """A vocabulary of our kind trained here, on text with punctuation worth merging."""
    sentences = [
        "今天天气很好，我们去公园看花。",
        "他说：“你来了？”（笑）我说：“来了！”",
        "怎么办？(唱)如何？(唱)——就这样……",
        "The cat sat on the mat. 山上有座庙。\n庙里有个老和尚！！！）、",
    ]
    return train(sentences * 30, 420, 100)


@pytest.fixture(params=["shipped", "trained"])
def ours(request: pytest.FixtureRequest) -> PlugTokenizer:
    tokenizer: PlugTokenizer = request.getfixturevalue(request.param)
    return tokenizer


@pytest.fixture(scope="module")
def vocabulary_file(shared_data: Path) -> Path:
    return shared_data / "vocab" / "bert-chinese-vocab.txt"


@pytest.fixture(scope="module")
def original(vocabulary_file: Path) -> PlugTokenizer:
    return PlugTokenizer.from_vocabulary_file(vocabulary_file)


@pytest.fixture
def small_original(tmp_path: Path) -> PlugTokenizer:
    """WordPiece over a vocabulary of a few entries, in a file with Windows line ends."""
    pieces = [*SPECIAL_TOKENS.values(), *"春天来了[]", "hello", "world", "##s", "s", "##ep", "2"]
    (tmp_path / "vocab.txt").write_bytes("\r\n".join([*pieces, ""]).encode())
    return PlugTokenizer.load(tmp_path)


# --- the original vocabulary -----------------------------------------------------------------


@pytest.mark.shared
def test_ids_are_the_original_codes_on_every_golden_case(
    original: PlugTokenizer, golden: Path
) -> None:
    cases: list[dict[str, Any]] = json.loads(
        (golden / "tokenizer_cases.json").read_text(encoding="utf-8")
    )
    assert len(cases) >= 10
    for case in cases:
        text = case["text"]
        # its own codes read the special tokens spelled in a text as those tokens
        rewritten = replace_original_punctuation(text)
        assert rewritten == case["alicemind_text_after_replacement"]
        ids = original.encode(rewritten, allow_special_tokens=True)
        assert ids == case["alicemind_ids"], text
        assert [original.backend.id_to_token(i) for i in ids] == case["alicemind_tokens"]
        ids = original.encode(text, allow_special_tokens=True)
        assert [101, *ids, 102] == case["modelscope_ids"], text


@pytest.mark.shared
@given(text=ANY_TEXT)
@by_property
def test_original_ids_are_those_of_bert_tokenizer(
    text: str, original: PlugTokenizer, bert: BertTokenizer
) -> None:
    assert original.encode(text, allow_special_tokens=True) == bert.encode(
        text, add_special_tokens=False
    )


@pytest.fixture(scope="module")
def bert(vocabulary_file: Path) -> BertTokenizer:
    pieces = vocabulary_file.read_text(encoding="utf-8").rstrip("\n").split("\n")
    return BertTokenizer(vocab={piece: index for index, piece in enumerate(pieces)})


@pytest.mark.shared
def test_original_special_ids(original: PlugTokenizer) -> None:
    assert original.is_original
    assert original.vocab_size == 21128
    assert original.pad_token_id == 0
    assert original.unk_token_id == 100
    assert original.cls_token_id == 101
    assert original.sep_token_id == 102
    assert original.mask_token_id == 103


def test_original_punctuation_is_rewritten_on_the_way_in() -> None:
    assert replace_original_punctuation("“甲”‘乙’——丙—丁…") == "\"甲”'乙’--丙—丁…"


def test_original_text_on_the_way_out(small_original: PlugTokenizer) -> None:
    ids = [small_original.backend.token_to_id(t) for t in ("[UNK]", "[UNK]", "春", "[UNK]", "s")]
    ids += [small_original.backend.token_to_id("##ep")]
    assert original_text(ids, small_original) == "“春“sep"
    assert original_text([], small_original) == ""


def test_word_pieces_are_joined_with_blanks_between_words_alone(
    small_original: PlugTokenizer,
) -> None:
    def decoded(text: str) -> str:
        return small_original.decode(small_original.encode(text))

    assert decoded("春天 来了") == "春天来了"
    assert decoded("Hello Worlds") == "hello worlds"
    assert decoded("hello春天hello") == "hello春天hello"
    assert decoded("秋天") == "[UNK]天"


# --- both: special tokens, errors, files -----------------------------------------------------


def test_special_tokens_in_text_stay_text_unless_asked_for(
    small_original: PlugTokenizer, shipped: PlugTokenizer, trained: PlugTokenizer
) -> None:
    for tokenizer in (small_original, shipped, trained):
        for name, token in SPECIAL_TOKENS.items():
            special = getattr(tokenizer, f"{name}_id")
            text = f"春{token}天"
            if name != "unk_token" or not tokenizer.is_original:  # "[UNK]" spelled is unknown too
                assert special not in tokenizer.encode(text)
            assert tokenizer.encode(text, allow_special_tokens=True) == [
                *tokenizer.encode("春"),
                special,
                *tokenizer.encode("天"),
            ]
            # what was asked for once is not asked for the next time
            assert len(tokenizer.encode(text)) > 3
            assert len(tokenizer.encode_with_offsets(text)[0]) > 3


def test_special_tokens_are_left_out_of_decoded_text(ours: PlugTokenizer) -> None:
    ids = [ours.cls_token_id, *ours.encode("好"), ours.mask_token_id, ours.sep_token_id, 0]
    assert ours.decode(ids) == "好"
    assert ours.decode([ours.unk_token_id]) == "[UNK]"


@pytest.mark.parametrize("text", ["\ud800", "好\udfff", "今天" * 1000 + "\ud83d"])
def test_lone_surrogates_are_refused_with_their_place(text: str, ours: PlugTokenizer) -> None:
    for encode in (ours.encode, ours.encode_with_offsets, ours.encode_characters):
        with pytest.raises(UsageError, match=f"第 {len(text)} 个字符是孤立的代理码位 U\\+D"):
            encode(text)


def test_saved_and_loaded_again_it_is_the_same(
    small_original: PlugTokenizer, trained: PlugTokenizer, tmp_path: Path
) -> None:
    for number, tokenizer in enumerate((small_original, trained)):
        directory = tmp_path / str(number)
        directory.mkdir()
        tokenizer.save(directory)
        again = PlugTokenizer.load(directory)
        text = "春天来了，hello worlds [SEP] “😀”\n"
        assert again.encode(text) == tokenizer.encode(text)
        assert again.decode(again.encode(text)) == tokenizer.decode(tokenizer.encode(text))
        assert again.is_original == tokenizer.is_original
        assert again.special_ids == tokenizer.special_ids
        (directory / "again").mkdir()
        again.save(directory / "again")
        for name in ("tokenizer.json", "tokenizer_config.json"):
            assert (directory / "again" / name).read_bytes() == (directory / name).read_bytes()


def test_a_directory_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"没有 tokenizer.json，也没有 vocab.txt"):
        PlugTokenizer.load(tmp_path)
    (tmp_path / "vocab.txt").write_text("[PAD]\n春\n", encoding="utf-8")
    with pytest.raises(UsageError, match=r"没有特殊符号 \[UNK\]"):
        PlugTokenizer.load(tmp_path)
    (tmp_path / "vocab.txt").write_bytes(b"\xb4\xba\n")
    with pytest.raises(UsageError, match="读不了词表"):
        PlugTokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}", encoding="utf-8")
    with pytest.raises(UsageError, match="不是 PLUG 的分词器文件"):
        PlugTokenizer.load(tmp_path)


# --- our own vocabulary ----------------------------------------------------------------------


def test_our_special_tokens_come_first_then_the_bytes(ours: PlugTokenizer) -> None:
    assert not ours.is_original
    specials = [ours.pad_token_id, ours.unk_token_id, ours.cls_token_id]
    assert [*specials, ours.sep_token_id, ours.mask_token_id] == [0, 1, 2, 3, 4]
    assert [ours.backend.id_to_token(5 + byte) for byte in range(256)] == BYTE_TOKENS
    for character in ALWAYS_PRESENT:
        assert len(ours.encode(character)) == 1, character


@given(text=ANY_TEXT)
@by_property
def test_decoding_gives_the_text_back(
    text: str, shipped: PlugTokenizer, trained: PlugTokenizer
) -> None:
    for tokenizer in (shipped, trained):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.unk_token_id not in ids


@pytest.mark.parametrize(
    "text",
    [
        "“他说：‘走——’……”",
        "第一行\n\n第二行\r\n第三行\r\t缩进  两格 \n",
        "  前面的空格\u3000全角的",
        "\u2028\u2029\u0085\ufeff\u200b\0",
        "👨‍👩‍👧🇨🇳 𠮷野家 Hello,  World!  ",
        "[SEP]<0x41>##[UNK]<unk>",
    ],
)
def test_awkward_text_comes_back_exactly(text: str, ours: PlugTokenizer) -> None:
    assert ours.decode(ours.encode(text)) == text
    assert ours.decode(ours.encode_characters(text)) == text


@given(text=SENTENCE_ENDS)
@by_property
def test_whole_and_sentence_by_sentence_give_the_same_ids(
    text: str, shipped: PlugTokenizer, trained: PlugTokenizer
) -> None:
    for tokenizer in (shipped, trained):
        by_sentence = [i for ids in tokenizer.encode_batch(split_sentences(text)) for i in ids]
        assert tokenizer.encode(text) == by_sentence


def test_pieces_are_words_of_one_kind(trained: PlugTokenizer, shipped: PlugTokenizer) -> None:
    """No piece crosses from Chinese into Latin, digits, punctuation or a line break."""
    kinds = re.compile(r"\n| ?[A-Za-z]+|[\u2e80-\u9fff\uf900-\ufaff]+|[^\w\s]+|.", re.DOTALL)
    for tokenizer in (trained, shipped):
        pieces = [tokenizer.backend.id_to_token(i) for i in range(261, tokenizer.vocab_size)]
        merged = [piece for piece in pieces if len(piece) > 1]
        assert len(merged) > 20
        assert max(map(len, merged)) in (3, 4)
        assert [piece for piece in merged if not kinds.fullmatch(piece)] == []


@given(text=ANY_TEXT)
@by_property
def test_offsets_cover_the_text_in_order(text: str, shipped: PlugTokenizer) -> None:
    ids, offsets = shipped.encode_with_offsets(text)
    assert ids == shipped.encode(text)
    covered = list(dict.fromkeys(offsets))  # the bytes of one character have one span
    assert "".join(text[start:end] for start, end in covered) == text
    for index, (start, end) in zip(ids, offsets, strict=True):
        piece = shipped.backend.id_to_token(index)
        assert piece == text[start:end] or piece in BYTE_TOKENS


def test_original_offsets_point_at_the_text_before_lower_casing(
    small_original: PlugTokenizer,
) -> None:
    ids, offsets = small_original.encode_with_offsets("春 HelloS  天")
    tokens = [small_original.backend.id_to_token(index) for index in ids]
    assert tokens == ["春", "hello", "##s", "天"]
    assert offsets == [(0, 1), (2, 7), (7, 8), (10, 11)]


@given(text=ANY_TEXT)
@by_property
def test_encoding_by_character_is_a_piece_or_the_bytes_of_each(
    text: str, shipped: PlugTokenizer
) -> None:
    expected: list[int] = []
    for character in text:
        whole = shipped.backend.token_to_id(character)
        expected += [whole] if whole is not None else [5 + byte for byte in character.encode()]
    assert shipped.encode_characters(text) == expected


def test_no_text_has_no_ids(ours: PlugTokenizer, small_original: PlugTokenizer) -> None:
    for tokenizer in (ours, small_original):
        assert tokenizer.encode("") == tokenizer.encode_characters("") == []
        assert tokenizer.encode_with_offsets("") == ([], [])
        assert tokenizer.decode([]) == ""


def test_ids_outside_the_vocabulary_are_no_text(ours: PlugTokenizer) -> None:
    """The word table has more rows than the vocabulary has pieces."""
    assert ours.decode([*ours.encode("好"), ours.vocab_size, ours.vocab_size + 100]) == "好"


def test_threads_that_read_special_tokens_do_not_change_what_others_read(
    tiny_tokenizer: PlugTokenizer,
) -> None:
    text = "今天[SEP]天气"
    expected = {
        allowed: tiny_tokenizer.encode(text, allow_special_tokens=allowed)
        for allowed in (False, True)
    }
    assert expected[False] != expected[True]
    wrong: list[list[int]] = []

    def encode(allowed: bool) -> None:
        for _ in range(400):
            if (ids := tiny_tokenizer.encode(text, allow_special_tokens=allowed)) != expected[
                allowed
            ]:
                wrong.append(ids)

    threads = [threading.Thread(target=encode, args=(bool(n % 2),)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert wrong == []


def test_a_file_that_says_to_cut_and_pad_is_read_without(
    tiny_tokenizer: PlugTokenizer, tmp_path: Path
) -> None:
    tiny_tokenizer.save(tmp_path)
    backend = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    backend.enable_truncation(3)
    backend.enable_padding(length=8)
    backend.save(str(tmp_path / "tokenizer.json"))

    loaded = PlugTokenizer.load(tmp_path)

    for text in ("今", "我们去公园看花"):
        assert loaded.encode(text) == tiny_tokenizer.encode(text)
        assert loaded.encode(text, allow_special_tokens=True) == tiny_tokenizer.encode(text)


def test_the_shipped_model_s_name_is_a_tokenizer_too(tmp_path: Path) -> None:
    expected = PlugTokenizer.load(SHIPPED).encode("春天")
    assert PlugTokenizer.load("plug-mini-zh").encode("春天") == expected
    assert PlugTokenizer.load(Path("plug-mini-zh")).vocab_size > 0
    with pytest.raises(UsageError, match="随附模型的名字"):
        PlugTokenizer.load(tmp_path / "nothing")

"""`tokenizer.json` and `vocab.txt`, read by us and checked.

The `tokenizers` library takes much that makes no sense, and text is then cut into other tokens
without a word. So pieces and merges are read here, and the rest of a `tokenizer.json` must say what
PLUG's tokenizers do.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import Tokenizer

from plug.errors import UsageError
from plug.jsonfiles import read_bytes, read_json, shown

SPECIAL_TOKENS = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}
_ANYTHING = object()
_MODELS = {
    "BPE": {
        "type": "BPE",
        "dropout": None,
        "unk_token": SPECIAL_TOKENS["unk_token"],
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": True,
        "ignore_merges": False,
        "vocab": _ANYTHING,
        "merges": _ANYTHING,
    },
    "WordPiece": {
        "type": "WordPiece",
        "unk_token": SPECIAL_TOKENS["unk_token"],
        "continuing_subword_prefix": "##",
        "max_input_chars_per_word": 100,
        "vocab": _ANYTHING,
    },
}


class TokenizerFile(NamedTuple):
    """A `tokenizer.json`."""

    values: dict[str, Any]
    vocabulary: dict[str, int]
    merges: list[tuple[str, str]] | None  # None: word pieces


def read_tokenizer_json(path: Path) -> TokenizerFile:
    """Return the pieces and merges of a `tokenizer.json`.

    Raises:
        UsageError: the file is damaged, or a tokenizer of a kind that PLUG has not.
    """
    values = read_json(path, UsageError)
    model = values.get("model") if isinstance(values, dict) else None
    kind = model.get("type") if isinstance(model, dict) else None
    if not isinstance(model, dict) or not isinstance(kind, str) or kind not in _MODELS:
        raise UsageError(f"{path} 不是 PLUG 的分词器文件（model.type={shown(kind)}）。")
    vocabulary = _checked_vocabulary(model.get("vocab"), path)
    merges = None if kind == "WordPiece" else _checked_merges(model.get("merges"), vocabulary, path)
    return TokenizerFile(values, vocabulary, merges)


def check_components(file: TokenizerFile, backend: Tokenizer, path: Path) -> None:
    """Raise a `UsageError` unless a file says of each part what ``backend``, made from it, does."""
    expected: dict[str, Any] = {
        "model": _MODELS[file.values["model"]["type"]],
        "version": "1.0",
        "truncation": _ANYTHING,  # both are switched off
        "padding": _ANYTHING,
        "post_processor": _ANYTHING,  # ours takes its place
        "added_tokens": _ANYTHING,  # looked at by themselves
    }
    for name in ("normalizer", "pre_tokenizer", "decoder"):
        part = getattr(backend, name)
        expected[name] = None if part is None else json.loads(part.__getstate__())
    for name in expected | file.values:
        if not _says_the_same(file.values.get(name), expected.get(name)):
            raise UsageError(
                f"{path} 的 {shown(name)} 与 PLUG 的分词器不同，分出的词元会不一样。"
                "请用模型原来的 tokenizer.json。"
            )
    _check_added_tokens(file.values.get("added_tokens"), file.vocabulary, path)


def read_vocabulary(path: Path) -> dict[str, int]:
    """Return the pieces of a `vocab.txt` with their ids: one a line, counted from 0.

    Raises:
        UsageError: the file cannot be read, or a piece stands there twice.
    """
    try:
        text = read_bytes(path, UsageError).decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"读不了词表 {path}：{error}") from None
    pieces = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    while pieces and not pieces[-1]:
        pieces.pop()
    vocabulary: dict[str, int] = {}
    for index, piece in enumerate(pieces):
        if piece in vocabulary:
            raise UsageError(
                f"词表 {path} 第 {vocabulary[piece] + 1} 行和第 {index + 1} 行都是"
                f" {shown(piece)}，编号会错开。请重新取得词表。"
            )
        vocabulary[piece] = index
    return vocabulary


def _checked_vocabulary(vocabulary: Any, path: Path) -> dict[str, int]:
    """Return it if its ids are 0, 1, 2, …, each once."""
    if not isinstance(vocabulary, dict) or not vocabulary:
        raise UsageError(f"{path} 里没有词表（model.vocab）。请重新取得它。")
    ids = vocabulary.values()
    if set(map(type, ids)) != {int} or sorted(ids) != list(range(len(vocabulary))):
        raise UsageError(
            f"{path} 的词表有 {len(vocabulary)} 个词元，"
            f"编号却不是 0 到 {len(vocabulary) - 1} 各一次。"
            "请重新取得它。"
        )
    return vocabulary


def _checked_merges(merges: Any, vocabulary: dict[str, int], path: Path) -> list[tuple[str, str]]:
    """Return the pairs if their pieces, and what they become, are in the vocabulary."""
    pairs: list[tuple[str, str]] = []
    try:
        for pair in merges:  # files of tokenizers before 0.20 have "first second"
            first, second = pair.split(" ") if isinstance(pair, str) else pair
            if first not in vocabulary or second not in vocabulary:
                raise KeyError
            _ = vocabulary[first + second]
            pairs.append((first, second))
    except (TypeError, ValueError, KeyError):
        number = len(pairs) + 1
        raise UsageError(
            f"{path} 的合并规则（model.merges）第 {number} 条不对，或用了词表里没有的词元。"
            "请重新取得它。"
        ) from None
    return pairs


def _says_the_same(found: Any, expected: Any) -> bool:
    """Whether a file's value is the expected one.

    Keys may be missing, as in files of other versions of the library; a key that is not known must
    have a value that says nothing.
    """
    if expected is _ANYTHING:
        return True
    if isinstance(expected, dict) and isinstance(found, dict):
        return all(
            _says_the_same(value, expected[key]) if key in expected else value in (None, False)
            for key, value in found.items()
        )
    if isinstance(expected, list) and isinstance(found, list):
        return len(found) == len(expected) and all(map(_says_the_same, found, expected))
    return type(found) is type(expected) and bool(found == expected)


def _check_added_tokens(tokens: Any, vocabulary: dict[str, int], path: Path) -> None:
    """Raise a `UsageError` if there are other special tokens than PLUG's, or other ids."""
    special = list(SPECIAL_TOKENS.values())
    for token in tokens if isinstance(tokens, list) else []:
        content = token.get("content") if isinstance(token, dict) else None
        if content not in special or token.get("id") != vocabulary.get(content):
            raise UsageError(
                f"{path} 的特殊符号 {shown(content)} 不是 PLUG 的，或编号与词表不同。请重新取得它。"
            )

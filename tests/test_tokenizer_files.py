"""A `tokenizer.json` that says other than PLUG does is refused; other versions' files are not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from plug.errors import UsageError
from plug.tokenization import PlugTokenizer

Change = Callable[[dict[str, Any]], object]
TEXT = "今天天气很好，ABC 12 [SEP]\n山上有座庙！"


@pytest.fixture
def directory(tiny_tokenizer: PlugTokenizer, tmp_path: Path) -> Path:
    tiny_tokenizer.save(tmp_path)
    return tmp_path


def change(directory: Path, how: Change) -> None:
    path = directory / "tokenizer.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    how(values)
    path.write_text(json.dumps(values), encoding="utf-8")


@pytest.mark.parametrize(
    "how",
    [
        lambda v: v,
        lambda v: v.update(truncation={"max_length": 3, "strategy": "LongestFirst", "stride": 0}),
        lambda v: v.update(post_processor=None),
        lambda v: v["model"].pop("ignore_merges"),  # of an older library
        lambda v: v["model"].update(new_option=None),  # of a newer one
        lambda v: v["model"].update(merges=[" ".join(pair) for pair in v["model"]["merges"]]),
        lambda v: v["added_tokens"][4].update(special=False, lstrip=True),  # as transformers does
    ],
)
def test_what_changes_nothing_is_read(
    how: Change, directory: Path, tiny_tokenizer: PlugTokenizer
) -> None:
    change(directory, how)

    assert PlugTokenizer.load(directory).encode(TEXT) == tiny_tokenizer.encode(TEXT)


def swap_ids(values: dict[str, Any]) -> None:
    vocabulary = values["model"]["vocab"]
    vocabulary["今"] = vocabulary["天"]


@pytest.mark.parametrize(
    ("how", "says"),
    [
        (swap_ids, "各一次"),
        (lambda v: v["model"]["vocab"].update({"新": 10**9}), "各一次"),
        (lambda v: v["model"]["vocab"].update({"新": True}), "各一次"),
        (lambda v: v["model"].update(vocab=[]), "没有词表"),
        (lambda v: v["model"].update(vocab={"今": 0}), "合并规则"),
        (lambda v: v["model"].update(merges=[["今", "日"]]), "第 1 条"),
        (lambda v: v["model"].update(merges=None), "合并规则"),
        (lambda v: v["model"].update(type="Unigram"), "model.type='Unigram'"),
        (lambda v: v["model"].update(dropout=0.5), "'model'"),
        (lambda v: v["model"].update(byte_fallback=False), "'model'"),
        (lambda v: v["model"].update(end_of_word_suffix="</w>"), "'model'"),
        (lambda v: v["pre_tokenizer"].update(invert=True), "'pre_tokenizer'"),
        (lambda v: v.update(pre_tokenizer=None), "'pre_tokenizer'"),
        (lambda v: v.update(normalizer={"type": "Lowercase"}), "'normalizer'"),
        (lambda v: v.update(decoder=None), "'decoder'"),
        (lambda v: v.update(version="2.0"), "'version'"),
        (lambda v: v["added_tokens"][2].update(id=3), r"\[CLS\]"),
        (lambda v: v["added_tokens"].append({"id": 320, "content": "<s>"}), "<s>"),
    ],
)
def test_what_would_cut_text_otherwise_is_refused(how: Change, says: str, directory: Path) -> None:
    change(directory, how)

    with pytest.raises(UsageError, match=says) as caught:
        PlugTokenizer.load(directory)

    assert "tokenizer.json" in str(caught.value)


def test_a_piece_that_stands_twice_in_a_vocabulary_file_is_refused(tmp_path: Path) -> None:
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "春", "天", "春"]
    (tmp_path / "vocab.txt").write_text("\n".join(pieces), encoding="utf-8")

    with pytest.raises(UsageError, match="第 6 行和第 8 行都是 '春'"):
        PlugTokenizer.load(tmp_path)

"""Schemes of tags, each written by hand for the same entities."""

from __future__ import annotations

import pytest

from plug.errors import UsageError
from plug.finetuning.readers import LabellingExample
from plug.finetuning.tags import convert_to_bio
from plug.textfiles import Notes

# 3 tokens of X, O, 1 of Y, 2 of Y right behind it, O
BIO = "B-X I-X I-X O B-Y B-Y I-Y O"


def examples(*texts: str) -> list[LabellingExample]:
    return [
        LabellingExample(tokens=tuple(text.split()), tags=tuple(text.split()), place=f"第 {n} 行")
        for n, text in enumerate(texts, start=1)
    ]


def converted(*texts: str) -> tuple[list[str], str, list[str]]:
    notes = Notes()
    found = convert_to_bio(examples(*texts), notes)
    return [" ".join(one.tags or ()) for one in found], found[0].scheme, notes.lines()


@pytest.mark.parametrize(
    ("scheme", "text"),
    [
        ("BIO", BIO),
        ("BIO", "b-X i-X i-X o b-Y b-Y i-Y o"),
        ("BIO", "B_X I_X I_X O B_Y B_Y I_Y O"),
        ("BIO", "X-B X-I X-I O Y-B Y-B Y-I O"),
        ("BIO1", "I-X I-X I-X O I-Y B-Y I-Y O"),
        ("BIOES", "B-X I-X E-X O S-Y B-Y E-Y O"),
        ("BILOU", "B-X I-X L-X O U-Y B-Y L-Y O"),
        ("BMES", "B-X M-X E-X O S-Y B-Y E-Y O"),
    ],
)
def test_every_scheme_says_the_same(scheme: str, text: str) -> None:
    found, name, notes = converted(text)
    assert (found, name) == ([BIO.replace("X", "X")], scheme)
    assert notes == ([] if scheme == "BIO" else [f"{scheme} 标签换成了 BIO：1 处（如 第 1 行）。"])


def test_runs_of_plain_names_are_entities() -> None:
    found, name, _ = converted("PER PER O LOC PER", "n v v ADJ")
    assert (found, name) == (["B-PER I-PER O B-LOC B-PER", "B-n B-v I-v B-ADJ"], "IO")


def test_word_segmentation_has_one_type() -> None:
    found, name, _ = converted("B M E S B E")
    assert (found, name) == (["B-seg I-seg I-seg B-seg B-seg I-seg"], "BMES")


def test_tags_that_do_not_obey_are_read_as_conll_reads_them_and_counted() -> None:
    found, name, notes = converted("O I-X I-X B-X O", "B-X I-Y O")
    assert (found, name) == (["O B-X I-X B-X O", "B-X B-Y O"], "BIO")
    assert notes == ["标签不合规则（如 I- 前面没有 B-），每段仍读作一个实体：2 处（如 第 1 行）。"]
    found, _, notes = converted("B-X I-X O E-X", "S-X B-X")
    assert found == ["B-X I-X O B-X", "B-X B-X"]
    assert notes[0].startswith("标签不合规则（如 I- 前面没有 B-），每段仍读作一个实体：2 处")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("B-X I-X O LOC", "第 1 行的标签混用了几种写法：B-X、I-X 带前缀，LOC 不带"),
        ("B-X M-X L-X", "B、L、M 这些前缀，不是已知的标注方式"),
        ("B-X I", "有的带类型，有的不带：B-X、I"),
        ("1 2 0", "第 1 行的 tags 是编号（0、1、2）"),
        ("O 1", "tags 是编号"),
    ],
)
def test_tags_without_a_certain_reading_are_refused(text: str, complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint):
        converted(text)


def test_examples_without_tags_or_without_entities_stay() -> None:
    bare = LabellingExample(tokens=("一",))
    assert convert_to_bio([bare], Notes()) == [bare]
    assert converted("O O") == (["O O"], "BIO", [])


def test_an_empty_type_is_no_type() -> None:
    """`B-` was once taken for the name of an entity of its own."""
    assert converted("B- I- O B-")[0] == ["B-seg I-seg O B-seg"]

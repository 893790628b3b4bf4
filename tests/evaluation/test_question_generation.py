"""The original's way of scoring against the strict one."""

from __future__ import annotations

from pathlib import Path

import pytest

from plug.evaluation.question_generation import original_string, score_generation
from plug.tokenization import PlugTokenizer


@pytest.fixture
def wordpiece(tmp_path: Path) -> PlugTokenizer:
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    pieces = [*special, "what", "##ever", *"今天气很好吗？abc"]
    (tmp_path / "vocab.txt").write_text("\n".join(pieces), encoding="utf-8")
    return PlugTokenizer.from_vocabulary_file(tmp_path / "vocab.txt")


def test_the_original_cuts_at_sep_and_deletes_what_it_does_not_know(
    wordpiece: PlugTokenizer,
) -> None:
    ids = wordpiece.encode("今[CLS]天霾whatever[SEP]好", allow_special_tokens=True)
    assert original_string(ids, wordpiece) == "今天whatever"


def test_deleting_flatters_and_the_strict_score_does_not(wordpiece: PlugTokenizer) -> None:
    reference = "今天霾气很好吗？"  # 霾 is not in the vocabulary
    scores = score_generation([reference], [wordpiece.encode(reference)], wordpiece)
    assert scores["bleu4"] == 1.0
    assert scores["exact_match"] == 0.0
    # 7 of 8 characters, 5 of 7, 3 of 6, 2 of 5 n-grams stand in the reference; as long as it.
    assert scores["bleu4_strict"] == pytest.approx((7 / 8 * 5 / 7 * 3 / 6 * 2 / 5) ** 0.25)
    assert scores["rouge_l"] == pytest.approx(7 / 8)


def test_the_strict_reference_is_cased(wordpiece: PlugTokenizer) -> None:
    scores = score_generation(["WHATEVER今天？"], [wordpiece.encode("whatever今天？")], wordpiece)
    assert scores["bleu4"] == 1.0
    assert scores["rouge_l"] == pytest.approx(3 / 11)


def test_our_own_vocabulary_loses_nothing(tiny_tokenizer: PlugTokenizer) -> None:
    reference = "今天 Good 霾？"
    scores = score_generation([reference], [tiny_tokenizer.encode(reference)], tiny_tokenizer)
    assert scores["bleu4"] == scores["bleu4_strict"] == scores["exact_match"] == 1.0
    assert scores["length"] == len("今天Good霾？")

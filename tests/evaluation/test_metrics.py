"""Each metric against an independent source: sacrebleu, scikit-learn, scipy, or brute force."""

from __future__ import annotations

import difflib
import itertools
import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plug.evaluation.metrics import (
    answer_exact_match,
    answer_f1,
    characters,
    confusion_matrix,
    corpus_bleu,
    distinct,
    entity_scores,
    entity_spans,
    longest_common_run,
    longest_common_subsequence,
    rouge_l,
    wilson_interval,
)

sacrebleu = pytest.importorskip("sacrebleu")
metrics = pytest.importorskip("sklearn.metrics")
stats = pytest.importorskip("scipy.stats")

words = st.text("甲乙丙", max_size=9)


@given(st.lists(st.tuples(words, st.lists(words, min_size=2, max_size=2)), min_size=1, max_size=6))
def test_bleu_is_sacrebleu_s(pairs: list[tuple[str, list[str]]]) -> None:
    hypotheses, references = zip(*pairs, strict=True)
    ours = corpus_bleu(references, hypotheses)
    theirs = sacrebleu.corpus_bleu(
        [" ".join(text) for text in hypotheses],
        [[" ".join(text) for text in column] for column in zip(*references, strict=True)],
        tokenize="none",
        smooth_method="none",
        force=True,
    )
    assert 100 * ours == pytest.approx(theirs.score, abs=1e-9)


def test_bleu_by_hand() -> None:
    # 5 of 5 characters, 4 of 4, 3 of 3, 2 of 2 n-grams are right; 5 characters against 6.
    assert corpus_bleu([["甲乙丙丁戊己"]], ["甲乙丙丁戊"]) == pytest.approx(math.exp(1 - 6 / 5))
    # 4/5 characters, 3/4, 2/3, 1/2: one wrong at the end, equal lengths.
    expected = (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25
    assert corpus_bleu([["甲乙丙丁戊"]], ["甲乙丙丁己"]) == pytest.approx(expected)
    assert corpus_bleu([["甲乙丙"]], ["甲乙丙"]) == 0.0  # no n-gram of four


@given(words, words)
def test_longest_common_subsequence_is_that_of_brute_force(first: str, second: str) -> None:
    def subsequences(text: str) -> set[tuple[str, ...]]:
        sizes = range(len(text) + 1)
        return {each for size in sizes for each in itertools.combinations(text, size)}

    common = subsequences(first) & subsequences(second)
    assert longest_common_subsequence(first, second) == max(map(len, common))


def test_rouge_l_by_hand() -> None:
    assert rouge_l("甲乙丙丁", "甲丙己") == pytest.approx(2 * (2 / 3) * (2 / 4) / (2 / 3 + 2 / 4))
    assert rouge_l("甲", "") == 0.0


@given(words, words)
def test_longest_common_run_is_difflib_s(first: str, second: str) -> None:
    matcher = difflib.SequenceMatcher(None, first, second, autojunk=False)
    match = matcher.find_longest_match(0, len(first), 0, len(second))
    assert longest_common_run(first, second) == match.size


@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_the_interval_is_scipy_s(counts: tuple[int, int]) -> None:
    theirs = stats.binomtest(*counts).proportion_ci(method="wilson")
    assert wilson_interval(*counts) == pytest.approx((theirs.low, theirs.high), abs=1e-9)


@given(st.lists(st.tuples(st.sampled_from("甲乙丙"), st.sampled_from("甲乙丙")), min_size=1))
def test_the_confusion_matrix_is_scikit_learn_s(pairs: list[tuple[str, str]]) -> None:
    answers, predictions = zip(*pairs, strict=True)
    theirs = metrics.confusion_matrix(answers, predictions, labels=list("甲乙丙"))
    assert confusion_matrix(answers, predictions, "甲乙丙") == theirs.tolist()


def test_distinct_by_hand() -> None:
    assert distinct(["甲乙甲乙", "甲乙"], 1) == 2 / 6
    assert distinct(["甲乙甲乙", "甲乙"], 2) == 2 / 4  # 甲乙 three times, 乙甲 once
    assert distinct([""], 1) == 0.0


def test_characters_are_those_not_blank() -> None:
    assert characters(" ab　好\n") == ["a", "b", "好"]


@pytest.mark.parametrize(
    ("answers", "prediction", "exact", "f1"),
    [
        (["光荣和ω-force"], "光荣和ω-FORCE", 1.0, 1.0),
        (["《红楼梦》"], "红楼梦", 1.0, 1.0),
        (["甲乙丙丁"], "乙丙", 0.0, 2 * 2 / (4 + 2)),
        (["甲", "乙丙"], "乙丙", 1.0, 1.0),
        (["1963年"], "1963", 0.0, 2 * 1 / (2 + 1)),
        (["甲"], "乙", 0.0, 0.0),
        (["甲"], "", 0.0, 0.0),
    ],
)
def test_answers_are_scored_as_by_cmrc2018(
    answers: list[str], prediction: str, exact: float, f1: float
) -> None:
    assert answer_exact_match(answers, prediction) == exact
    assert answer_f1(answers, prediction) == pytest.approx(f1)


# --- entities --------------------------------------------------------------------------------

ANSWERS = [["B-X", "I-X", "O", "B-Y"], ["O", "B-X", "B-X", "I-X"], ["B-Z", "O"]]
PREDICTIONS = [["B-X", "I-X", "O", "B-X"], ["O", "B-X", "I-X", "I-X"], ["O", "O"]]


def test_entities_begin_with_b_and_go_on_with_i_of_their_type() -> None:
    tags = ["B-X", "I-X", "B-X", "I-Y", "O", "I-X", "B-Y"]
    assert entity_spans(tags) == [("X", 0, 2), ("X", 2, 3), ("Y", 6, 7)]
    assert entity_spans([]) == []


def test_entity_scores_by_hand() -> None:
    """Right: the first X alone. Wanted: X 3, Y 1, Z 1. Found: X 3."""
    overall, by_kind = entity_scores(ANSWERS, PREDICTIONS)
    assert overall == (1 / 3, 1 / 5, 2 / 8, 5)
    assert by_kind == {
        "X": (1 / 3, 1 / 3, 1 / 3, 3),
        "Y": (0.0, 0.0, 0.0, 1),
        "Z": (0.0, 0.0, 0.0, 1),
    }
    assert entity_scores([["O"]], [["O"]]) == ((0.0, 0.0, 0.0, 0), {})


def test_entity_scores_are_those_of_seqeval() -> None:
    seqeval = pytest.importorskip("seqeval.metrics")
    from seqeval.scheme import IOB2

    rng = random.Random(0)
    tags = ["O", "B-X", "I-X", "B-Y", "I-Y"]
    answers, predictions = (
        [[rng.choice(tags) for _ in range(length)] for length in range(1, 60)] for _ in range(2)
    )
    report = seqeval.classification_report(
        answers, predictions, output_dict=True, mode="strict", scheme=IOB2, zero_division=0
    )
    overall, by_kind = entity_scores(answers, predictions)
    for name, score in (("micro avg", overall), *by_kind.items()):
        assert list(report[name].values()) == pytest.approx(list(score))

"""StructBERT's objectives: rates, places and labels, on ids that tell where they are from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from plug.errors import UsageError
from plug.pretraining.batches import Batch, BatchPlan, StructBertBatches
from plug.pretraining.masking import IGNORE_INDEX, Masking
from plug.pretraining.structbert import (
    ANOTHER_DOCUMENT,
    NEXT,
    PREVIOUS,
    pair_spans,
    shuffle_trigrams,
    structbert_example,
)
from plug.pretraining.tokens import Domain

ChiSquare = Callable[[list[int], list[float]], float]
MASK, FIRST_RANDOM, LAST_RANDOM = 4, 1000, 1100
MASKING = Masking(mask_token_id=MASK, first_random_id=FIRST_RANDOM, last_random_id=LAST_RANDOM)


# --- word structure --------------------------------------------------------------------------


def test_5_percent_of_the_trigrams_are_shuffled_where_allowed(chi_square: ChiSquare) -> None:
    rng = np.random.default_rng(2)
    length, rounds = 202, 300
    ids = np.arange(length)
    allowed = np.ones(length, bool)
    allowed[[0, 77, -1]] = False
    allowed[rng.permutation(np.arange(1, length - 1))[:30]] = False  # as 15% masked leave it
    orders: dict[tuple[int, ...], int] = {}
    for _ in range(rounds):
        shuffled, positions = shuffle_trigrams(ids, allowed, rng)
        assert len(positions) == 3 * 10  # 5% of 200 trigrams
        assert allowed[positions].all()
        assert len(set(positions.tolist())) == len(positions)  # none overlap
        outside = np.setdiff1d(ids, positions)
        assert (shuffled[outside] == outside).all()
        for trigram in positions.reshape(-1, 3):
            start = int(trigram[0])
            assert trigram.tolist() == [start, start + 1, start + 2]
            assert sorted(shuffled[trigram].tolist()) == trigram.tolist()
            order = tuple((shuffled[trigram] - start).tolist())
            orders[order] = orders.get(order, 0) + 1
    assert chi_square(list(orders.values()), [1 / 6] * 6) < 20.5  # 99.9% of 5


def test_no_room_for_a_trigram() -> None:
    ids = np.arange(60)
    allowed = np.tile([True, True, False], 20)
    shuffled, positions = shuffle_trigrams(ids, allowed, np.random.default_rng(0))
    assert (shuffled == ids).all()
    assert len(positions) == 0
    for short in range(4):
        assert len(shuffle_trigrams(ids[:short], allowed[:short], np.random.default_rng(0))[1]) == 0


# --- an example ------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_an_example_can_be_undone_by_its_labels(seed: int) -> None:
    rng = np.random.default_rng(seed)
    first, second = np.arange(100, 100 + 60), np.arange(300, 300 + 45)
    example = structbert_example(
        first,
        second,
        NEXT,
        cls_token_id=2,
        sep_token_id=3,
        masking=MASKING,
        shuffle_rate=0.05,
        rng=rng,
    )
    whole = np.concatenate(([2], first, [3], second, [3]))
    assert len(example.input_ids) == len(whole) == 108
    assert example.token_type_ids.tolist() == [0] * 62 + [1] * 46
    assert example.sentence_label == NEXT
    assert (example.mlm_labels == whole[example.mlm_positions]).all()
    assert len(example.mlm_positions) == 16  # 15% of 105
    used = example.word_labels != IGNORE_INDEX
    words = example.word_positions[used]
    assert len(example.word_labels) == 3 * 5  # 5% of 106 trigrams
    assert (example.word_labels[used] == whole[words]).all()
    assert not set(words.tolist()) & set(example.mlm_positions.tolist())
    special = {0, 61, 107}
    assert not special & {*words.tolist(), *example.mlm_positions.tolist()}
    restored = example.input_ids.copy()
    restored[example.mlm_positions] = example.mlm_labels
    restored[words] = example.word_labels[used]
    assert (restored == whole).all()


def test_objectives_that_are_switched_off_leave_no_labels() -> None:
    example = structbert_example(
        np.arange(100, 130),
        np.arange(200, 230),
        None,
        cls_token_id=2,
        sep_token_id=3,
        masking=MASKING,
        shuffle_rate=0,
        rng=np.random.default_rng(0),
    )
    assert example.sentence_label.shape == example.word_labels.shape == (0,)


# --- sentence structure ----------------------------------------------------------------------


def test_the_next_segment_follows_at_a_sentence_boundary() -> None:
    rng = np.random.default_rng(0)
    boundaries = np.asarray([100, 110, 125, 141, 160, 188])
    for _ in range(200):
        first, second = pair_spans(boundaries, 100, 200, (15, 20), NEXT, rng)
        assert second == first + 15
        assert second in boundaries
        assert first >= 100
        assert second + 20 <= 200


def test_the_previous_segment_comes_before_and_does_not_overlap() -> None:
    rng = np.random.default_rng(0)
    boundaries = np.asarray([100, 110, 125, 141, 160, 188])
    for _ in range(200):
        first, second = pair_spans(boundaries, 100, 200, (15, 20), PREVIOUS, rng)
        assert second in boundaries
        assert first + 15 in [*boundaries, 200]
        assert second >= 100
        assert second + 20 <= first  # at most a sentence lies between
        assert not any(second + 20 <= b < first + 15 and b >= second + 35 for b in boundaries)
        assert first + 15 <= 200


@pytest.mark.parametrize("label", [NEXT, PREVIOUS])
def test_a_document_that_holds_both_segments_exactly(label: int) -> None:
    spans = pair_spans(np.asarray([50]), 50, 80, (10, 20), label, np.random.default_rng(0))
    assert spans == ((50, 60) if label == NEXT else (70, 50))


@pytest.fixture(scope="module")
def plan(unique_domains: list[Domain], unique_tokenizer: Any) -> Callable[..., BatchPlan]:
    def make(**changes: Any) -> BatchPlan:
        defaults: dict[str, Any] = {
            "domains": unique_domains,
            "tokenizer": unique_tokenizer,
            "shapes": [((64,), 1.0)],
            "batch_tokens": 64 * 100,
            "domain_exponent": 1.0,
            "domain_factors": {},
            "mlm_rate": 0.15,
            "seed": 3,
        }
        return BatchPlan(**(defaults | changes))

    return make


@pytest.fixture(scope="module")
def batches(plan: Callable[..., BatchPlan]) -> list[Batch]:
    """3000 sequences of 64."""
    made = StructBertBatches(plan(), shuffle_rate=0.05, sentence_objective=True)
    return [made[step] for step in range(30)]


@pytest.fixture(scope="module")
def segments(batches: list[Batch]) -> list[tuple[int, npt.NDArray[Any], npt.NDArray[Any]]]:
    """(label, first, second) of each sequence, corruption undone."""
    found = []
    for batch in batches:
        for row in range(len(batch["input_ids"])):
            one = {name: tensor[row].numpy() for name, tensor in batch.items()}
            ids = one["input_ids"].copy()
            ids[one["mlm_positions"]] = one["mlm_labels"]
            used = one["word_labels"] != IGNORE_INDEX
            ids[one["word_positions"][used]] = one["word_labels"][used]
            middle = int(np.flatnonzero(ids == 3)[0])
            found.append((int(one["sentence_label"]), ids[1:middle], ids[middle + 1 : -1]))
    return found


def place(domains: list[Domain], token_id: int) -> tuple[str, int, int]:
    """(domain, document, position) of an id that occurs once."""
    for domain in domains:
        position = token_id - int(domain.tokens[0])
        if 0 <= position < len(domain.tokens):
            number = int(np.searchsorted(domain.documents, position, side="right")) - 1
            return domain.name, number, position
    raise AssertionError(f"{token_id} is not in the corpus")


def test_segments_are_runs_of_one_document_whose_order_is_as_labelled(
    segments: list[tuple[int, Any, Any]], unique_domains: list[Domain]
) -> None:
    for label, first, second in segments:
        assert len(first) + len(second) == 61
        assert (np.diff(first) == 1).all()
        assert (np.diff(second) == 1).all()
        begin, end = place(unique_domains, first[0]), place(unique_domains, first[-1])
        begin2, end2 = place(unique_domains, second[0]), place(unique_domains, second[-1])
        assert begin[:2] == end[:2]
        assert begin2[:2] == end2[:2]
        if label == ANOTHER_DOCUMENT:
            assert begin[:2] != begin2[:2]
        else:
            assert begin[:2] == begin2[:2]
            if label == NEXT:
                assert begin2[2] == end[2] + 1
            else:
                assert 0 < begin[2] - end2[2] <= 12  # less than the longest sentence between


def test_labels_are_a_third_each(
    chi_square: ChiSquare, segments: list[tuple[int, Any, Any]]
) -> None:
    counts = np.bincount([label for label, _, _ in segments], minlength=3)
    assert chi_square(list(counts), [1 / 3] * 3) < 13.8


def test_how_segments_are_cut_tells_nothing_of_their_label(
    segments: list[tuple[int, Any, Any]], unique_domains: list[Domain]
) -> None:
    """Lengths, and which of the four ends fall on a sentence boundary, by label."""
    boundaries = {
        int(domain.tokens[position]) if position < len(domain.tokens) else -1
        for domain in unique_domains
        for position in [*domain.sentences, *domain.documents]
    }
    last_ids = {int(domain.tokens[-1]) + 1 for domain in unique_domains}
    seen: dict[int, list[list[float]]] = {0: [], 1: [], 2: []}
    for label, first, second in segments:
        ends = [first[0], first[-1] + 1, second[0], second[-1] + 1]
        at_boundary = [float(end in boundaries or end in last_ids) for end in ends]
        seen[label].append([float(len(first)), *at_boundary])
    means = np.asarray([np.mean(seen[label], axis=0) for label in range(3)])
    errors = np.asarray([np.std(seen[label], axis=0) / len(seen[label]) ** 0.5 for label in seen])
    spread = np.ptp(means, axis=0)
    assert (spread < 4.5 * errors.max(axis=0) + 0.01).all(), means
    assert means[:, 2].min() > 0.97  # the inner ends are boundaries, whatever the label
    assert means[:, 3].min() > 0.97
    assert means[:, 1].max() < 0.35  # the outer ones fall anywhere
    assert means[:, 4].max() < 0.35


def test_lengths_of_first_segments_spread_alike(segments: list[tuple[int, Any, Any]]) -> None:
    """Two-sample Kolmogorov-Smirnov distance of each label's lengths from all others'."""
    lengths = np.asarray([len(first) for _, first, _ in segments])
    labels = np.asarray([label for label, _, _ in segments])
    grid = np.arange(lengths.min(), lengths.max() + 1)
    assert (grid.min(), grid.max()) == (15, 46)  # a quarter to three quarters of 61
    for label in range(3):
        one, rest = lengths[labels == label], lengths[labels != label]
        distance = max(abs((one <= x).mean() - (rest <= x).mean()) for x in grid)
        assert distance < 1.95 * (1 / len(one) + 1 / len(rest)) ** 0.5  # 99.9%


def test_without_the_sentence_objective_the_second_segment_is_the_next(
    plan: Callable[..., BatchPlan],
) -> None:
    batch = StructBertBatches(plan(), shuffle_rate=0, sentence_objective=False)[0]
    assert batch["sentence_label"].numel() == batch["word_labels"].numel() == 0
    for ids, positions, labels in zip(
        batch["input_ids"], batch["mlm_positions"], batch["mlm_labels"], strict=True
    ):
        restored = ids.clone()
        restored[positions] = labels
        assert (restored[restored > 4].diff() == 1).all()


def test_one_document_alone_is_never_another_document(
    plan: Callable[..., BatchPlan], unique_domains: list[Domain]
) -> None:
    domain = unique_domains[0]
    alone = Domain("a", domain.tokens, np.asarray([0, len(domain.tokens)]), domain.sentences)
    with pytest.raises(UsageError, match="只有一篇"):
        StructBertBatches(plan(domains=[alone]), shuffle_rate=0, sentence_objective=True)
    StructBertBatches(plan(domains=[alone]), shuffle_rate=0, sentence_objective=False)[0]

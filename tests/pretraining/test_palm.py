"""PALM's objective: nothing of the target is read, everything of it is written."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from plug.pretraining.batches import Batch, BatchPlan, PalmBatches
from plug.pretraining.masking import IGNORE_INDEX, Masking
from plug.pretraining.palm import PalmExample, palm_example, passage_start
from plug.pretraining.tokens import Domain

CLS, SEP, PAD, MASK = 2, 3, 0, 4
MASKING = Masking(mask_token_id=MASK, first_random_id=5000, last_random_id=5100)


def example(target: list[int], *, ends: bool, masking: Masking | None = None) -> PalmExample:
    return palm_example(
        np.arange(100, 140),
        np.asarray(target, dtype=np.int64),
        target_length=6,
        ends=ends,
        cls_token_id=CLS,
        sep_token_id=SEP,
        pad_token_id=PAD,
        masking=masking,
        rng=np.random.default_rng(0),
    )


@pytest.mark.parametrize(
    ("target", "ends", "decoder_input_ids", "labels"),
    [
        ([7, 8, 9, 10, 11, 12], False, [CLS, 7, 8, 9, 10, 11], [7, 8, 9, 10, 11, 12]),
        ([7, 8, 9], True, [CLS, 7, 8, 9, PAD, PAD], [7, 8, 9, SEP, -100, -100]),
        ([7, 8, 9, 10, 11], True, [CLS, 7, 8, 9, 10, 11], [7, 8, 9, 10, 11, SEP]),
        # the end of the document is the end of the target: no room for [SEP]
        ([7, 8, 9, 10, 11, 12], True, [CLS, 7, 8, 9, 10, 11], [7, 8, 9, 10, 11, 12]),
        ([7], True, [CLS, 7, PAD, PAD, PAD, PAD], [7, SEP, -100, -100, -100, -100]),
    ],
)
def test_decoder_input_and_labels_by_hand(
    target: list[int], ends: bool, decoder_input_ids: list[int], labels: list[int]
) -> None:
    made = example(target, ends=ends)
    assert made.decoder_input_ids.tolist() == decoder_input_ids
    assert made.labels.tolist() == labels
    assert made.input_ids.tolist() == [CLS, *range(100, 140), SEP]
    assert made.mlm_positions.shape == made.mlm_labels.shape == (0,)


def test_a_corrupted_source_is_restored_by_its_labels() -> None:
    made = example([7, 8], ends=True, masking=MASKING)
    clean = np.asarray([CLS, *range(100, 140), SEP])
    assert len(made.mlm_positions) == 6  # 15% of 40
    assert (made.mlm_labels == clean[made.mlm_positions]).all()
    assert not {0, 41} & set(made.mlm_positions.tolist())
    changed = np.flatnonzero(made.input_ids != clean)
    assert 0 < len(changed) <= 6
    assert set(changed.tolist()) <= set(made.mlm_positions.tolist())


def test_where_passages_begin() -> None:
    rng = np.random.default_rng(0)
    starts = [passage_start(np.asarray([0]), 0, 1000, (100, 50), False, rng) for _ in range(4000)]
    counts = np.bincount(starts, minlength=851)
    # 951 equally likely draws, of which 101 are the document's beginning
    assert abs(counts[0] / 4000 - 101 / 951) < 0.02
    assert max(starts) <= 850
    halves = np.bincount((np.asarray([s for s in starts if s]) > 425).astype(int))
    assert abs(halves[0] - halves[1]) < 4 * sum(halves) ** 0.5
    # too short for both parts: from its beginning
    assert {passage_start(np.asarray([7]), 7, 120, (100, 50), False, rng) for _ in range(50)} == {7}


def test_whole_sentences_cut_at_a_boundary_that_leaves_something_to_write() -> None:
    rng = np.random.default_rng(0)
    boundaries = np.asarray([0, 30, 61, 95, 140, 199])
    for _ in range(300):
        begin = passage_start(boundaries, 0, 200, (40, 20), True, rng)
        assert begin >= 0
        assert begin + 40 in boundaries
    # none fits: any cut
    assert passage_start(np.asarray([0]), 0, 60, (40, 20), True, rng) == 0


# --- batches, on a corpus in which every id occurs once --------------------------------------


def make(
    domains: list[Domain], tokenizer: Any, shape: tuple[int, int], whole: float, clean_from: int
) -> PalmBatches:
    plan = BatchPlan(
        domains=domains,
        tokenizer=tokenizer,
        shapes=[(shape, 1.0)],
        batch_tokens=sum(shape) * 500,
        domain_exponent=1.0,
        domain_factors={},
        mlm_rate=0.15,
        seed=5,
    )
    return PalmBatches(plan, clean_from=clean_from, whole_sentence_share=whole)


def clean_source(batch: Batch, row: int) -> np.ndarray[Any, Any]:
    ids = batch["input_ids"][row].numpy().copy()
    ids[batch["mlm_positions"][row].numpy()] = batch["mlm_labels"][row].numpy()
    return ids


@pytest.mark.parametrize("shape", [(32, 24), (24, 96), (100, 25)])
def test_source_and_target_are_one_passage_cut_in_two(
    shape: tuple[int, int], unique_domains: list[Domain], unique_tokenizer: Any
) -> None:
    source_length, target_length = shape
    batches = make(unique_domains, unique_tokenizer, shape, 0.3, clean_from=1)
    ends = {  # the id after which a document ends
        int(domain.tokens[end - 1]) for domain in unique_domains for end in domain.documents[1:]
    }
    whole_targets = ended = by_chance = 0
    for step in (0, 1):
        batch = batches[step]
        assert batch["input_ids"].shape == (500, source_length)
        assert batch["labels"].shape == batch["decoder_input_ids"].shape == (500, target_length)
        assert bool(batch["mlm_labels"].numel()) == (step == 0)
        for row in range(500):
            source = clean_source(batch, row)
            assert source[0] == CLS
            assert source[-1] == SEP
            labels = batch["labels"][row].numpy()
            written = labels[labels != IGNORE_INDEX]
            assert (labels[len(written) :] == IGNORE_INDEX).all()
            has_end = written[-1] == SEP
            body = written[:-1] if has_end else written
            # runs of one document, the target right after the source
            passage = np.concatenate((source[1:-1], body))
            assert (np.diff(passage) == 1).all()
            assert not ends & set(passage[:-1].tolist())
            # nothing of the target is read, but for random replacements that hit it by chance
            read = batch["input_ids"][row].numpy()
            replaced = read[batch["mlm_positions"][row]]
            kept = np.delete(read, batch["mlm_positions"][row])
            assert not set(body.tolist()) & set(kept.tolist())
            by_chance += len(set(body.tolist()) & set(replaced.tolist()))
            decoder_input_ids = batch["decoder_input_ids"][row].numpy()
            assert decoder_input_ids[0] == CLS
            assert (decoder_input_ids[1 : len(written)] == written[:-1]).all()
            assert (decoder_input_ids[len(written) :] == PAD).all()
            # [SEP] where the document ends, if it fits, and only there
            at_end = int(body[-1]) in ends
            assert has_end == (at_end and len(body) < target_length)
            assert at_end or len(body) == target_length
            ended += has_end
            whole_targets += not has_end
    assert min(ended, whole_targets) > 10
    assert by_chance <= 5  # about 1 in 30000 for each of 250 random replacements and 96 targets


def test_the_papers_80_20_is_a_shape(unique_domains: list[Domain], unique_tokenizer: Any) -> None:
    batch = make(unique_domains, unique_tokenizer, (42, 10), 0, clean_from=0)[0]
    full = (batch["labels"] != IGNORE_INDEX).all(1).sum()
    assert full > 400
    assert (batch["input_ids"] > 4).sum(1).unique().tolist() == [40]  # of 50 tokens


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_the_share_of_passages_cut_at_a_sentence(
    share: float, unique_domains: list[Domain], unique_tokenizer: Any
) -> None:
    beginnings = {int(d.tokens[position]) for d in unique_domains for position in d.sentences}
    batches = make(unique_domains, unique_tokenizer, (32, 24), share, clean_from=0)
    cuts = [int(ids[0]) in beginnings for step in range(4) for ids in batches[step]["labels"]]
    by_chance = 1 / 7.5  # sentences have 3 to 12 tokens
    expected = share + (1 - share) * by_chance
    assert abs(np.mean(cuts) - expected) < 0.04


def test_the_source_is_clean_from_the_step_named(
    unique_domains: list[Domain], unique_tokenizer: Any
) -> None:
    batches = make(unique_domains, unique_tokenizer, (32, 24), 0.3, clean_from=9)
    for step in (0, 8):
        batch = batches[step]
        assert batch["mlm_positions"].shape == (500, 4)  # 15% of 30, rounded to even
        assert (batch["input_ids"] == MASK).any()
    for step in (9, 10, 100):
        batch = batches[step]
        assert batch["mlm_positions"].shape == (500, 0)
        assert (batch["input_ids"][:, 1:-1].diff() == 1).all()

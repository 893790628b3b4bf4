"""Batches as a function of seed and step; which documents are drawn, and how often."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from plug.errors import UsageError
from plug.pretraining.batches import (
    Batch,
    BatchPlan,
    DocumentSampler,
    PalmBatches,
    StructBertBatches,
    global_batch_tokens,
)
from plug.pretraining.tokens import Domain

Stage = Callable[..., StructBertBatches | PalmBatches]


@pytest.fixture
def stage(unique_domains: list[Domain], unique_tokenizer: Any) -> Stage:
    """Batches of the stage asked for, from changes to a plan."""

    def make(number: int, **changes: Any) -> StructBertBatches | PalmBatches:
        shapes = {1: [((32,), 1.0), ((64,), 3.0)], 2: [((16, 16), 1.0), ((40, 24), 3.0)]}
        defaults: dict[str, Any] = {
            "domains": unique_domains,
            "tokenizer": unique_tokenizer,
            "shapes": shapes[number],
            "batch_tokens": 64 * 7,
            "domain_exponent": 1.0,
            "domain_factors": {},
            "mlm_rate": 0.15,
            "seed": 3,
        }
        plan = BatchPlan(**(defaults | changes))
        if number == 1:
            return StructBertBatches(plan, shuffle_rate=0.05, sentence_objective=True)
        return PalmBatches(plan, clean_from=50, whole_sentence_share=0.3)

    return make


def same(first: Batch, second: Batch) -> bool:
    return first.keys() == second.keys() and all(
        torch.equal(first[name], second[name]) for name in first
    )


@pytest.mark.parametrize("number", [1, 2])
def test_a_batch_is_a_function_of_the_seed_and_the_step(number: int, stage: Stage) -> None:
    batches, again = stage(number), stage(number)
    in_order = [batches[step] for step in range(10)]
    for step in (7, 2, 9):
        assert same(again[step], in_order[step])
    ids = {batch["input_ids"].numpy().tobytes() for batch in in_order}
    assert len(ids) == 10
    assert not same(stage(number, seed=4)[0], in_order[0])
    rows = in_order[0]["input_ids"]
    assert len(rows.unique(dim=0)) == len(rows)


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("number", [1, 2])
def test_processes_together_see_what_one_would(number: int, world_size: int, stage: Stage) -> None:
    alone = stage(number)
    parts = [stage(number, rank=rank, world_size=world_size) for rank in range(world_size)]
    for step in range(6):
        whole = alone[step]
        shares = [part[step] for part in parts]
        for name in whole:
            assert torch.equal(torch.cat([share[name] for share in shares]), whole[name]), name
        sizes = [len(share["input_ids"]) for share in shares]
        assert max(sizes) - min(sizes) <= 1
        tokens = sum(whole[k].numel() for k in ("input_ids", "decoder_input_ids") if k in whole)
        assert {global_batch_tokens(share, 64 * 7) for share in shares} == {tokens}
        assert 64 * 6 < tokens <= 64 * 7


@pytest.mark.parametrize("number", [1, 2])
def test_shapes_come_by_their_weights(number: int, stage: Stage) -> None:
    batches = stage(number)
    lengths = Counter(batches[step]["input_ids"].shape[1] for step in range(400))
    short, long = (32, 64) if number == 1 else (16, 40)
    assert lengths.keys() == {short, long}
    assert abs(lengths[long] / 400 - 0.75) < 0.08


@pytest.mark.parametrize(("batch_tokens", "world_size"), [(63, 1), (64 * 3, 4)])
def test_a_batch_too_small_for_a_row_a_process(
    batch_tokens: int, world_size: int, stage: Stage
) -> None:
    for number in (1, 2):
        with pytest.raises(UsageError, match="batch_tokens"):
            stage(number, batch_tokens=batch_tokens, world_size=world_size)
    assert len(stage(1, batch_tokens=64, shapes=[((64,), 1.0)])[0]["input_ids"]) == 1


# --- documents -------------------------------------------------------------------------------


def domain(name: str, sizes: list[int]) -> Domain:
    documents = np.concatenate(([0], np.cumsum(sizes)))
    return Domain(name, np.zeros(sum(sizes), np.uint16), documents, documents[:-1])


def drawn(sampler: DocumentSampler, times: int = 6000) -> Counter[tuple[str, int]]:
    rng = np.random.default_rng(0)
    documents = (sampler.draw(rng) for _ in range(times))
    return Counter((one.domain.name, one.end - one.start) for one in documents)


@pytest.mark.parametrize(
    ("exponent", "factors", "share"),
    [
        (1.0, {}, 0.9),
        (0.0, {}, 0.5),
        (0.5, {}, 3 / 4),
        (1.0, {"small": 9.0}, 0.5),
        (0.0, {"large": 3.0}, 0.75),
        (1.0, {"small": 0.0}, 1.0),
    ],
)
def test_domains_are_drawn_by_their_weight(
    exponent: float, factors: dict[str, float], share: float
) -> None:
    domains = [domain("small", [30] * 10), domain("large", [45] * 60)]  # 300 and 2700 tokens
    counts = drawn(DocumentSampler(domains, exponent, factors, 20))
    assert abs(counts["large", 45] / 6000 - share) < 0.02
    assert counts.total() == 6000


def test_documents_are_drawn_by_their_size_and_short_ones_never() -> None:
    sampler = DocumentSampler([domain("a", [19, 20, 60, 5, 20])], 1.0, {}, 20)
    assert sampler.documents == 3
    counts = drawn(sampler)
    assert counts.keys() == {("a", 20), ("a", 60)}
    assert abs(counts["a", 60] / 6000 - 0.6) < 0.02


def test_a_domain_without_long_documents_gives_its_weight_to_the_rest() -> None:
    sampler = DocumentSampler([domain("a", [10] * 50), domain("b", [30])], 1.0, {}, 20)
    assert drawn(sampler, 50) == {("b", 30): 50}


def test_documents_too_short_and_wrong_factors() -> None:
    domains = [domain("a", [19, 5])]
    with pytest.raises(UsageError, match="不短于 20 个词元"):
        DocumentSampler(domains, 1.0, {}, 20)
    with pytest.raises(UsageError, match=r"\['b'\] 不在语料中"):
        DocumentSampler(domains, 1.0, {"b": 2.0}, 5)
    with pytest.raises(UsageError, match="权重都成了 0"):
        DocumentSampler(domains, 1.0, {"a": 0.0}, 5)


@pytest.mark.parametrize(("number", "shape", "least"), [(1, (64,), 61), (2, (42, 24), 46)])
def test_only_documents_that_fill_the_shape_are_read(
    number: int, shape: tuple[int, ...], least: int, stage: Stage
) -> None:
    """Stage 1: two segments and three special ids; stage 2: a source and a quarter of a target."""
    good = domain("good", [least, least])
    stage(number, shapes=[(shape, 1.0)], domains=[good], batch_tokens=640)[0]
    bad = domain("bad", [least - 1] * 3)
    with pytest.raises(UsageError, match=f"不短于 {least} 个词元"):
        stage(number, shapes=[(shape, 1.0)], domains=[bad], batch_tokens=640)

"""Decoding from caches against the model's own pass without any."""

from __future__ import annotations

from collections.abc import Callable

import torch

from plug.generation.kv_cache import DecoderCache
from plug.generation.model_runner import ModelRunner, PreparedModel, Size
from plug.model.plug import Plug

SOURCES = [[2, 9, 8, 7, 6, 5, 3], [2, 200, 3], [2, 30, 31, 32, 3]]  # unlike lengths: padding
WRITTEN = [[2, 40, 41, 42, 43], [2, 50, 51, 52, 53], [2, 60, 61, 62, 63]]


def new_runner(model: Plug) -> ModelRunner:
    return ModelRunner(PreparedModel(model), Size(3, 10, 5))


def uncached_logits(model: Plug, source: list[int], written: list[int]) -> torch.Tensor:
    """Logits after each position of ``written``, one text alone, brute force."""
    encoded = model.encode(torch.tensor([source]))
    return model.lm_logits(model.decode(torch.tensor([written]), encoded))[0]


@torch.inference_mode()
def test_each_step_of_a_padded_batch_equals_the_uncached_pass_alone(lively_model: Plug) -> None:
    runner = new_runner(lively_model)
    expected = [uncached_logits(lively_model, *each) for each in zip(SOURCES, WRITTEN, strict=True)]

    runner.start(SOURCES)
    for position in range(5):
        logits = runner.logits([row[position] for row in WRITTEN], [position] * 3)

        torch.testing.assert_close(logits, torch.stack([row[position] for row in expected]))


@torch.inference_mode()
def test_rows_may_stand_at_different_positions_and_repeat_them(lively_model: Plug) -> None:
    runner = new_runner(lively_model)
    runner.start(SOURCES)
    counts = [0, 0, 0]
    advance = [[1, 1, 1], [1, 0, 1], [0, 0, 1], [1, 1, 0]]  # the second waits twice, …

    for moves in advance:
        logits = runner.logits([row[at] for row, at in zip(WRITTEN, counts, strict=True)], counts)

        for row, at in enumerate(counts):
            expected = uncached_logits(lively_model, SOURCES[row], WRITTEN[row])[at]
            torch.testing.assert_close(logits[row], expected)
        counts = [at + move for at, move in zip(counts, moves, strict=True)]


@torch.inference_mode()
def test_padding_ids_inside_a_source_are_not_read(lively_model: Plug) -> None:
    runner = new_runner(lively_model)
    source = torch.tensor([[2, 9, 0, 7, 3]])
    mask = source != 0
    decoded = lively_model.decode(
        torch.tensor([[2]]), lively_model.encode(source, mask), attention_mask=mask
    )

    runner.start(source.tolist())

    torch.testing.assert_close(runner.logits([2], [0]), lively_model.lm_logits(decoded)[0])


@torch.inference_mode()
def test_selected_rows_keep_their_source_and_their_past(lively_model: Plug) -> None:
    runner = new_runner(lively_model)
    runner.start(SOURCES)
    for position in range(2):
        runner.logits([row[position] for row in WRITTEN], [position] * 3)

    runner.reorder([2, 0], 2, sources=True)

    logits = runner.logits([WRITTEN[2][2], WRITTEN[0][2]], [2, 2])
    for got, row in zip(logits, (2, 0), strict=True):
        torch.testing.assert_close(
            got, uncached_logits(lively_model, SOURCES[row], WRITTEN[row])[2]
        )


@torch.inference_mode()
def test_reordered_rows_take_the_past_and_leave_the_source(lively_model: Plug) -> None:
    runner = new_runner(lively_model)
    runner.start(SOURCES[:1], copies=3)
    for position in range(2):
        runner.logits([row[position] for row in WRITTEN], [position] * 3)

    runner.reorder([1, 1, 0], 2, sources=False)

    logits = runner.logits([70, 71, 72], [2, 2, 2])
    for got, past, last in zip(logits, (1, 1, 0), (70, 71, 72), strict=True):
        written = [*WRITTEN[past][:2], last]
        torch.testing.assert_close(got, uncached_logits(lively_model, SOURCES[0], written)[2])


Count = Callable[[Callable[[], object]], int]


def filled_cache(
    rows: int, lengths: list[int], count: Count
) -> tuple[DecoderCache, list[torch.Tensor], int]:
    """A cache of two layers with a source in each row, those sources, and how many operations."""
    draw = torch.Generator().manual_seed(0)
    like = torch.zeros(4, 1, 8)
    cache = DecoderCache(like, layers=2, rows=rows, source_length=9, capacity=4)
    stacked = [torch.randn(2, 2, 4, length, 8, generator=draw) for length in lengths]
    pairs = [[(layer[0], layer[1]) for layer in source] for source in stacked]
    return cache, stacked, count(lambda: cache.put_sources(range(rows), pairs))


def test_many_sources_take_as_many_operations_as_two(count_operations: Count) -> None:
    lengths = [9, 1, 5, 9, 3, 7, 2, 2, 8, 6, 4, 9]
    cache, stacked, many = filled_cache(12, lengths, count_operations)

    for row, (length, source) in enumerate(zip(lengths, stacked, strict=True)):
        for layer, pair in enumerate(cache.sources):
            for part, buffer in enumerate(pair):
                assert torch.equal(buffer[row, :, :length], source[layer, part])
    assert cache.source_lengths.tolist() == lengths
    assert many == filled_cache(2, lengths[:2], count_operations)[2]


def test_rows_change_places_all_at_once(count_operations: Count) -> None:
    lengths = [9, 1, 5, 9, 3, 7]
    cache, stacked, _ = filled_cache(6, lengths, count_operations)
    past = torch.randn(6, 4, 4, 8, generator=torch.Generator().manual_seed(1))
    cache.own[1][0].copy_(past)

    two = count_operations(lambda: cache.take([5, 0, 3], 2, sources=True, into=[0, 5, 3]))
    ring = [1, 2, 4], [2, 4, 1]
    three = count_operations(lambda: cache.take(ring[0], 3, sources=True, into=ring[1]))

    for row, source in enumerate((5, 4, 1, 3, 2, 0)):
        length = lengths[source]
        assert torch.equal(cache.sources[1][1][row, :, :length], stacked[source][1, 1])
        assert cache.source_lengths[row] == length
        assert torch.equal(cache.own[1][0][row, :, :2], past[source, :, :2])
    assert two == three

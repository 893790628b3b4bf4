from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from plug.generation.sampling import (
    Sampler,
    candidates,
    draw,
    penalize,
    penalize_repetition,
    repeated_ngram_ids,
)
from plug.generation.settings import GenerationSettings

CPU = torch.device("cpu")


def random_logits(rows: int = 3, vocab: int = 50) -> Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(3)) * 3


def as_distribution(probabilities: Tensor, ids: Tensor, vocab: int) -> Tensor:
    return torch.zeros(len(ids), vocab).scatter(1, ids, probabilities)


@pytest.mark.parametrize("temperature", [0.3, 0.9, 2.0])
@pytest.mark.parametrize("top_k", [0, 1, 7, 80])
@pytest.mark.parametrize("top_p", [0.0, 0.02, 0.4, 0.95, 1.0])
def test_what_may_be_drawn_is_what_transformers_keeps(
    temperature: float, top_k: int, top_p: float
) -> None:
    transformers = pytest.importorskip("transformers")
    logits = random_logits()
    theirs = transformers.TemperatureLogitsWarper(temperature)(None, logits)
    if top_k:
        theirs = transformers.TopKLogitsWarper(top_k)(None, theirs)
    if 0 < top_p < 1:
        theirs = transformers.TopPLogitsWarper(top_p)(None, theirs)

    kept = candidates(logits, temperature, top_k, top_p)

    torch.testing.assert_close(as_distribution(*kept, vocab=50), theirs.softmax(-1))


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_penalties_equal_those_of_transformers(size: int) -> None:
    transformers = pytest.importorskip("transformers")
    generator = torch.Generator().manual_seed(5)
    written = torch.randint(0, 4, (3, 23), generator=generator)  # few ids: much is repeated
    logits = random_logits()
    theirs = transformers.RepetitionPenaltyLogitsProcessor(1.3)(written, logits)
    theirs = transformers.NoRepeatNGramLogitsProcessor(size)(written, theirs)
    settings = GenerationSettings(repetition_penalty=1.3, no_repeat_ngram_size=size)

    torch.testing.assert_close(penalize(logits, list(written), settings), theirs)


def test_a_penalty_acts_on_what_was_written_alone() -> None:
    logits = torch.tensor([2.0, -2.0, 2.0, -2.0])

    penalized = penalize_repetition(logits, torch.tensor([0, 1, 1]), 2.0)

    assert penalized.tolist() == [1.0, -4.0, 2.0, -2.0]


@given(ids=st.lists(st.integers(0, 2), max_size=12), size=st.integers(1, 4))
def test_an_ngram_is_banned_if_and_only_if_it_would_be_the_second(
    ids: list[int], size: int
) -> None:
    banned = set(repeated_ngram_ids(torch.tensor(ids, dtype=torch.long), size).tolist())

    for following in range(3):
        longer = [*ids, following]
        ngrams = [tuple(longer[at : at + size]) for at in range(len(longer) - size + 1)]
        is_second = bool(ngrams) and ngrams[-1] in ngrams[:-1]
        assert (following in banned) == is_second


@given(uniform=st.floats(0, 1, exclude_max=True), top_p=st.sampled_from([0.3, 0.9, 1.0]))
def test_a_draw_is_the_quantile_of_the_kept_distribution(uniform: float, top_p: float) -> None:
    probabilities, ids = candidates(random_logits(), 1.0, 20, top_p)

    drawn = draw(probabilities, ids, torch.full((3,), uniform)).tolist()

    for row, token_id in enumerate(drawn):
        at = ids[row].tolist().index(token_id)
        below = probabilities[row, :at].double().sum().item()
        assert probabilities[row, at] > 0
        assert below - 1e-6 <= uniform <= below + probabilities[row, at].item() + 1e-6


def test_nothing_that_top_p_dropped_is_drawn_at_the_very_end() -> None:
    probabilities, ids = candidates(random_logits(200, 50), 1.0, 0, 0.5)

    drawn = draw(probabilities, ids, torch.ones(200))

    assert (as_distribution(probabilities, ids, 50).gather(1, drawn[:, None]) > 0).all()


def test_frequencies_of_draws_are_the_probabilities() -> None:
    logits = torch.tensor([[1.0, 0.0, -1.0, 2.0, -50.0]])
    sampler = Sampler(GenerationSettings(temperature=1.0, top_k=0), [11], 20_000, CPU)

    drawn = torch.tensor([sampler.choose(logits, [0], step)[0] for step in range(20_000)])

    frequencies = torch.bincount(drawn, minlength=5) / 20_000
    # 4 standard deviations of a frequency near 0.5 among 20,000 draws
    torch.testing.assert_close(frequencies, logits[0].softmax(-1), atol=0.015, rtol=0)


def test_the_seed_decides_and_a_longer_limit_changes_nothing_before_it() -> None:
    logits = random_logits(1, 50)

    def choices(seed: int, steps: int) -> list[int]:
        sampler = Sampler(GenerationSettings(), [seed], steps, CPU)
        return [sampler.choose(logits, [0], step)[0] for step in range(15)]

    assert choices(1, 15) == choices(1, 15) == choices(1, 400)
    assert choices(1, 15) != choices(2, 15)


def test_a_row_draws_the_same_when_other_rows_have_left() -> None:
    logits = random_logits(3, 50)
    together = Sampler(GenerationSettings(), [4, 5, 6], 9, CPU)
    alone = Sampler(GenerationSettings(), [6], 9, CPU)

    for step in range(9):
        assert (
            together.choose(logits[1:], [1, 2], step)[1] == alone.choose(logits[2:], [0], step)[0]
        )


@pytest.mark.parametrize(
    "greedy", [{"do_sample": False}, {"temperature": 0}, {"top_k": 1}, {"top_p": 1e-9}]
)
def test_the_ways_to_be_greedy_all_take_the_likeliest(greedy: dict[str, float]) -> None:
    logits = random_logits()
    sampler = Sampler(GenerationSettings(**greedy), [0, 0, 0], 5, CPU)

    assert sampler.choose(logits, [0, 1, 2], 0) == logits.argmax(-1).tolist()

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from plug.generation import sampling
from plug.generation.sampling import (
    NO_TOKEN,
    Joining,
    Sampler,
    candidates,
    draw,
    log_probabilities,
    penalize,
    penalize_frequency,
)
from plug.generation.settings import GenerationSettings

END = 49
GREEDY = GenerationSettings(do_sample=False)


def random_logits(rows: int = 3, vocab: int = 50) -> Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(3)) * 3


def as_distribution(probabilities: Tensor, ids: Tensor, vocab: int) -> Tensor:
    return torch.zeros(len(ids), vocab).scatter(1, ids, probabilities)


def alike(logits: Tensor, temperature: float, top_k: int, top_p: float) -> tuple[Tensor, Tensor]:
    """`candidates` with the same settings in every row; 0 is off."""
    rows, vocab = logits.shape
    most = min(top_k or vocab, vocab)
    return candidates(
        logits,
        torch.full((rows,), temperature),
        torch.full((rows,), most),
        torch.full((rows,), top_p or 1.0),
        most,
    )


def make_sampler(
    settings: list[GenerationSettings], seeds: list[int], draws: int, vocab: int = 50
) -> Sampler:
    sampler = Sampler(len(settings), vocab, END, draws, torch.device("cpu"))
    for row, (each, seed) in enumerate(zip(settings, seeds, strict=True)):
        sampler.join([Joining(row, each, seed, draws)])
        sampler.refill({row: draws})
    return sampler


def choices(sampler: Sampler, logits: Tensor, steps: int) -> list[list[int]]:
    """What each row chooses at each step."""
    made = []
    for step in range(steps):
        plan = sampler.plan([step] * len(logits))
        made.append(sampler.choose(logits, plan))
        sampler.record(made[-1], torch.ones(len(logits), dtype=torch.bool), plan)
    return torch.stack(made).T.tolist()


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

    kept = alike(logits, temperature, top_k, top_p)

    torch.testing.assert_close(as_distribution(*kept, vocab=50), theirs.softmax(-1))


def test_each_row_is_cut_by_its_own_settings() -> None:
    logits = random_logits()
    own = [(0.5, 3, 1.0), (2.0, 50, 0.6), (1.0, 50, 1.0)]

    together = candidates(logits, *map(torch.tensor, zip(*own, strict=True)), 50)

    for row, (temperature, top_k, top_p) in enumerate(own):
        alone = alike(logits[row : row + 1], temperature, top_k, top_p)
        torch.testing.assert_close(
            as_distribution(*together, vocab=50)[row], as_distribution(*alone, vocab=50)[0]
        )


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_penalties_equal_those_of_transformers(size: int) -> None:
    transformers = pytest.importorskip("transformers")
    generator = torch.Generator().manual_seed(5)
    written = torch.randint(0, 4, (3, 23), generator=generator)  # few ids: much is repeated
    logits = random_logits()
    counts = [23, 11, 2]
    theirs = []
    for row, count in enumerate(counts):
        ids, scores = written[row : row + 1, :count], logits[row : row + 1]
        scores = transformers.RepetitionPenaltyLogitsProcessor(1.3)(ids, scores)
        theirs.append(transformers.NoRepeatNGramLogitsProcessor(size)(ids, scores))

    ours = penalize(
        logits,
        written,
        torch.tensor(counts),
        torch.full((3,), 1.3),
        torch.full((3,), size),
        longest_ngram=4,
    )

    torch.testing.assert_close(ours, torch.cat(theirs))


def test_a_penalty_acts_on_what_was_written_alone() -> None:
    logits = torch.tensor([[2.0, -2.0, 2.0, -2.0], [2.0, -2.0, 2.0, -2.0]])
    written = torch.tensor([[0, 1, 1, 3], [0, 1, 1, 3]])

    penalized = penalize(
        logits, written, torch.tensor([3, 0]), torch.tensor([2.0, 2.0]), torch.tensor([0, 0]), 0
    )

    assert penalized.tolist() == [[1.0, -4.0, 2.0, -2.0], [2.0, -2.0, 2.0, -2.0]]


@given(ids=st.lists(st.integers(0, 2), max_size=12), size=st.integers(1, 4))
def test_an_ngram_is_banned_if_and_only_if_it_would_be_the_second(
    ids: list[int], size: int
) -> None:
    written = torch.tensor([[*ids, 2, 1, 0, 0]])  # what follows the row's own is no one's
    own, one = torch.tensor([len(ids)]), torch.ones(1)
    banned = penalize(torch.zeros(1, 3), written, own, one, torch.tensor([size]), 4)[0] < 0

    for following in range(3):
        longer = [*ids, following]
        ngrams = [tuple(longer[at : at + size]) for at in range(len(longer) - size + 1)]
        is_second = bool(ngrams) and ngrams[-1] in ngrams[:-1]
        assert bool(banned[following]) == is_second


@given(uniform=st.floats(0, 1, exclude_max=True), top_p=st.sampled_from([0.3, 0.9, 1.0]))
def test_a_draw_is_the_quantile_of_the_kept_distribution(uniform: float, top_p: float) -> None:
    probabilities, ids = alike(random_logits(), 1.0, 20, top_p)

    drawn = draw(probabilities, ids, torch.full((3,), uniform)).tolist()

    for row, token_id in enumerate(drawn):
        at = ids[row].tolist().index(token_id)
        below = probabilities[row, :at].double().sum().item()
        assert probabilities[row, at] > 0
        assert below - 1e-6 <= uniform <= below + probabilities[row, at].item() + 1e-6


def test_nothing_that_top_p_dropped_is_drawn_at_the_very_end() -> None:
    probabilities, ids = alike(random_logits(200, 50), 1.0, 0, 0.5)

    drawn = draw(probabilities, ids, torch.ones(200))

    assert (as_distribution(probabilities, ids, 50).gather(1, drawn[:, None]) > 0).all()


def test_frequencies_of_draws_are_the_probabilities() -> None:
    logits = torch.tensor([[1.0, 0.0, -1.0, 2.0, -50.0]])
    sampler = make_sampler(
        [GenerationSettings(temperature=1.0, top_k=0, repetition_penalty=1.0)],
        [11],
        20_000,
        vocab=5,
    )

    [drawn] = choices(sampler, logits, 20_000)

    frequencies = torch.bincount(torch.tensor(drawn), minlength=5) / 20_000
    # 4 standard deviations of a frequency near 0.5 among 20,000 draws
    torch.testing.assert_close(frequencies, logits[0].softmax(-1), atol=0.015, rtol=0)


def test_the_seed_decides_and_a_longer_limit_changes_nothing_before_it() -> None:
    logits = random_logits(1, 50)

    def drawn(seed: int, steps: int) -> list[int]:
        return choices(make_sampler([GenerationSettings()], [seed], steps), logits, 15)[0]

    assert drawn(1, 15) == drawn(1, 15) == drawn(1, 400)
    assert drawn(1, 15) != drawn(2, 15)


def test_a_row_chooses_the_same_whoever_is_beside_it_and_wherever_it_is_moved() -> None:
    logits = random_logits(3, 50)
    own = GenerationSettings(temperature=2.0, repetition_penalty=1.2, no_repeat_ngram_size=2)
    [expected] = choices(make_sampler([own], [6], 30), logits[2:], 30)
    others = [GREEDY, GenerationSettings(top_k=0, top_p=0.5)]
    together = make_sampler([*others, own], [4, 5, 6], 30)

    first = choices(together, logits, 12)
    together.move([(2, 0)])
    second = []
    for step in range(12, 30):
        plan = together.plan([step])
        chosen = together.choose(logits[2:], plan)
        together.record(chosen, torch.ones(1, dtype=torch.bool), plan)
        second += chosen.tolist()

    assert first[2] + second == expected
    assert len(set(expected)) > 10


def test_the_minimum_length_and_forbidden_ids_are_those_of_the_row() -> None:
    logits = torch.zeros(2, 50)
    logits[:, END], logits[:, 7] = 3, 2
    sampler = Sampler(2, 50, END, 4, torch.device("cpu"))
    least = Joining(0, GREEDY, 0, 4, min_length=2)
    sampler.join([least, Joining(1, GREEDY, 0, 4, forbidden=[END, 7])])

    assert choices(sampler, logits, 4) == [[7, 7, END, END], [0, 0, 0, 0]]


@pytest.mark.parametrize(
    "greedy", [{"do_sample": False}, {"temperature": 0}, {"top_k": 1}, {"top_p": 1e-9}]
)
def test_the_ways_to_be_greedy_all_take_the_likeliest(greedy: dict[str, float]) -> None:
    logits = random_logits()
    sampler = make_sampler([GenerationSettings(**greedy)] * 3, [0, 0, 0], 5)

    assert sampler.choose(logits, sampler.plan([0, 0, 0])).tolist() == logits.argmax(-1).tolist()


@pytest.mark.parametrize(
    ("options", "penalty"),
    [
        ({}, 1.1),
        ({"temperature": 0}, 1),
        ({"do_sample": False}, 1),
        ({"num_beams": 4}, 1),
        ({"mode": "original"}, 1),
        ({"mode": "original", "repetition_penalty": 1.3}, 1.3),
        ({"do_sample": False, "repetition_penalty": 1.2}, 1.2),
    ],
)
def test_repetition_is_penalized_by_default_only_where_plug_draws(
    options: dict[str, Any], penalty: float
) -> None:
    assert GenerationSettings(**options).penalty == penalty


@pytest.mark.parametrize("min_p", [0.0, 0.05, 0.4, 1.0])
@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_min_p_keeps_what_transformers_keeps(min_p: float, temperature: float) -> None:
    transformers = pytest.importorskip("transformers")
    logits = random_logits()
    theirs = transformers.TemperatureLogitsWarper(temperature)(None, logits)
    theirs = transformers.TopKLogitsWarper(20)(None, theirs)
    theirs = transformers.TopPLogitsWarper(0.95)(None, theirs)
    theirs = transformers.MinPLogitsWarper(min_p)(None, theirs)

    every = torch.full((3,), temperature), torch.full((3,), 20), torch.full((3,), 0.95)
    kept = candidates(logits, *every, 20, torch.full((3,), min_p))

    torch.testing.assert_close(as_distribution(*kept, vocab=50), theirs.softmax(-1))


def test_presence_counts_once_and_frequency_each_time() -> None:
    written = torch.tensor([[1, 2, 2, 3, 3], [0, 0, 0, 0, 0]])

    penalized = penalize_frequency(
        torch.zeros(2, 4),
        written,
        torch.tensor([4, 2]),
        torch.tensor([0.5, -1.0]),
        torch.tensor([0.25, 0.0]),
    )

    assert penalized.tolist() == [[0, -0.75, -1.0, -0.75], [1.0, 0, 0, 0]]


@given(ids=st.lists(st.integers(0, 2), min_size=1, max_size=80), size=st.integers(1, 70))
def test_step_by_step_the_same_ngrams_are_forbidden_as_at_once(ids: list[int], size: int) -> None:
    settings = GenerationSettings(do_sample=False, no_repeat_ngram_size=size)
    sampler = make_sampler([settings], [0], 100, vocab=3)
    for step, token_id in enumerate(ids):  # across the widths that a plan rounds up to
        one = torch.ones(1, dtype=torch.bool)
        sampler.record(torch.tensor([token_id]), one, sampler.plan([step]))

    chosen = sampler.choose(torch.zeros(1, 3), sampler.plan([len(ids)])).item()

    allowed = penalize(
        torch.zeros(1, 3), torch.tensor([ids]), torch.tensor([len(ids)]), torch.ones(1),
        torch.tensor([size]), size,
    )  # fmt: skip
    possible = [token_id for token_id in range(3) if allowed[0, token_id] == 0]
    assert chosen == (possible[0] if possible else NO_TOKEN)


def test_a_bias_is_added_first_and_is_the_row_s_own() -> None:
    logits = torch.zeros(2, 50)
    logits[:, 7], logits[:, 9] = 2, 1
    sampler = make_sampler([GREEDY, GREEDY], [0, 0], 2)

    for bias, forbidden, expected in (({4: 50}, [4], 7), ({7: -100, 3: 1.5}, [], 3)):
        settings = GenerationSettings(do_sample=False, logit_bias=bias)
        sampler.join([Joining(0, settings, 0, 2, forbidden)])
        assert choices(sampler, logits, 1) == [[expected], [7]]


def test_ids_from_a_limit_on_are_forbidden_to_the_row_alone() -> None:
    logits = torch.zeros(2, 50)
    logits[:, [9, 29, 30, 49]] = torch.tensor([1.0, 2.0, 3.0, 4.0])
    sampler = make_sampler([GREEDY, GREEDY], [0, 0], 2)

    sampler.join([Joining(0, GREEDY, 0, 2, [29], num_ids=30)])
    assert choices(sampler, logits, 1) == [[9], [49]]
    sampler.join([Joining(0, GREEDY, 0, 2)])
    assert choices(sampler, logits, 1) == [[49], [49]]


@pytest.fixture
def joining() -> list[Joining]:
    settings = [
        GREEDY,
        GenerationSettings(temperature=1.3, top_k=30),
        GenerationSettings(logit_bias={5: 2.0, 6: -3.0}, top_p=0.9),
        GenerationSettings(repetition_penalty=1.4, no_repeat_ngram_size=2),
    ]
    return [Joining(row, each, row, 4 + row, [row]) for row, each in enumerate(settings)]


def joined(*groups: list[Joining]) -> Sampler:
    sampler = Sampler(5, 50, END, 8, torch.device("cpu"))
    for group in groups:
        sampler.join(group)
        sampler.refill({each.row: each.steps for each in group})
    return sampler


def test_rows_that_join_together_are_what_they_are_one_by_one(joining: list[Joining]) -> None:
    logits = random_logits(4)

    together, one_by_one = joined(joining), joined(*([each] for each in joining))

    assert choices(together, logits, 4) == choices(one_by_one, logits, 4)


def test_rows_that_move_together_go_on_as_they_were(joining: list[Joining]) -> None:
    logits = random_logits(1).expand(5, -1)
    moved, stayed = joined(joining), joined(joining)
    for sampler in (moved, stayed):
        choices(sampler, logits[:4], 2)

    moved.move([(3, 0), (2, 4)])

    expected = choices(stayed, logits[:4], 2)
    found = choices(moved, logits, 2)
    assert [found[0], found[1], found[4]] == [expected[3], expected[1], expected[2]]


def test_the_end_does_not_come_where_it_is_to_be_ignored() -> None:
    logits = torch.zeros(1, 50)
    logits[:, END], logits[:, 8] = 3, 2

    sampler = make_sampler([GenerationSettings(do_sample=False, ignore_eos=True)], [0], 4)

    assert choices(sampler, logits, 4) == [[8, 8, 8, 8]]


@pytest.mark.parametrize("options", [{"do_sample": False}, {}, {"top_k": 0, "top_p": 0.5}])
def test_a_row_that_nothing_can_follow_gets_no_token_and_the_others_theirs(
    options: dict[str, Any],
) -> None:
    logits = random_logits(4)
    settings = GenerationSettings(**options)
    expected = choices(make_sampler([settings], [3], 5), logits[1:2], 1)[0]
    sampler = make_sampler([settings] * 4, [3] * 4, 5)
    sampler.join([Joining(0, settings, 3, 5, range(50))])
    sampler.refill({0: 5})
    logits[2] = float("-inf")
    logits[3, 5] = float("nan")

    [nothing, own, empty, broken] = choices(sampler, logits, 1)

    assert [nothing, empty, broken] == [[NO_TOKEN]] * 3
    assert own == expected


@pytest.mark.parametrize("top_p", [1e-50, 5e-324, 1e-12])
def test_the_smallest_top_p_keeps_the_likeliest(top_p: float) -> None:
    logits = random_logits()
    sampler = make_sampler([GenerationSettings(top_p=top_p)] * 3, [0, 1, 2], 3)

    assert choices(sampler, logits, 1) == [[each] for each in logits.argmax(-1).tolist()]


@pytest.mark.parametrize(
    "extreme",
    [
        {"temperature": 0.01, "repetition_penalty": 100},
        {"temperature": 100, "top_k": 2**31 - 1, "repetition_penalty": 0.01},
        {"presence_penalty": 2, "frequency_penalty": -2, "no_repeat_ngram_size": 100_000},
        {"min_p": 1.0, "top_p": 1e-300, "logit_bias": {5: 100, 6: -100}},
    ],
)
def test_extreme_settings_still_choose_tokens(extreme: dict[str, Any]) -> None:
    sampler = make_sampler([GenerationSettings(**extreme)], [0], 60)

    [chosen] = choices(sampler, random_logits(1) * 30, 60)

    assert all(0 <= token_id < 50 for token_id in chosen)


def test_log_probabilities_are_those_of_the_model_the_chosen_first() -> None:
    logits = random_logits()
    every = logits.log_softmax(-1)

    found = log_probabilities(logits, torch.tensor([4, 5, NO_TOKEN]), 3)

    assert found.ids[:2, 0].tolist() == [4, 5]
    assert torch.equal(found.ids[:, 1:], logits.topk(3).indices)
    torch.testing.assert_close(found.values[:2], every.gather(1, found.ids)[:2])
    assert log_probabilities(logits, torch.tensor([4, 5, 6]), 0).values.shape == (3, 1)


def test_rows_that_draw_among_many_are_looked_through_apart(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    vocab = 500
    logits = random_logits(4, vocab)
    own = [GenerationSettings(), GenerationSettings(top_k=0), GREEDY, GenerationSettings(min_p=0.2)]
    expected = [
        choices(make_sampler([each], [9], 20, vocab), logits[row : row + 1], 20)[0]
        for row, each in enumerate(own)
    ]
    asked = []
    find = sampling.candidates
    monkeypatch.setattr(
        sampling, "candidates", lambda *inputs: asked.append(inputs[0].shape) or find(*inputs)
    )

    together = choices(make_sampler(own, [9] * 4, 20, vocab), logits, 20)

    assert together == expected
    assert asked == [(3, vocab), (1, vocab)] * 20

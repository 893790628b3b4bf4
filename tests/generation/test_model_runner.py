"""The device's side: buffers that serve again, and what CUDA changes, tried on the CPU.

On CUDA the host is a step behind, and lengths and slots are rounded up.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
from torch import Tensor

from plug.generation.model_runner import ModelRunner, PreparedModel, Size
from plug.generation.scheduler import Scheduler
from plug.generation.sequence import Sequence
from plug.generation.settings import GenerationSettings
from plug.generation.window import OriginalRules, PlugRules, Rules
from plug.model.plug import Plug

Write = Callable[..., None]  # `conftest.write_all`

PROMPTS = [[9, 8, 7], [200] * 40, [30, 31], [77], [5, 6]]


def new_sequences(model: Plug) -> list[Sequence]:
    """Unlike windows, lengths and settings."""
    config = model.config
    rules: list[Rules] = [
        PlugRules(config, 20, 45, min_length=3),
        PlugRules(config, 7, 30),
        OriginalRules(config, 9, 40),
        PlugRules(config, 96, 90),
        PlugRules(config, 1, 4),
    ]
    settings = [
        GenerationSettings(temperature=2.0, top_k=0),
        GenerationSettings(do_sample=False),
        GenerationSettings(temperature=3.0, top_k=0, mode="original"),
        GenerationSettings(no_repeat_ngram_size=2, temperature=1.5),
        GenerationSettings(),
    ]
    parts = zip(PROMPTS, rules, settings, strict=True)
    return [Sequence(prompt, rule, each, seed) for seed, (prompt, rule, each) in enumerate(parts)]


def outcomes(sequences: list[Sequence]) -> list[tuple[object, ...]]:
    return [(sequence.written, sequence.finish_reason) for sequence in sequences]


@pytest.fixture
def ending_model(lively_model: Plug) -> Plug:
    """[SEP] is another token, one that it does write."""
    lively_model.config = dataclasses.replace(lively_model.config, eos_token_id=50)
    return lively_model


@pytest.fixture
def alone(ending_model: Plug, write: Write) -> list[tuple[object, ...]]:
    """What each of `new_sequences` becomes alone."""
    sequences = new_sequences(ending_model)
    for sequence in sequences:
        write(PreparedModel(ending_model), [sequence])
    assert {sequence.finish_reason for sequence in sequences} == {"stop", "length"}
    return outcomes(sequences)


@pytest.mark.parametrize("ahead", [0, 1, 2])
@pytest.mark.parametrize("granularity", [1, 64])
@pytest.mark.parametrize("rows", [1, 4])
def test_a_host_that_reads_late_and_rounded_lengths_and_rows_change_nothing(
    ahead: int,
    granularity: int,
    rows: int,
    ending_model: Plug,
    alone: list[tuple[object, ...]],
    write: Write,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    prepared = PreparedModel(ending_model)
    prepared.model.granularity = granularity
    monkeypatch.setattr(ModelRunner, "_rounded", lambda _, count: -(-count // rows) * rows)

    write(prepared, together := new_sequences(ending_model), slots=2, ahead=ahead)

    assert outcomes(together) == alone


def test_the_buffers_serve_again_after_others_were_written_or_left(
    ending_model: Plug, alone: list[tuple[object, ...]], write: Write
) -> None:
    runner = ModelRunner(PreparedModel(ending_model), Size(5, 98, 96))

    write(runner, first := new_sequences(ending_model)[:3])
    runner.start([[2, 3]])  # beams
    scheduler = Scheduler(5)
    for left_alone in new_sequences(ending_model)[1:]:
        scheduler.join(left_alone)
    runner.step(scheduler.plan())
    write(runner, again := new_sequences(ending_model))

    assert outcomes(first) == alone[:3]
    assert outcomes(again) == alone


def test_two_runners_of_one_model_do_not_disturb_each_other(
    ending_model: Plug, alone: list[tuple[object, ...]]
) -> None:
    prepared = PreparedModel(ending_model)
    sequences = new_sequences(ending_model)
    drivers = []
    for sequence in sequences:
        scheduler = Scheduler(1)
        scheduler.join(sequence)
        drivers.append((scheduler, ModelRunner(prepared, Size(1, 98, 96))))

    while any(scheduler.running for scheduler, _ in drivers):
        for scheduler, runner in drivers:
            if scheduler.running:
                scheduler.update(runner.step(scheduler.plan()))

    assert outcomes(sequences) == alone


def test_an_interrupted_step_leaves_a_mark(ending_model: Plug) -> None:
    prepared = PreparedModel(ending_model)
    runner = ModelRunner(prepared, Size(1, 98, 96))
    scheduler = Scheduler(1)
    scheduler.join(new_sequences(ending_model)[0])
    runner.step(scheduler.plan())
    assert runner.is_intact

    def interrupted(*_: object) -> Tensor:
        raise KeyboardInterrupt

    prepared.model.decode = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        runner.step(scheduler.plan())
    assert not runner.is_intact


def test_sep_waits_for_the_minimum_length(ending_model: Plug, write: Write) -> None:
    greedy = GenerationSettings(do_sample=False)
    rules = PlugRules(ending_model.config, 9, 9)
    write(PreparedModel(ending_model), [free := Sequence([9, 8, 7], rules, greedy, 0)])
    first = free.written[0]
    ending_model.config = dataclasses.replace(ending_model.config, eos_token_id=first)

    found = []
    for min_length in (0, 3):
        rules = PlugRules(ending_model.config, 9, 9, min_length)
        write(PreparedModel(ending_model), [sequence := Sequence([9, 8, 7], rules, greedy, 0)])
        found.append(sequence)

    assert found[0].written == []
    assert found[0].finish_reason == "stop"
    assert len(found[1].written) >= 3
    assert first not in found[1].written


def test_padding_rows_and_banned_ids_are_never_written(ending_model: Plug, write: Write) -> None:
    """In spite of settings that draw among all ids nearly alike."""
    ending_model.config = dataclasses.replace(ending_model.config, num_emitted_tokens=20)
    settings = GenerationSettings(temperature=100.0, top_k=0)
    rules = PlugRules(ending_model.config, 90, 90, banned=[0, 4, 7])

    write(PreparedModel(ending_model), [sequence := Sequence([9], rules, settings, 3)])

    assert set(sequence.written) == set(range(20)) - {0, 4, 7}


def test_sizes() -> None:
    assert Size(2, 9, 5).holds(Size(2, 3, 5))
    assert not Size(2, 9, 5).holds(Size(3, 3, 5))
    assert Size(2, 9, 5).joined(Size(3, 4, 5)) == Size(3, 9, 5)

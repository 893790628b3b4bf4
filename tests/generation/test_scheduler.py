"""The host's side of a step, with a scripted runner in the device's place."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plug.generation.detokenizer import Detokenizer
from plug.generation.scheduler import Scheduler
from plug.generation.sequence import Sequence
from plug.generation.settings import GenerationSettings
from plug.generation.window import PlugRules
from plug.model.configuration import PRESETS
from plug.tokenization import PlugTokenizer

CONFIG = PRESETS["test"]
SEP = CONFIG.eos_token_id

MakeRunner = Callable[..., Any]  # `conftest.ScriptedRunner`


def new_sequence(
    out_length: int = 9, window: int = 9, detokenizer: Detokenizer | None = None, **options: Any
) -> Sequence:
    rules = PlugRules(CONFIG, window, out_length)
    return Sequence([7, 8], rules, GenerationSettings(**options), 0, detokenizer)


def test_it_needs_no_torch() -> None:
    code = "import sys, plug.generation.scheduler; print('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    assert found.stdout == "False\n"


def test_a_plan_says_who_joins_who_moves_and_who_is_due(scripted_runner: MakeRunner) -> None:
    runner = scripted_runner([[10, SEP], [20, 21, 22], [30, 31, 32]])
    scheduler = Scheduler(2)
    first, second, third = new_sequence(), new_sequence(window=2), new_sequence()
    for sequence in (first, second):
        scheduler.join(sequence)
    assert scheduler.is_full

    plan = scheduler.plan()
    assert (plan.joined, plan.due, plan.moves, plan.steps) == ([0, 1], [0, 1], [], [0, 0])
    assert scheduler.update(runner.step(plan)) == []
    plan = scheduler.plan()
    assert (plan.joined, plan.due, plan.moves, plan.steps) == ([], [], [], [1, 1])
    assert scheduler.update(runner.step(plan)) == [first]
    scheduler.join(third)
    plan = scheduler.plan()
    # The second one's window is full, so nothing of its cache is copied.
    assert (plan.joined, plan.due, plan.moves) == ([1], [0, 1], [(1, 0, 0)])
    assert plan.steps == [2, 0]
    assert scheduler.update(runner.step(plan)) == []


@given(seed=st.integers(0, 2**32), ahead=st.integers(0, 2), slots=st.integers(1, 4))
def test_whoever_joins_and_leaves_each_writes_its_script(
    seed: int, ahead: int, slots: int, scripted_runner: MakeRunner
) -> None:
    """The runner checks that every plan puts each sequence into the slot that it says."""
    draws = random.Random(seed)
    scripts = [
        [*(draws.randrange(10, 60) for _ in range(draws.randrange(12))), SEP, *[9] * 16]
        for _ in range(9)
    ]
    sequences = [
        new_sequence(
            draws.randrange(1, 13),
            draws.randrange(1, 6),
            prompt_lookup_num_tokens=draws.choice([None, 3]),
        )
        for _ in scripts
    ]
    runner = scripted_runner(dict(zip(sequences, scripts, strict=True)))
    scheduler = Scheduler(slots, ahead=ahead)
    waiting, gone, finished = list(sequences), set(), set()

    while waiting or scheduler.running:
        while waiting and not scheduler.is_full and draws.random() < 0.7:
            scheduler.join(waiting.pop(0))
        if scheduler.running and draws.random() < 0.1:
            scheduler.leave([left := draws.choice(scheduler.running)])
            gone.add(left)
        if scheduler.running:
            finished.update(scheduler.update(runner.step(scheduler.plan())))

    assert finished | gone == set(sequences)
    for sequence, script in zip(sequences, scripts, strict=True):
        if sequence in finished:
            whole = script[: script.index(SEP)]
            assert sequence.written == whole[: sequence.rules.steps]
            is_whole = len(whole) < sequence.rules.steps
            assert sequence.finish_reason == ("stop" if is_whole else "length")


def test_right_drafts_are_taken_in_one_step(scripted_runner: MakeRunner) -> None:
    runner = scripted_runner([[7, 8, 7, 8, 7, 8, 7, 8, 7]])
    scheduler = Scheduler(1)
    scheduler.join(sequence := new_sequence(prompt_lookup_num_tokens=8))

    while scheduler.running:
        scheduler.update(runner.step(scheduler.plan()))

    assert sequence.written == [7, 8, 7, 8, 7, 8, 7, 8, 7]
    assert len(runner.plans) < 5


def test_the_host_runs_ahead_and_waits_where_it_must(scripted_runner: MakeRunner) -> None:
    runner = scripted_runner([list(range(10, 30))], ahead=1)
    scheduler = Scheduler(1, ahead=1)
    scheduler.join(sequence := new_sequence(out_length=6, window=4))

    lengths = []
    while scheduler.running:
        scheduler.update(runner.step(scheduler.plan()))
        lengths.append(len(sequence.written))

    assert lengths == [0, 1, 2, 4, 4, 6]  # at the window's end and at the text's
    assert sequence.written == [10, 11, 12, 13, 14, 15]


def test_a_callback_that_raises_ends_its_own_sequence_alone(
    scripted_runner: MakeRunner, tiny_tokenizer: PlugTokenizer
) -> None:
    def fail(_: str) -> None:
        raise ConnectionError("gone")

    mountain = tiny_tokenizer.encode("山")
    broken = new_sequence(detokenizer=Detokenizer(tiny_tokenizer, fail))
    other = new_sequence(detokenizer=Detokenizer(tiny_tokenizer))
    runner = scripted_runner([mountain * 9, mountain * 9])
    scheduler = Scheduler(2)
    scheduler.join(broken)
    scheduler.join(other)

    assert scheduler.update(runner.step(scheduler.plan())) == [broken]
    while scheduler.running:
        scheduler.update(runner.step(scheduler.plan()))

    assert isinstance(broken.error, ConnectionError)
    assert other.written == mountain * 9
    assert other.error is None


@pytest.mark.parametrize("ahead", [0, 1])
def test_a_stop_string_ends_the_sequence(
    ahead: int, scripted_runner: MakeRunner, tiny_tokenizer: PlugTokenizer
) -> None:
    ids = tiny_tokenizer.encode("山上有庙，好")
    sequence = new_sequence(detokenizer=Detokenizer(tiny_tokenizer, stop=["庙，"]))
    runner = scripted_runner([[*ids, *ids]])
    scheduler = Scheduler(1, ahead=ahead)
    scheduler.join(sequence)

    while scheduler.running:
        scheduler.update(runner.step(scheduler.plan()))

    assert sequence.detokenizer is not None
    assert sequence.detokenizer.text == "山上有"
    assert sequence.written == ids[:-1]
    assert sequence.finish_reason == "stop"

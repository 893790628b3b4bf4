"""What CUDA changes in the loop, on the CPU: the host a step behind, and rounded lengths."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from plug.generation.model_runner import Engine
from plug.generation.scheduler import Row, Writer, write
from plug.generation.settings import GenerationSettings
from plug.generation.window import OriginalRules, PlugRules, Rules
from plug.model.plug import Plug

PROMPTS = [[9, 8, 7], [200] * 40, [30, 31], [77], [5, 6]]


def make_rows(model: Plug) -> list[Row]:
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
    return [Row(prompt, rule, each, seed) for seed, (prompt, rule, each) in enumerate(parts)]


@torch.inference_mode()
def write_in_flight(engine: Engine, rows: list[Row], ahead: int) -> list[tuple[object, ...]]:
    """Two rows at a time; the next joins when one leaves."""
    writer = Writer(engine, 2, 96)
    writer._ahead = ahead
    waiting = list(rows)
    while waiting or writer.rows:
        while waiting and len(writer.rows) < 2:
            writer.join(waiting.pop(0))
        writer.step()
    return [(row.written, row.finish_reason) for row in rows]


@pytest.fixture
def ending_model(lively_model: Plug) -> Plug:
    """[SEP] is another token, one that it does write."""
    lively_model.config = dataclasses.replace(lively_model.config, eos_token_id=50)
    return lively_model


@pytest.mark.parametrize("ahead", [0, 1, 2])
@pytest.mark.parametrize("granularity", [1, 64])
@pytest.mark.parametrize("rows", [1, 4])
def test_a_host_that_reads_late_and_rounded_lengths_and_rows_change_nothing(
    ahead: int, granularity: int, rows: int, ending_model: Plug, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = []
    for row in make_rows(ending_model):
        alone += write_in_flight(Engine(ending_model), [row], ahead=0)
    engine = Engine(ending_model)
    engine._model.granularity = granularity
    monkeypatch.setattr(engine, "rounded", lambda count: -(-count // rows) * rows)

    together = write_in_flight(engine, make_rows(ending_model), ahead)

    assert together == alone
    assert {reason for _, reason in together} == {"stop", "length"}


@torch.inference_mode()
def test_the_buffers_serve_again_while_they_have_room(ending_model: Plug) -> None:
    def fresh() -> list[Row]:
        return make_rows(ending_model)

    def written(rows: list[Row]) -> list[list[int]]:
        return [row.written for row in rows]

    alone = fresh()
    for row in alone:
        write(Engine(ending_model), [row])
    engine = Engine(ending_model)

    first = write(engine, three := fresh()[:3])
    second = write(engine, two := fresh()[1:3], first)
    third = write(engine, more := fresh(), second)
    engine.start([[2, 3]], capacity=4)  # somebody else
    fourth = write(engine, again := fresh(), third)

    assert second is first
    assert third is not second
    assert fourth is not third
    assert written(three) == written(alone[:3])
    assert written(two) == written(alone[1:3])
    assert written(more) == written(again) == written(alone)


@torch.inference_mode()
def test_what_was_broken_off_is_not_gone_on_with(ending_model: Plug) -> None:
    engine = Engine(ending_model)
    first = write(engine, make_rows(ending_model)[:1])
    assert first is not None
    first.join(make_rows(ending_model)[0])
    first.step()

    assert write(engine, make_rows(ending_model)[:1], first) is not first

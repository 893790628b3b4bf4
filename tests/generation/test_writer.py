"""What CUDA changes in the loop, on the CPU: the host a step behind, and rounded lengths."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from plug.generation.engine import Engine
from plug.generation.settings import GenerationSettings
from plug.generation.window import OriginalRules, PlugRules, Rules
from plug.generation.writer import Row, Writer
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
def test_a_host_that_reads_late_and_rounded_lengths_change_nothing(
    ahead: int, granularity: int, ending_model: Plug
) -> None:
    alone = []
    for row in make_rows(ending_model):
        alone += write_in_flight(Engine(ending_model), [row], ahead=0)
    engine = Engine(ending_model)
    engine._model.granularity = granularity

    together = write_in_flight(engine, make_rows(ending_model), ahead)

    assert together == alone
    assert {reason for _, reason in together} == {"stop", "length"}

"""How many layers a run computes again, and what is said of a card that is too small."""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from plug.errors import PlugError, UsageError
from plug.loading import estimate
from plug.loading.estimate import OVERHEAD_BYTES
from plug.model.accounting import total
from plug.model.configuration import PRESETS, PlugConfig
from plug.model.plug import Plug
from plug.pretraining import memory
from plug.pretraining.fp8 import multiply_in_fp8
from plug.pretraining.memory import fewest_recomputed, need_of, recomputed_layers, trainings
from plug.pretraining.settings import RunConfig

Make = Callable[..., RunConfig]
CARD = 80 * 10**9


@pytest.fixture
def large(settings: Make) -> Callable[..., RunConfig]:
    """Stage 2 of the 27B's shape over some cards."""

    def make(**changes: Any) -> RunConfig:
        made = {"shapes": [[512, 512, 1.0], [256, 128, 1.0]], "precision": "bf16"}
        made |= {"batch_tokens": 4_194_304, "micro_batch_tokens": 8192, "optimizer": "adamw8bit"}
        return settings(**(made | {"preset": "27b"} | changes))

    return make


def test_steps_are_those_that_the_loop_takes(large: Make) -> None:
    first, second = trainings(large(), 2, world_size=64, cards=64, recomputed=3)
    assert (first.batch_size, first.source_length, first.target_length) == (8, 512, 512)
    assert (second.batch_size, second.source_length, second.target_length) == (22, 256, 128)
    assert first.accumulates
    assert (first.cards, first.recomputed, first.optimizer) == (64, 3, "adamw8bit")
    (only,) = trainings(
        large(shapes=[[512, 1.0]], batch_tokens=8192), 1, world_size=2, cards=2, recomputed=0
    )
    assert (only.batch_size, only.accumulates, only.target_length) == (8, False, 0)
    assert only.masked_share == pytest.approx(0.2)


# On H100s (docs/devices.md): stage of the recipe, cards, GB at the peak of one.
COMPILED = [(1, 1, 38.33), (2, 1, 40.87), (2, 2, 20.91)]


@pytest.mark.parametrize(("stage", "cards", "measured"), COMPILED)
def test_a_compiled_run_takes_what_was_measured(stage: int, cards: int, measured: float) -> None:
    recipe = Path(__file__).parents[2] / "configs" / f"mini-stage{stage}.toml"
    run = RunConfig(**tomllib.loads(recipe.read_text(encoding="utf-8")))
    need = need_of(PRESETS[run.preset], run, stage, cards, 1, 0)
    assert need / 1e9 == pytest.approx(measured, rel=0.03)


def test_a_compiled_run_that_does_not_fit_is_told_a_smaller_part(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = Path(__file__).parents[2] / "configs" / "mini-stage2.toml"
    run = RunConfig(**tomllib.loads(recipe.read_text(encoding="utf-8")))
    where: dict[str, Any] = {"device": torch.device("cuda"), "world_size": 1, "cards": 1}
    monkeypatch.setattr(memory, "free_memory", lambda _: 48 * 10**9)
    assert recomputed_layers(PRESETS["mini"], run, 2, **where) == 0
    monkeypatch.setattr(memory, "free_memory", lambda _: 24 * 10**9)
    with pytest.raises(PlugError, match="可以用：micro_batch_tokens=131072；") as caught:
        recomputed_layers(PRESETS["mini"], run, 2, **where)
    assert "recomputation" not in str(caught.value)


def test_the_fewest_layers_that_fit_are_recomputed(large: Make) -> None:
    config, run = PRESETS["27b"], large(micro_batch_tokens=16384)
    found = fewest_recomputed(config, run, 2, CARD, world_size=64, cards=64)
    assert found is not None
    assert 0 < found < 30
    needs = [need_of(config, run, 2, 64, 64, count) for count in (found - 1, found)]
    assert needs[1] + OVERHEAD_BYTES <= CARD < needs[0] + OVERHEAD_BYTES
    assert fewest_recomputed(config, run, 2, 10 * CARD, world_size=64, cards=64) == 0
    assert fewest_recomputed(config, run, 2, CARD, world_size=2, cards=2) is None
    for asked, fits in ((found, True), (found - 1, False)):
        given = replace(run, recomputation=asked)
        answer = fewest_recomputed(config, given, 2, needs[1], world_size=64, cards=64)
        assert answer == (asked if fits else None)


def test_a_card_that_is_too_small_is_one_sentence(
    large: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def told(config: PlugConfig, run: RunConfig, cards: int, room: int = CARD) -> str:
        monkeypatch.setattr(memory, "free_memory", lambda _: room)
        properties = type("Properties", (), {"total_memory": room + 2 * OVERHEAD_BYTES})
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
        options: dict[str, Any] = {"world_size": cards, "cards": cards}
        with pytest.raises(PlugError) as caught:
            recomputed_layers(config, run, 2, torch.device("cuda"), **options)
        return str(caught.value)

    whole = PRESETS["27b"]
    message = told(whole, large(optimizer="adamw"), 2)
    assert "重算全部 30 层" in message
    assert "parallel.sharding=fsdp，8 张这样的卡" in message
    assert "micro_batch_tokens" not in message  # would not do
    message = told(whole, large(micro_batch_tokens=524_288), 16)
    assert "micro_batch_tokens=" in message
    message = told(whole, large(recomputation=0, micro_batch_tokens=16384), 64)
    assert "（重算 0 层，一次至多 16384 个词元），可用 80.0 GB。" in message
    assert '可以用：recomputation="auto"' in message
    few = replace(whole, num_hidden_layers=4, num_decoder_layers=1)
    assert 'optimizer="adamw8bit"' in told(few, large(optimizer="adamw"), 1, 75 * 10**9)
    assert "请换显存更大的卡" in told(whole, large(), 64, 10**9)


def test_a_cpu_recomputes_what_is_asked_for(settings: Make) -> None:
    options: dict[str, Any] = {"world_size": 1, "cards": 1}
    cpu, test = torch.device("cpu"), PRESETS["test"]
    assert recomputed_layers(test, settings(), 1, cpu, **options) == 0
    assert recomputed_layers(test, settings(recomputation=2), 1, cpu, **options) == 2
    for wrong in (-1, True, "all", 1.5):
        with pytest.raises(UsageError, match="recomputation="):
            settings(recomputation=wrong)


def test_what_fp8_products_keep_is_as_predicted() -> None:
    """In float32 on a CPU, the layers alone: what autograd keeps, beside the formula."""
    torch.manual_seed(0)
    config = replace(
        PRESETS["test"], num_hidden_layers=2, num_decoder_layers=0,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model = Plug(config)
    ids = torch.randint(5, 100, (4, 32))
    embedded = model.embeddings(ids).detach().requires_grad_()

    def kept() -> int:
        sizes: dict[int, int] = {}

        def pack(x: torch.Tensor) -> torch.Tensor:
            sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            model.encoder(embedded, None)
        weights = {x.untyped_storage().data_ptr() for x in model.parameters()}
        return sum(size for place, size in sizes.items() if place not in weights)

    before = kept()
    multiply_in_fp8(model)
    after = kept()
    tokens, hidden, inner = 128, config.hidden_size, config.intermediate_size
    # Inputs of queries, keys and values, of fc1, and of fc2, in float32; then in FP8, and that of
    # the output projection, which attention keeps as well; a float32 scale a column.
    gone = tokens * 4 * (2 * hidden + inner)
    come = (tokens + 4) * (3 * hidden + inner)
    assert before - after == 2 * (gone - come)


@pytest.mark.slow
@pytest.mark.parametrize("tensor", [1, 2])
def test_what_a_layer_takes_of_two_processes_is_as_predicted(
    tensor: int, run_together: Callable[..., list[Any]]
) -> None:
    """In float32 without dropout: a layer more in either half, with and without tensor parallelism.

    Each process has half of the weights either way, but that biases and norms are on both; with
    tensor parallelism it also keeps half of what is inside of attention and feed-forward.
    """
    kept, predicted = [], []
    for layers in (1, 2):
        config = replace(PRESETS["test"], num_hidden_layers=layers, num_decoder_layers=layers)
        training = estimate.Training(
            batch_size=3, source_length=11, target_length=11, half=False, dropout=False,
            cards=2, tensor=tensor,
        )  # fmt: skip
        held = run_together(2, "held_for_a_step", tensor=tensor, layers=layers)
        whole = 4 * total(config).parameters
        assert all(each["weights"] == pytest.approx(whole / 2, rel=0.02) for each in held)
        kept.append([each["kept"] for each in held])
        predicted.append(sum(block.kept for block in estimate._blocks(config, training)))
    grown = predicted[1] - predicted[0]
    assert [after - before for before, after in zip(*kept, strict=True)] == [grown, grown]


@pytest.mark.slow
def test_layers_that_stay_gathered_are_predicted(
    run_together: Callable[..., list[Any]],
) -> None:
    """`reshard_after_forward = false`, over two processes: each holds the other's half as well."""
    asked = {"tensor": 1, "layers": 2}
    kept, freed = (
        run_together(2, "held_for_a_step", reshards=reshards, **asked) for reshards in (False, True)
    )
    grown = sum(each["after"] for each in kept) - sum(each["after"] for each in freed)
    config = replace(PRESETS["test"], num_hidden_layers=2, num_decoder_layers=2)
    training = estimate.Training(
        batch_size=3, source_length=11, target_length=11, half=False, cards=2, reshards=False
    )
    blocks = list(estimate._blocks(config, training))
    assert grown == sum(estimate._with_layer(x, training).kept - x.kept for x in blocks)


def test_tensor_parallelism_takes_less_where_the_same_cards_share_data(large: Make) -> None:
    """A group of two has twice the rows of a card; a card of it takes less than for those alone."""
    config, asked = PRESETS["27b"], large(parallel={"tensor": 2}, batch_tokens=65536)
    tensor, data = (need_of(config, x, 2, 4, 8, 0) for x in (asked, replace(asked, parallel={})))
    assert tensor < 0.8 * data

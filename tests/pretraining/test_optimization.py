"""Schedules at known points; which weights get which optimizer and which decay."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable

import pytest
import torch
from torch import nn

from plug.errors import UsageError
from plug.model.plug import Plug
from plug.pretraining.optimization import build_optimizers, learning_rate_scale


@pytest.mark.parametrize(
    ("schedule", "at"),
    [
        ("linear", {0: 0.1, 4: 0.5, 9: 1.0, 10: 1.0, 55: 0.5, 99: 1 / 90}),
        (
            "cosine",
            {0: 0.1, 9: 1.0, 10: 1.0, 55: 0.5, 40: 0.75, 99: (1 - math.cos(math.pi / 90)) / 2},
        ),
        ("constant", {0: 0.1, 9: 1.0, 10: 1.0, 55: 1.0, 99: 1.0}),
    ],
)
def test_schedules_at_known_points(schedule: str, at: dict[int, float]) -> None:
    for step, scale in at.items():
        assert learning_rate_scale(step, 100, 10, schedule) == pytest.approx(scale), step


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_no_step_is_taken_with_a_rate_of_zero(schedule: str) -> None:
    for steps, warmup in ((1, 0), (1, 1), (7, 0), (7, 7), (50, 5)):
        scales = [learning_rate_scale(step, steps, warmup, schedule) for step in range(steps)]
        assert min(scales) > 0
        assert max(scales) == 1
        assert scales[: warmup or 1] == sorted(scales[: warmup or 1])
        assert scales[warmup:] == sorted(scales[warmup:], reverse=True)


def test_unknown_names() -> None:
    with pytest.raises(UsageError, match="schedule='step'"):
        learning_rate_scale(5, 10, 0, "step")
    with pytest.raises(UsageError, match="optimizer='sgd'"):
        build(nn.Linear(2, 2), "sgd")


def build(model: nn.Module, name: str) -> list[torch.optim.Optimizer]:
    return build_optimizers(
        model, name=name, learning_rate=0.1, betas=(0.8, 0.95), weight_decay=0.3
    )


def names_of(model: nn.Module, parameters: list[nn.Parameter]) -> set[str]:
    known = {id(parameter): name for name, parameter in model.named_parameters()}
    return {known[id(parameter)] for parameter in parameters}


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_each_weight_is_in_one_group_and_matrices_alone_decay(name: str, tiny_model: Plug) -> None:
    optimizers = build(tiny_model, name)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    grouped = [parameter for group in groups for parameter in group["params"]]
    assert len(grouped) == len({id(parameter) for parameter in grouped})
    assert names_of(tiny_model, grouped) == {key for key, _ in tiny_model.named_parameters()}
    for group in groups:
        dimensions = {parameter.ndim for parameter in group["params"]}
        assert dimensions == ({2} if group["weight_decay"] else {1})
        assert group["weight_decay"] in (0.0, 0.3)
        assert group["lr"] == 0.1
    assert groups[0]["betas"] == (0.8, 0.95)


def test_muon_takes_the_matrices_of_the_layers_and_adamw_the_rest(tiny_model: Plug) -> None:
    adamw, muon = build(tiny_model, "muon")
    assert isinstance(adamw, torch.optim.AdamW)
    assert isinstance(muon, torch.optim.Muon)
    (group,) = muon.param_groups
    matrices = names_of(tiny_model, group["params"])
    decoder_layer = {
        f"decoder.layers.0.{attention}.{part}_proj.weight"
        for attention in ("self_attention", "cross_attention")
        for part in ("q", "k", "v", "out")
    } | {f"decoder.layers.0.feed_forward.fc{number}.weight" for number in (1, 2)}
    assert decoder_layer <= matrices
    assert "encoder.layers.1.attention.q_proj.weight" in matrices
    assert {name.split(".")[0] for name in matrices} == {"encoder", "decoder"}
    left = names_of(tiny_model, adamw.param_groups[0]["params"])
    assert {"embeddings.word_embeddings.weight", "mlm_head.dense.weight"} <= left


@pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="needs torchao")
def test_eight_bits_are_for_all_matrices(tiny_model: Plug) -> None:
    adamw, eight = build(tiny_model, "adamw8bit")
    assert {p.ndim for group in adamw.param_groups for p in group["params"]} == {1}
    (group,) = eight.param_groups
    assert group["weight_decay"] == 0.3
    matrices = {name for name, p in tiny_model.named_parameters() if p.ndim == 2}
    assert names_of(tiny_model, group["params"]) == matrices


def test_frozen_weights_are_left_out(tiny_model: Plug) -> None:
    tiny_model.sentence_head.requires_grad_(False)
    (optimizer,) = build(tiny_model, "adamw")
    grouped = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert not any(name.startswith("sentence") for name in names_of(tiny_model, grouped))


def test_a_step_of_adamw_by_hand() -> None:
    """Decoupled decay, then the bias-corrected moments: Loshchilov & Hutter 2019, algorithm 2."""
    model = nn.Linear(1, 1)
    nn.init.constant_(model.weight, 2.0)
    (optimizer,) = build(model, "adamw")
    weight, first, second = 2.0, 0.0, 0.0
    for step, gradient in enumerate((0.5, -1.0), start=1):
        model.weight.grad = torch.full((1, 1), gradient)
        optimizer.step()
        first = 0.8 * first + 0.2 * gradient
        second = 0.95 * second + 0.05 * gradient**2
        weight -= 0.1 * 0.3 * weight
        weight -= 0.1 * (first / (1 - 0.8**step)) / ((second / (1 - 0.95**step)) ** 0.5 + 1e-8)
        assert model.weight.item() == pytest.approx(weight, rel=1e-5)


def test_a_step_of_adamw_takes_as_many_operations_for_many_weights(
    count_operations: Callable[[Callable[[], object]], int],
) -> None:
    """Their number is that of the groups: matrices and vectors."""
    counts = []
    for layers in (1, 20):
        model = nn.Sequential(*(nn.Linear(3, 2) for _ in range(layers)))
        (optimizer,) = build(model, "adamw")
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()  # makes the states
        counts.append(count_operations(optimizer.step))
    assert counts[0] == counts[1]

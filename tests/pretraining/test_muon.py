"""Muon on stacked matrices against `torch.optim.Muon`, and against singular values."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from plug.pretraining import muon
from plug.pretraining.muon import Muon, orthogonalize

SHAPES = [(16, 16)] * 5 + [(16, 40)] * 3 + [(40, 16)] * 2 + [(24, 24)]
SETTINGS: dict[str, Any] = {"lr": 0.02, "weight_decay": 0.1, "adjust_lr_fn": "match_rms_adamw"}


def parameters() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def step_both(ours: torch.optim.Optimizer, theirs: torch.optim.Optimizer, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    groups = (each.param_groups[0]["params"] for each in (ours, theirs))
    for one, other in zip(*groups, strict=True):
        one.grad = torch.randn(one.shape, generator=generator)
        other.grad = one.grad.clone()
    ours.step()
    theirs.step()


@pytest.mark.parametrize("most_stacked", [1, 16 * 40 * 2, 2**26])
def test_steps_are_those_of_torch(most_stacked: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(muon, "MOST_STACKED", most_stacked)
    mine, reference = parameters(), parameters()
    ours, theirs = Muon(mine, **SETTINGS), torch.optim.Muon(reference, **SETTINGS)
    for seed in range(4):
        step_both(ours, theirs, seed)
    for one, other in zip(mine, reference, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-3)  # the products are in bf16


def test_the_saved_state_is_that_of_torch() -> None:
    mine, reference = parameters(), parameters()
    ours, theirs = Muon(mine, **SETTINGS), torch.optim.Muon(reference, **SETTINGS)
    step_both(ours, theirs, 0)
    saved, expected = ours.state_dict(), theirs.state_dict()
    assert saved["param_groups"] == expected["param_groups"]
    assert saved["state"].keys() == expected["state"].keys()
    for index, state in expected["state"].items():
        torch.testing.assert_close(saved["state"][index], state)
    theirs.load_state_dict(saved)  # and the reverse: an earlier checkpoint goes on
    ours.load_state_dict(expected)


def test_weights_without_a_gradient_stay() -> None:
    mine = parameters()
    optimizer = Muon(mine, **SETTINGS)
    mine[3].grad = torch.ones_like(mine[3])
    before = [each.detach().clone() for each in mine]
    optimizer.step()
    changed = [
        index
        for index, (one, other) in enumerate(zip(mine, before, strict=True))
        if not torch.equal(one, other)
    ]
    assert changed == [3]


def test_singular_values_come_near_to_one() -> None:
    """The quintic's slope at 0 is steep and it never settles: 0.7 to 1.2 is where it stays."""
    stack = torch.randn(3, 12, 30, generator=torch.Generator().manual_seed(1))
    flat = orthogonalize(stack.bfloat16(), (3.4445, -4.7750, 2.0315), 5, 1e-7).float()
    values = torch.linalg.svdvals(flat)
    assert values.min() > 0.6
    assert values.max() < 1.3

"""8-bit AdamW against torchao's own on whole weights, its state, and what is refused."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from plug.errors import PlugError, UsageError
from plug.loading.load import load
from plug.pretraining import adamw8bit
from plug.pretraining.adamw8bit import AdamW8bit
from plug.pretraining.record import read_rows
from plug.pretraining.run import pretrain
from plug.pretraining.settings import RunConfig

Make = Callable[..., RunConfig]
SHAPES = [(16, 256), (33, 512), (24, 768)]
SETTINGS: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8}
needs_torchao = pytest.mark.skipif(
    importlib.util.find_spec("torchao") is None, reason="torchao is not installed"
)


def parameters() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def ours(weights: list[nn.Parameter]) -> AdamW8bit:
    return AdamW8bit([{"params": weights, "weight_decay": 0.1}], **SETTINGS)


def step(optimizer: torch.optim.Optimizer, weights: list[nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for weight in weights:
        weight.grad = torch.randn(weight.shape, generator=generator)
    optimizer.step()


@needs_torchao
@pytest.mark.parametrize("elements", [2**10, 2**24])
def test_steps_are_those_of_torchao(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchao.optim import AdamW8bit as Theirs

    monkeypatch.setattr(adamw8bit, "_ELEMENTS_AT_ONCE", elements)
    mine, reference = parameters(), parameters()
    optimizers = ours(mine), Theirs(reference, weight_decay=0.1, **SETTINGS)
    with torch.compiler.set_stance("force_eager"):
        for seed in range(4):
            for optimizer, weights in zip(optimizers, (mine, reference), strict=True):
                step(optimizer, weights, seed)
    for one, other in zip(mine, reference, strict=True):
        assert torch.equal(one, other)


@needs_torchao
def test_eight_bits_stay_near_thirty_two() -> None:
    """200 steps on a quadratic: both optimisers come as near to its minimum."""
    generator = torch.Generator().manual_seed(1)
    aim = torch.randn(16, 256, generator=generator)
    left = []
    for make in (ours, lambda w: torch.optim.AdamW(w, weight_decay=0.1, **SETTINGS)):
        weight = nn.Parameter(torch.zeros(16, 256))
        optimizer = make([weight])
        for _ in range(200):
            weight.grad = weight.detach() - aim
            optimizer.step()
        left.append(float((weight.detach() - aim).square().mean()))
    assert left[0] == pytest.approx(left[1], rel=0.02)
    assert left[0] < 0.2


@needs_torchao
def test_a_state_goes_on_and_has_integers() -> None:
    mine = parameters()
    first = ours(mine)
    step(first, mine, 0)
    mine[1].grad = None  # stays as it is
    before = mine[1].clone()
    first.step()
    assert torch.equal(mine[1], before)
    saved = first.state_dict()
    assert saved["state"][0]["exp_avg_codes"].dtype == torch.uint8
    assert [float(saved["state"][index]["step"]) for index in range(3)] == [2, 1, 2]
    weights = [nn.Parameter(weight.detach().clone()) for weight in mine]
    second = ours(weights)
    second.load_state_dict(saved)
    for seed in (1, 2):
        step(first, mine, seed)
        step(second, weights, seed)
    for one, other in zip(mine, weights, strict=True):
        assert torch.equal(one, other)


@needs_torchao
def test_blocks_lie_inside_of_rows() -> None:
    state = ours([nn.Parameter(torch.zeros(5, 96))]).state
    assert not state
    weight = nn.Parameter(torch.zeros(5, 96))
    assert ours([weight]).state_of(weight)["exp_avg_scale"].shape == (5, 3)
    with pytest.raises(UsageError, match=r"是 32 的倍数，现在有一个是 48"):
        ours([nn.Parameter(torch.zeros(5, 48))])


def test_a_run_needs_torchao(settings: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UsageError, match=r"要用 torchao.*pip install"):
        pretrain(1, settings(optimizer="adamw8bit"), device="cpu")


@needs_torchao
def test_an_interrupted_run_ends_as_an_unbroken_one(settings: Make, tmp_path: Path) -> None:
    whole = settings(output=str(tmp_path / "whole"), optimizer="adamw8bit", steps=5)
    pretrain(1, whole, device="cpu")
    made = settings(optimizer="adamw8bit", steps=5, checkpoint_every=3)
    pretrain(1, made, device="cpu")
    rows = read_rows(tmp_path / "run" / "log.csv")
    assert rows[-1]["mlm"] < rows[0]["mlm"]
    (tmp_path / "run" / "model").rename(tmp_path / "done")
    pretrain(1, made, resume=True, device="cpu")
    expected = load(tmp_path / "whole" / "model").state_dict()
    found = load(tmp_path / "run" / "model").state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)

    path = tmp_path / "run" / "checkpoint" / "training_state.pt"
    values = torch.load(path, weights_only=True)
    state = values["optimizers"][1]["state"][0]
    state["exp_avg_codes"] = state["exp_avg_codes"].float()
    torch.save(values, path)
    (tmp_path / "run" / "model").rename(tmp_path / "again")
    with pytest.raises(PlugError, match="优化器的状态与参数的形状不符"):
        pretrain(1, made, resume=True, device="cpu")


@needs_torchao
def test_a_mesh_that_cuts_a_block_is_refused(
    settings: Make, run_together: Callable[..., list[Any]]
) -> None:
    made = settings(optimizer="adamw8bit", parallel={"tensor": 2})
    told = run_together(2, "failing", stage=1, settings=asdict(made))
    assert all("共用一个尺度，而 parallel.tensor 把" in each for each in told)

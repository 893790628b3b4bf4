"""Products in FP8 against float32 autograd, emulated on a CPU; what they keep; what is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from plug.errors import UsageError
from plug.finetuning import plain_training
from plug.model.configuration import PRESETS
from plug.model.plug import Plug
from plug.pretraining.fp8 import Fp8Linear, check_fp8, multiply_in_fp8
from plug.pretraining.record import read_rows
from plug.pretraining.run import pretrain
from plug.pretraining.settings import RunConfig

Make = Callable[..., RunConfig]
# Three bits of fraction: an error of 1/16 at most for each factor, about 0.026 as a mean square.
TOLERANCE = 0.05


def apart(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The error's norm as a share of the norm."""
    return float((found.detach() - expected).norm() / expected.norm())


def both(rows: int, inputs: int, outputs: int) -> tuple[nn.Linear, nn.Linear, torch.Tensor]:
    torch.manual_seed(0)
    exact = nn.Linear(inputs, outputs)
    rounded = nn.Linear(inputs, outputs)
    rounded.load_state_dict(exact.state_dict())
    rounded.__class__ = Fp8Linear
    return exact, rounded, torch.randn(2, rows, inputs)


@pytest.mark.parametrize("rows", [5, 32])
def test_products_and_gradients_are_near_those_in_float32(rows: int) -> None:
    """Rows and columns of very different sizes: each has a unit of its own."""
    exact, rounded, x = both(rows, 64, 48)
    x *= torch.logspace(-3, 3, rows)[:, None]
    weights = torch.randn(2, rows, 48)
    found = []
    for layer in (exact, rounded):
        own = x.clone().requires_grad_()
        y = layer(own)
        (y * weights).sum().backward()
        assert own.grad is not None
        assert layer.weight.grad is not None
        assert layer.bias.grad is not None
        found.append((y.detach(), own.grad, layer.weight.grad, layer.bias.grad))
    assert torch.equal(found[0][3], found[1][3]) or apart(found[1][3], found[0][3]) < 1e-6
    for ours, theirs in zip(found[1][:3], found[0][:3], strict=True):
        assert 1e-3 < apart(ours, theirs) < TOLERANCE
    each = (found[1][0] - found[0][0]).norm(dim=-1) / found[0][0].norm(dim=-1)
    assert each.max() < 0.08


def test_numbers_that_fp8_has_are_multiplied_exactly() -> None:
    exact, rounded, x = both(16, 32, 16)
    x = torch.randint(-7, 8, x.shape).float() * 64  # with 448 in every row and column
    x[..., 0, :], x[..., :, 0] = 448.0, 448.0
    gradient = torch.randint(-7, 8, (2, 16, 16)).float() * 64
    gradient[..., 0, :], gradient[..., :, 0] = 448.0, 448.0
    weight = torch.randint(-7, 8, (16, 32)).float() * 64
    weight[0, :], weight[:, 0] = 448.0, 448.0
    found = []
    for layer in (exact, rounded):
        layer.weight.data.copy_(weight)
        own = x.clone().requires_grad_()
        layer(own).backward(gradient)
        found.append((own.grad, layer.weight.grad, layer.bias.grad))
        layer.zero_grad()
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)


def gradients(model: Plug, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    logits = model.lm_logits(model.decode(ids[:, :9], model.encode(ids)))
    nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:10].flatten()).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_a_whole_model_has_gradients_near_those_in_float32() -> None:
    torch.manual_seed(0)
    model = Plug(PRESETS["test"]).eval()
    ids = torch.randint(5, 100, (3, 17))
    expected = gradients(model, ids)
    multiply_in_fp8(model)
    linears = [part for part in model.modules() if isinstance(part, Fp8Linear)]
    assert len(linears) == 3 * 6 + 2 * 10
    found = gradients(model, ids)
    assert found.keys() == expected.keys()
    of_products = [name for name in found if ".layers." in name and found[name].ndim == 2]
    assert len(of_products) == len(linears)
    for name in of_products:
        assert 1e-3 < apart(found[name], expected[name]) < 0.15, name


def test_one_input_is_rounded_once_and_kept_in_eight_bits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[int] = []
    quantize = plain_training.quantize_columns

    def counted(x: torch.Tensor) -> Any:
        calls.append(x.shape[1])
        return quantize(x)

    monkeypatch.setattr(plain_training, "quantize_columns", counted)
    first, second = (both(8, 32, 32)[1] for _ in range(2))
    x = torch.randn(4, 32, requires_grad=True)
    kept: dict[int, torch.dtype] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.data_ptr()] = tensor.dtype
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = first(x) + second(x)
    assert calls == [32]
    assert sorted(map(str, kept.values())) == ["torch.float32"] * 3 + ["torch.float8_e4m3fn"]
    y.sum().backward()
    with torch.no_grad():  # nothing is kept without gradients; what changed is rounded again
        changed = torch.randn(4, 32)
        before = first(changed)
        changed.add_(1.0)
        assert not torch.equal(first(changed), before)
    assert calls == [32] * 5  # both weights, and the gradient of what each gave


def test_sizes_are_refused() -> None:
    with pytest.raises(UsageError, match="intermediate_size 是 16 的倍数，现在是 72"):
        multiply_in_fp8(Plug(replace(PRESETS["test"], intermediate_size=72)))


def test_a_device_without_fp8_is_refused(
    settings: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = settings(fp8_products=True, precision="bf16")
    with pytest.raises(UsageError, match=r"计算能力 9.0 起.*现在用的是 CPU"):
        pretrain(1, made, device="cpu")
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "A100")
    with pytest.raises(UsageError, match=r"A100 是 8\.0"):
        check_fp8(torch.device("cuda"))
    for changes in ({"precision": "fp32"}, {"precision": "bf16", "compile": True}):
        with pytest.raises(UsageError, match="fp8_products 不能与"):
            settings(fp8_products=True, **changes)


def test_shards_learn_as_bf16_does(
    settings: Make, run_together: Callable[..., list[Any]], tmp_path: Path
) -> None:
    """Two processes, layers recomputed too: losses are near those of bf16, and fall."""
    made = {"precision": "bf16", "steps": 8, "parallel": {"sharding": "fsdp"}, "recomputation": 2}
    rows = []
    for name in ("bf16", "fp8"):
        shared = settings(output=str(tmp_path / name), fp8_products=name == "fp8", **made)
        run_together(2, "pretrain", stage=1, settings=asdict(shared), emulates=True)
        rows.append(read_rows(tmp_path / name / "log.csv"))
    for bf16, fp8 in zip(*rows, strict=True):
        assert fp8["mlm"] == pytest.approx(bf16["mlm"], abs=0.02)
    assert rows[1] != rows[0]
    assert rows[1][-1]["mlm"] < rows[1][0]["mlm"] - 0.1

"""AdamW's step with moments in 8 bits: against PyTorch's, torchao's codes, parts, and in Triton."""

from __future__ import annotations

import importlib.util
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")

from plug.finetuning import adamw8bit
from plug.finetuning.adamw8bit import (
    MOMENTS,
    Step,
    block_of,
    code_limits,
    code_of_zero,
    code_values,
    sum_of_squares,
    update,
)
from plug.finetuning.fused_backward import FusedAdamW8bit

CPU = torch.device("cpu")


def step_of(count: int, **changes: Any) -> Step:
    values: dict[str, Any] = {
        "rate": 1e-2, "weight_decay": 0.1, "betas": (0.9, 0.99), "eps": 1e-8, "limit": 1.0,
        "count": count, "key": 12345 + count, "first": 0,
    }  # fmt: skip
    return Step(**values | changes)


def state_of(weight: Tensor) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    if block := block_of(weight):
        for name, signed in MOMENTS.items():
            zero = code_of_zero(signed)
            state[f"{name}_codes"] = torch.full_like(weight, zero, dtype=torch.uint8)
            state[f"{name}_scale"] = torch.zeros_like(weight[:, ::block], dtype=torch.float32)
        return state
    state = {name: torch.zeros_like(weight, dtype=torch.float32) for name in MOMENTS}
    return state | ({"master": weight.float()} if weight.dtype != torch.float32 else {})


def take(weight: Tensor, gradient: Tensor, state: dict[str, Tensor], step: Step) -> None:
    update(weight, gradient, state, step, sum_of_squares(gradient, state, step) / weight.numel())


def test_moments_in_float32_step_as_adamw_of_pytorch() -> None:
    torch.manual_seed(0)
    ours = [nn.Parameter(torch.randn(shape)) for shape in ((5, 7), (9,), (1, 3))]
    theirs = [nn.Parameter(each.detach().clone()) for each in ours]
    options: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.8, 0.97)}
    optimizers = (
        FusedAdamW8bit(ours, clip_threshold=1e9, **options),
        torch.optim.AdamW(theirs, **options),
    )
    for _ in range(20):
        for mine, other in zip(ours, theirs, strict=True):
            mine.grad = torch.randn(mine.shape)
            other.grad = mine.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(6, 64), (3, 768), (5, 32)])
def test_moments_in_8_bits_step_nearly_as_adamw(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adamw8bit, "_AT_ONCE", 600)  # a few rows at a time
    torch.manual_seed(0)
    before = torch.randn(shape)
    actual, expected, state = before.clone(), nn.Parameter(before.clone()), state_of(before)
    theirs = torch.optim.AdamW([expected], lr=1e-2, weight_decay=0.1, betas=(0.9, 0.99))
    for count in range(1, 21):
        expected.grad = torch.randn(shape)
        take(actual, expected.grad, state, step_of(count, limit=1e9))
        theirs.step()
    # A code is within 7% of what it stands for, in most of the range within 1%.
    apart, moved = (actual - expected.detach()).norm(), (actual - before).norm()
    assert 0 < apart < 0.05 * moved


def test_a_long_update_is_scaled_down() -> None:
    torch.manual_seed(0)
    before = torch.randn(4, 64)
    for limit in (0.5, 2.0):
        weight, state = before.clone(), state_of(before)
        step = step_of(1, weight_decay=0.0, limit=limit)
        take(weight, torch.randn(4, 64), state, step)
        length = (weight - before).square().mean().sqrt() / step.rate
        assert float(length) == pytest.approx(min(limit, 1.0), rel=1e-3)  # the first one's is 1


@pytest.mark.parametrize("signed", [True, False])
def test_codes_are_the_nearest_and_those_of_torchao(signed: bool) -> None:
    values, limits = code_values(signed, CPU), code_limits(signed, CPU)
    assert len(values) == 256
    assert values[code_of_zero(signed)] == 0
    assert torch.equal(torch.bucketize(values, limits), torch.arange(256))
    if importlib.util.find_spec("torchao") is None:
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torchao.optim.quant_utils import create_dynamic_map
    assert torch.equal(values, torch.tensor(create_dynamic_map(signed)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shares_of_a_weight_step_as_the_whole(dtype: torch.dtype) -> None:
    """Rows 0 to 3 and 4 to 6 in two processes: the same values, rounded alike."""
    torch.manual_seed(0)
    whole = torch.randn(7, 64).to(dtype)
    shares = [whole[:4].clone(), whole[4:].clone(), whole[7:].clone()]
    state, states = state_of(whole), [state_of(each) for each in shares]
    for count in range(1, 4):
        gradient = torch.randn(7, 64).to(dtype)
        gradients = gradient.split([4, 3, 0])
        steps = [step_of(count, first=first * 64) for first in (0, 4, 7)]
        sums = [sum_of_squares(*each) for each in zip(gradients, states, steps, strict=True)]
        mean = sum(sums) / whole.numel()
        for each in zip(shares, gradients, states, steps, strict=True):
            update(*each, mean)
        update(whole, gradient, state, steps[0], mean)
        assert torch.equal(whole, torch.cat(shares))
        total = sum_of_squares(gradient, state, steps[0])
        assert float(total) == pytest.approx(
            sum(float(sum_of_squares(*each)) for each in zip(gradients, states, steps, strict=True))
        )


@pytest.mark.parametrize("shape", [(7, 96), (40, 256), (3, 1024), (300,), (5, 7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_do_the_same(
    shape: tuple[int, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton", reason="needs triton, which PyTorch for CUDA brings along")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    plain = torch.randn(shape, device=device).to(dtype)
    fused = plain.clone()
    states = state_of(plain), state_of(fused)
    for count in range(1, 4):
        gradient = torch.randn(shape, device=device).to(dtype) * 10.0 ** (2 - count)
        found = []
        for weight, state, in_kernels in zip((plain, fused), states, (False, True), strict=True):
            monkeypatch.setattr(adamw8bit, "has_kernels", lambda _, answer=in_kernels: answer)
            found.append(sum_of_squares(gradient, state, step_of(count)))
            take(weight, gradient, state, step_of(count, first=2**33 + 17))
        torch.testing.assert_close(*found, rtol=1e-3, atol=1e-4)
    # The last bit of a float32 may decide between two codes, or two neighbours in bfloat16.
    # (Vectors are rounded to the nearest, where Triton's interpreter cuts off.)
    same = {
        name: torch.isclose(x.float(), states[1][name].float()) for name, x in states[0].items()
    }
    if "master" not in same:
        same["weight"] = torch.isclose(plain.float(), fused.float(), rtol=1e-4, atol=1e-6)
    for name, each in same.items():
        assert each.float().mean() > 0.98, name
    torch.testing.assert_close(plain.float(), fused.float(), rtol=2**-7, atol=1e-3)

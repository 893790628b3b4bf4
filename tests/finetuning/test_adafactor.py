"""Adafactor's step against transformers' and, in Triton, against plain PyTorch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")

from transformers import Adafactor

from plug.finetuning import adafactor
from plug.finetuning.adafactor import Step, new_state, random_bits, round_stochastically, update

STEP = Step(rate=1e-2, weight_decay=0.1, decay=0.7, limit=1.0, tiny=1e-30, key=12345)


@pytest.mark.parametrize("shape", [(5, 7), (300, 260), (1, 3), (11,)])
def test_steps_are_those_of_transformers(
    shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adafactor, "_AT_ONCE", 1000)  # a few rows at a time
    torch.manual_seed(0)
    expected = nn.Parameter(torch.randn(shape))
    actual = expected.detach().clone()
    theirs = Adafactor(
        [expected], lr=1e-2, weight_decay=0.1, scale_parameter=False, relative_step=False
    )
    state = new_state(actual)
    for number in range(1, 5):
        # The first gradients are large: their update is over the limit.
        gradient = torch.randn(shape) * 10.0 ** (3 - number)
        expected.grad = gradient.clone()
        theirs.step()
        step = Step(1e-2, 0.1, decay=1 - number**-0.8, limit=1.0, tiny=1e-30, key=0)
        update(actual, gradient, state, step)
        torch.testing.assert_close(actual, expected.detach(), rtol=1e-5, atol=1e-6)


def test_rounding_is_unbiased_and_to_a_neighbour() -> None:
    x = torch.tensor([1.0, 1.001, -1.001, 0.02001, -3e-5, 0.0, 2.0**-130, torch.inf])
    many = x.expand(4000, -1).contiguous()
    rounded = round_stochastically(many, random_bits(many.shape, key=7))

    down = (x.view(torch.int32) & -0x10000).view(torch.float32)
    step = (
        torch.where(x.isinf(), 0.0, ((x.view(torch.int32) | 0xFFFF) + 1).view(torch.float32)) - down
    )
    near = (rounded == down) | (rounded == (down + step).bfloat16())
    assert near[:, :-1].all()
    assert rounded[:, -1].isinf().all()
    # The mean of 4000 roundings is off by at most 5 standard deviations, each below step / 2.
    error = (rounded.float()[:, :-1].mean(0) - x[:-1]).abs()
    assert (error <= 5 * step[:-1].abs() / 2 / 4000**0.5).all()
    assert rounded[:, [0, 5]].eq(x[[0, 5]]).all()  # nothing is cut off


def test_rounding_is_that_of_torchao() -> None:
    quant_utils = pytest.importorskip("torchao.optim.quant_utils")
    x = torch.randn(200, 300)
    many = torch.stack([round_stochastically(x, random_bits(x.shape, key)) for key in range(50)])
    theirs = torch.stack([quant_utils._fp32_to_bf16_sr(x) for _ in range(50)])
    difference = many.float().mean(0) - theirs.float().mean(0)
    spread = 2**-8 * x.abs() / 50**0.5
    assert (difference.abs() <= 6 * spread).all()


def test_random_bits_are_even_and_depend_on_key_and_place() -> None:
    bits = random_bits(torch.Size((400, 500)), key=3)
    assert bits.ge(0).all()
    assert bits.lt(2**16).all()
    share = torch.stack([(bits >> bit & 1).float().mean() for bit in range(16)])
    assert (share - 0.5).abs().max() < 0.006  # 5 standard deviations
    pairs = torch.corrcoef(torch.stack([bits[:, :-1].flatten(), bits[:, 1:].flatten()]).float())
    assert abs(float(pairs[0, 1])) < 0.012
    other = random_bits(torch.Size((400, 500)), key=4)
    assert (
        abs(float(torch.corrcoef(torch.stack([bits.flatten(), other.flatten()]).float())[0, 1]))
        < 0.012
    )
    assert torch.equal(random_bits(torch.Size((100, 500)), key=3, first=300 * 500), bits[300:])


def test_small_steps_add_up_in_bfloat16() -> None:
    weight = torch.full((40, 50), 1.0).bfloat16()
    before = weight.float().mean()
    state = new_state(weight)
    for number in range(100):  # each a 16th of bfloat16's step at 1
        step = Step(5e-4, 0.0, decay=0.5, limit=1.0, tiny=1e-30, key=number)
        update(weight, torch.ones(40, 50).bfloat16(), state, step)
    torch.testing.assert_close(
        before - weight.float().mean(), torch.tensor(0.05), rtol=0.05, atol=0
    )


def test_the_mean_of_many_roundings_is_the_step_without_rounding() -> None:
    torch.manual_seed(0)
    start, gradient = torch.randn(2, 30, 40).bfloat16()
    exact = start.float()
    update(exact, gradient.float(), new_state(exact), STEP)

    seeds = 300
    mean = torch.zeros(30, 40)
    for key in range(seeds):
        weight = start.clone()
        update(weight, gradient, new_state(weight), replace(STEP, key=key))
        mean += weight.float() / seeds
    # 6 standard deviations of a mean of roundings, each off by half a spacing at most
    assert ((mean - exact).abs() <= 6 * 2.0**-8 * exact.abs().clamp(min=1e-3) / seeds**0.5).all()
    assert not torch.equal(mean, exact)


def test_a_vector_in_bfloat16_is_rounded_from_a_float32_copy() -> None:
    weight = torch.ones(10).bfloat16()
    exact = torch.ones(10)
    state, exact_state = new_state(weight), new_state(exact)
    for number in range(20):
        gradient = torch.randn(10).bfloat16()
        step = Step(1e-4, 0.0, decay=0.5, limit=1.0, tiny=1e-30, key=number)
        update(weight, gradient, state, step)
        update(exact, gradient.float(), exact_state, step)
    torch.testing.assert_close(state["master"], exact)
    assert torch.equal(weight, exact.bfloat16())


def test_a_stale_use_of_a_changed_weight_fails() -> None:
    weight = nn.Parameter(torch.randn(3, 3))
    loss = (weight**2).sum()
    update(weight.detach(), torch.ones(3, 3), new_state(weight), STEP)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(5, 7), (130, 1030), (256, 48), (11,), (5000,)])
def test_kernels_do_the_same(
    shape: tuple[int, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton", reason="needs triton, which PyTorch for CUDA brings along")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    plain = torch.randn(shape, device=device).to(dtype)
    fused = plain.clone()
    states: list[dict[str, Any]] = [new_state(plain), new_state(fused)]
    for number in range(3):
        gradient = (torch.randn(shape, device=device) * 10.0 ** (1 - number)).to(dtype)
        for weight, state, in_kernels in zip((plain, fused), states, (False, True), strict=True):
            monkeypatch.setattr(adafactor, "has_kernels", lambda _, answer=in_kernels: answer)
            update(weight, gradient, state, STEP)
    for name, value in states[0].items():
        if isinstance(value, Tensor):
            torch.testing.assert_close(states[1][name], value, rtol=2e-5, atol=1e-7)
    if dtype == torch.bfloat16 and len(shape) == 2:
        # The same random bits: only where float32 itself differs may the rounding. (Vectors are
        # rounded to the nearest, where Triton's interpreter cuts off.)
        assert (fused == plain).float().mean() > 0.98
    tolerance = (
        {"rtol": 2**-7, "atol": 1e-6} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-6}
    )
    torch.testing.assert_close(fused.float(), plain.float(), **tolerance)

"""Adafactor's step on one weight, without an fp32 copy of it: factored second moment, no momentum.

Source: Shazeer and Stern 2018, arXiv:1804.04235, algorithms 4 and 5, with a rate from outside, as
`transformers.Adafactor(scale_parameter=False, relative_step=False)` takes it.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

State = dict[str, Any]  # of one weight, as in `torch.optim`
_AT_ONCE = 2**22  # elements of a weight that are float32 at a time, outside of kernels


@dataclass(frozen=True, slots=True)
class Step:
    """What a step on one weight needs besides the weight.

    Attributes:
        rate: the learning rate.
        weight_decay: the weight is first scaled by 1 - rate * weight_decay.
        decay: share of the second moment that is kept.
        limit: the update is scaled down to this root mean square (times rate) if it is larger.
        tiny: added to squares, so that nothing is divided by 0.
        key: of the random bits that round to bfloat16; 0 … 2**31 - 1.
    """

    rate: float
    weight_decay: float
    decay: float
    limit: float
    tiny: float
    key: int

    @property
    def kept(self) -> float:
        return 1 - self.rate * self.weight_decay


def new_state(weight: Tensor) -> State:
    """Return the state of a weight before its first step; all tensors are float32.

    A matrix has a number for each row and column. A vector has one for each element, and where it
    is not float32 also a float32 copy: norms' weights are near 1, where bfloat16 has steps of
    0.008, and together they are small.
    """
    if weight.ndim == 2:
        rows, columns = (weight.new_zeros(size, dtype=torch.float32) for size in weight.shape)
        return {"step": 0, "row": rows, "column": columns}
    state: State = {"step": 0, "square": torch.zeros_like(weight, dtype=torch.float32)}
    if weight.dtype != torch.float32:
        state["master"] = weight.detach().float()
    return state


@torch.no_grad()
def update(weight: Tensor, gradient: Tensor, state: State, step: Step) -> None:
    """Change ``weight`` (a vector or a matrix, float32 or bfloat16) and its ``state`` in place."""
    gradient = gradient.contiguous()
    if has_kernels(weight):
        _update_in_kernels(weight, gradient, state, step)
    elif weight.ndim == 2:
        _update_matrix(weight, gradient, state, step)
    else:
        _update_vector(weight, gradient, state, step)
    torch.autograd.graph.increment_version(weight)  # kernels do not, and a stale use must fail


def _update_matrix(weight: Tensor, gradient: Tensor, state: State, step: Step) -> None:
    by_row = gradient.new_empty(len(gradient), dtype=torch.float32)
    by_column = gradient.new_zeros(gradient.shape[1], dtype=torch.float32)
    for rows in _some_rows(gradient):
        square = gradient[rows].float().square()
        by_row[rows] = square.mean(1)
        by_column += square.sum(0)
    for moment, mean in ((state["row"], by_row), (state["column"], by_column / len(gradient))):
        moment.mul_(step.decay).add_(mean + step.tiny, alpha=1 - step.decay)
    row = (state["row"] / state["row"].mean()).rsqrt()
    column = state["column"].rsqrt()
    total = by_row.new_zeros(())
    for rows in _some_rows(gradient):
        total += (gradient[rows].float() * row[rows, None] * column).square().sum()
    factor = step.rate / ((total / weight.numel()).sqrt() / step.limit).clamp(min=1)
    for rows in _some_rows(gradient):
        change = gradient[rows].float() * row[rows, None] * column * factor
        value = weight[rows].float() * step.kept - change
        if weight.dtype == torch.bfloat16:
            first = rows.start * weight.shape[1]
            bits = random_bits(value.shape, step.key, first, value.device)
            value = round_stochastically(value, bits)
        weight[rows] = value


def _update_vector(weight: Tensor, gradient: Tensor, state: State, step: Step) -> None:
    square, master = state["square"], state.get("master", weight)
    gradient = gradient.float()
    square.mul_(step.decay).add_(gradient.square() + step.tiny, alpha=1 - step.decay)
    change = gradient * square.rsqrt()
    factor = step.rate / (change.square().mean().sqrt() / step.limit).clamp(min=1)
    master.mul_(step.kept).sub_(change.mul_(factor))
    if master is not weight:
        weight.copy_(master)


def _update_in_kernels(weight: Tensor, gradient: Tensor, state: State, step: Step) -> None:
    from plug.kernels.adafactor import update_matrix, update_vector

    common = {
        "rate": step.rate,
        "decay": step.decay,
        "kept": step.kept,
        "limit": step.limit,
        "tiny": step.tiny,
    }
    if weight.ndim == 2:
        update_matrix(weight, gradient, state["row"], state["column"], key=step.key, **common)
    else:
        master = state.get("master", weight)
        update_vector(weight, master, gradient, state["square"], **common)


def has_kernels(weight: Tensor) -> bool:
    """Return whether the step on ``weight`` is taken by Triton's kernels."""
    return weight.is_cuda and importlib.util.find_spec("triton") is not None


def _some_rows(x: Tensor) -> list[slice]:
    count = max(1, _AT_ONCE // x.shape[1])
    return [slice(first, min(first + count, len(x))) for first in range(0, len(x), count)]


def random_bits(
    shape: torch.Size, key: int, first: int = 0, device: torch.device | None = None
) -> Tensor:
    """Return 16 random bits, as int32, for each of the elements from number ``first`` on.

    They depend on the element's number and on ``key`` alone, so that a resumed run rounds as the
    unbroken one, and kernels as PyTorch.

    Source: the hash "lowbias32" of github.com/skeeto/hash-prospector.
    """
    count = shape.numel()
    bits = torch.arange(first, first + count, device=device).view(shape)
    bits = bits.mul_(0x9E3779B1).bitwise_and_(0xFFFFFFFF).bitwise_xor_(key)
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        bits ^= bits >> shift
        bits = bits.mul_(factor).bitwise_and_(0xFFFFFFFF)
    return (bits ^ (bits >> 16)).bitwise_and_(0xFFFF).int()


def round_stochastically(x: Tensor, bits: Tensor) -> Tensor:
    """Round float32 to bfloat16, away from zero with the probability of the part that is cut off.

    The mean of many roundings is ``x``, so that steps below bfloat16's resolution are not lost.

    Args:
        x: float32.
        bits: int32 of the same shape, each 0 … 65535 alike likely.
    """
    return ((x.view(torch.int32) + bits) & -0x10000).view(torch.float32).bfloat16()

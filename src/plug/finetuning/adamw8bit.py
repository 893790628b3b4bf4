"""AdamW's step on one weight, or on a process's rows of it, with both moments in 8 bits.

A moment is kept as a code of 8 bits for each value and a scale in float32 for a block of values in
a row. The codes are those of `bitsandbytes` and torchao. Weights in bfloat16 are rounded
stochastically, by random bits that depend on the seed, the step, the weight and the place in the
whole weight alone: any number of processes rounds alike, and a resumed run as an unbroken one.
That, and a step without temporary copies of the weight, is what torchao's optimizer has not.

Source: Loshchilov and Hutter 2019, arXiv:1711.05101, algorithm 2; Dettmers et al. 2021,
arXiv:2110.02861, for the moments.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from plug.finetuning.adafactor import has_kernels, random_bits, round_stochastically

BLOCK = 256  # values that share a scale, at most
LEAST_BLOCK = 32
MOMENTS = {"exp_avg": True, "exp_avg_sq": False}  # whether it is signed
_AT_ONCE = 2**22  # elements of a weight that are float32 at a time, outside of kernels


@dataclass(frozen=True, slots=True)
class Step:
    """What a step on one weight needs besides the weight.

    Attributes:
        rate: the learning rate.
        weight_decay: the weight is first scaled by 1 - rate * weight_decay.
        betas: shares of both moments that are kept.
        eps: of the denominator.
        limit: the update is scaled down to this root mean square (times rate) if it is larger.
        count: of this step, from 1.
        key: of the random bits that round to bfloat16; 0 … 2**31 - 1.
        first: number, among all elements of the whole weight, of the first one that is given.
    """

    rate: float
    weight_decay: float
    betas: tuple[float, float]
    eps: float
    limit: float
    count: int
    key: int
    first: int

    @property
    def lost(self) -> float:
        """What weight decay takes from the weight."""
        return self.rate * self.weight_decay

    @property
    def corrections(self) -> tuple[float, float]:
        """What both moments are multiplied by, because they started from 0."""
        return 1 / (1 - self.betas[0] ** self.count), 1 / (1 - self.betas[1] ** self.count)


def block_of(weight: Tensor) -> int:
    """Return how many values of a row share a scale; 0: the moments stay in float32.

    They do of vectors, and of a matrix whose rows have no blocks of 32 values.
    """
    found = math.gcd(weight.shape[1], BLOCK) if weight.ndim == 2 else 0
    return found if found >= LEAST_BLOCK else 0


def sum_of_squares(gradient: Tensor, state: Mapping[str, Tensor], step: Step) -> Tensor:
    """Return the sum of the squares of the update before it is scaled, float32 ().

    Args:
        gradient: of the rows that this process has; float32 or bfloat16.
        state: of those rows; it is not changed.
        step: the step.
    """
    if has_kernels(gradient):
        from plug.kernels import adamw8bit

        tables = _tables(code_values, gradient.device)
        return adamw8bit.squares(gradient, state, tables, _numbers(step)).sum()
    total = torch.zeros((), device=gradient.device)
    for part in _parts(gradient, state):
        total += _direction(*_moved(gradient, state, step, part), step).square().sum()
    return total


def update(
    weight: Tensor,
    gradient: Tensor,
    state: Mapping[str, Tensor],
    step: Step,
    mean_square: Tensor,
) -> None:
    """Change ``weight`` and ``state`` in place.

    Args:
        weight: the rows that this process has, contiguous; float32 or bfloat16.
        gradient: of them.
        state: of them.
        step: the step.
        mean_square: of the update of the whole weight before it is scaled, float32 ().
    """
    if has_kernels(gradient):
        from plug.kernels import adamw8bit

        adamw8bit.update(
            weight, state.get("master"), gradient, state, _tables(code_values, weight.device),
            _tables(code_limits, weight.device), mean_square, numbers=_numbers(step),
            rate=step.rate, lost=step.lost, limit=step.limit, key=step.key, first=step.first,
        )  # fmt: skip
    else:
        _update(weight, gradient, state, step, mean_square)
    torch.autograd.graph.increment_version(weight)  # kernels do not, and a stale use must fail


def _numbers(step: Step) -> dict[str, float]:
    first, second = step.corrections
    return {
        "gained_first": 1 - step.betas[0],
        "gained_second": 1 - step.betas[1],
        "first_by": first,
        "second_by": second,
        "eps": step.eps,
    }


def _tables(
    of: Callable[[bool, torch.device], Tensor], device: torch.device
) -> tuple[Tensor, Tensor]:
    first, second = (of(signed, device) for signed in MOMENTS.values())
    return first, second


def _update(
    weight: Tensor,
    gradient: Tensor,
    state: Mapping[str, Tensor],
    step: Step,
    mean_square: Tensor,
) -> None:
    factor = step.rate / (mean_square.sqrt() / step.limit).clamp(min=1)
    kept_in = state.get("master", weight)
    block = _block(state, gradient)
    for part in _parts(gradient, state):
        moments = _moved(gradient, state, step, part)
        rows = kept_in.view(-1, block)[part]
        value = rows.float() * (1 - step.lost) - _direction(*moments, step) * factor
        for name, moment in zip(MOMENTS, moments, strict=True):
            _keep(state, name, moment, part)
        if kept_in.dtype == torch.bfloat16:
            first = step.first + part.start * block
            bits = random_bits(value.shape, step.key, first, value.device)
            value = round_stochastically(value, bits)
        rows.copy_(value)
    if kept_in is not weight:
        weight.copy_(kept_in)


def _block(state: Mapping[str, Tensor], gradient: Tensor) -> int:
    """Values in a row of what is computed at a time: those of a scale, or all there are."""
    if "exp_avg_codes" not in state:
        return max(1, gradient.numel())
    return gradient.numel() // max(1, state["exp_avg_scale"].numel()) or 1


def _parts(gradient: Tensor, state: Mapping[str, Tensor]) -> Iterator[slice]:
    block = _block(state, gradient)
    rows = gradient.numel() // block
    count = max(1, _AT_ONCE // block)
    for first in range(0, rows, count):
        yield slice(first, min(first + count, rows))


def _moved(
    gradient: Tensor, state: Mapping[str, Tensor], step: Step, part: slice
) -> tuple[Tensor, Tensor]:
    """Both moments after this step, float32 (rows, block); the state is not changed."""
    block = _block(state, gradient)
    values = gradient.reshape(-1, block)[part].float()
    first, second = (_kept(state, name, part, block) for name in MOMENTS)
    return (
        first.lerp(values, 1 - step.betas[0]),
        second.lerp(values.square(), 1 - step.betas[1]),
    )


def _kept(state: Mapping[str, Tensor], name: str, part: slice, block: int) -> Tensor:
    if name in state:
        return state[name].view(-1, block)[part]
    codes = state[f"{name}_codes"].view(-1, block)[part]
    table = code_values(MOMENTS[name], codes.device)
    return table[codes.int()] * state[f"{name}_scale"].view(-1, 1)[part]


def _keep(state: Mapping[str, Tensor], name: str, moment: Tensor, part: slice) -> None:
    if name in state:
        state[name].view(moment.shape).copy_(moment)
        return
    scale = moment.abs().amax(1)
    between = code_limits(MOMENTS[name], moment.device)
    # The smallest divisor: a block of zeros has the code of 0.
    codes = torch.bucketize(moment / scale.clamp(min=1e-30)[:, None], between)
    state[f"{name}_codes"].view(-1, moment.shape[1])[part] = codes.byte()
    state[f"{name}_scale"].view(-1)[part] = scale


def _direction(first: Tensor, second: Tensor, step: Step) -> Tensor:
    """The update before it is scaled, from both moments."""
    first_by, second_by = step.corrections
    return first * first_by / ((second * second_by).sqrt() + step.eps)


@cache
def code_values(signed: bool, device: torch.device) -> Tensor:
    """Return what each of the 256 codes stands for, as a share of the block's largest value.

    Source: Dettmers et al. 2021, arXiv:2110.02861, section 1.3: dynamic trees. Each of seven powers
    of ten is divided evenly, the larger the finer. Numerically those of `bitsandbytes`.
    """
    values = [0.0, 1.0]
    for exponent in range(7):
        count = 2**exponent if signed else 2 ** (exponent + 1)
        edges = torch.linspace(0.1, 1, count + 1)
        means = (10.0 ** (exponent - 6) * (edges[:-1] + edges[1:]) / 2).tolist()
        values += means + ([-each for each in means] if signed else [])
    return torch.tensor(sorted(values), device=device)


def code_of_zero(signed: bool) -> int:
    """Return the code of 0."""
    return int((code_values(signed, torch.device("cpu")) == 0).nonzero())


@cache
def code_limits(signed: bool, device: torch.device) -> Tensor:
    """Return the 255 values halfway between neighbouring codes."""
    values = code_values(signed, device)
    return (values[1:] + values[:-1]) / 2

"""AdamW's step with moments in 8 bits, in Triton: what is float32 is in registers only.

Two passes read the gradient and the moments: for the length of the update, and for the update.
`plug.finetuning.adamw8bit` has the same step in plain PyTorch.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from plug.kernels.adafactor import _rounded

_ELEMENTS = 2048  # of a program
_WIDTH = 256  # of a row of a program, where the moments have no blocks


def squares(
    gradient: Tensor,
    moments: Mapping[str, Tensor],
    tables: tuple[Tensor, Tensor],
    numbers: Mapping[str, float],
) -> Tensor:
    """Return sums of the squares of the update before it is scaled: float32, one of each program.

    Args:
        gradient: contiguous, float32 or bfloat16.
        moments: `exp_avg` and `exp_avg_sq` in float32; or of each its `_codes` and its `_scale`.
        tables: what each code stands for, of both moments.
        numbers: `gained_first` and `gained_second`, the shares of the moments that are new;
            `first_by` and `second_by`, what corrects them for their start from 0; `eps`.
    """
    rows, layout = _layout(gradient, moments)
    sums = gradient.new_empty(triton.cdiv(rows, layout["ROWS"]), dtype=torch.float32)
    if sums.numel():
        _squares[sums.shape](
            gradient, *_kept(moments), *tables, sums, gradient.numel(), **numbers,
            **layout, num_warps=4,
        )  # fmt: skip
    return sums


def update(
    weight: Tensor,
    master: Tensor | None,
    gradient: Tensor,
    moments: Mapping[str, Tensor],
    tables: tuple[Tensor, Tensor],
    limits: tuple[Tensor, Tensor],
    mean_square: Tensor,
    *,
    numbers: Mapping[str, float],
    rate: float,
    lost: float,
    limit: float,
    key: int,
    first: int,
) -> None:
    """Change the weight and the moments in place.

    Args:
        weight: contiguous; bfloat16 (rounded stochastically unless there is a master) or float32.
        master: float32, what ``weight`` is rounded from; or None.
        gradient: as in `squares`.
        moments: as in `squares`.
        tables: as in `squares`.
        limits: the values halfway between neighbouring codes, of both moments.
        mean_square: of the update of the whole weight before it is scaled, float32 ().
        numbers: as in `squares`.
        rate: the learning rate.
        lost: what weight decay takes from the weight.
        limit: the update is scaled down to this root mean square where it is larger.
        key: of the random bits; 0 … 2**31 - 1.
        first: number, among all elements of the whole weight, of the first one that is given.
    """
    rows, layout = _layout(gradient, moments)
    programs = triton.cdiv(rows, layout["ROWS"])
    if programs:
        _apply[(programs,)](
            weight, weight if master is None else master, gradient, *_kept(moments),
            *tables, *limits, mean_square, rate, lost, limit, key, first, gradient.numel(),
            **numbers, HAS_MASTER=master is not None,
            ROUNDS=master is None and weight.dtype == torch.bfloat16, **layout, num_warps=4,
        )  # fmt: skip


def _layout(gradient: Tensor, moments: Mapping[str, Tensor]) -> tuple[int, dict[str, int | bool]]:
    """Return how many rows there are, and the constants of the kernels."""
    eight = "exp_avg_codes" in moments
    width = _WIDTH
    if eight:
        width = gradient.numel() // max(1, moments["exp_avg_scale"].numel()) or 1
    rows = triton.cdiv(gradient.numel(), width)
    return rows, {"EIGHT": eight, "BLOCK": width, "ROWS": max(1, _ELEMENTS // width)}


def _kept(moments: Mapping[str, Tensor]) -> list[Tensor]:
    """Both moments, each with its scale, or with itself where it has none."""
    return [
        moments[name] if name in moments else moments[f"{name}{kind}"]
        for name in ("exp_avg", "exp_avg_sq")
        for kind in ("_codes", "_scale")
    ]


@triton.jit
def _squares(
    gradient, first_kept, first_scale, second_kept, second_scale, first_table, second_table,
    sums, size, gained_first, gained_second, first_by, second_by, eps,
    EIGHT: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    at = row[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    value = tl.load(gradient + at, mask=at < size, other=0.0).to(tl.float32)
    first = _loaded(first_kept, first_scale, first_table, row, at, size, EIGHT, BLOCK)
    second = _loaded(second_kept, second_scale, second_table, row, at, size, EIGHT, BLOCK)
    first += (value - first) * gained_first
    second += (value * value - second) * gained_second
    update = first * first_by / (tl.sqrt(second * second_by) + eps)
    tl.store(sums + tl.program_id(0), tl.sum(tl.sum(update * update, 1), 0))


@triton.jit(do_not_specialize=["key"])  # another one for every step
def _apply(
    weight, kept, gradient, first_kept, first_scale, second_kept, second_scale,
    first_table, second_table, first_limits, second_limits, mean_square,
    rate, lost, limit, key, start, size, gained_first, gained_second, first_by, second_by, eps,
    HAS_MASTER: tl.constexpr, ROUNDS: tl.constexpr,
    EIGHT: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    at = row[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = at < size
    value = tl.load(gradient + at, mask=inside, other=0.0).to(tl.float32)
    first = _loaded(first_kept, first_scale, first_table, row, at, size, EIGHT, BLOCK)
    second = _loaded(second_kept, second_scale, second_table, row, at, size, EIGHT, BLOCK)
    first += (value - first) * gained_first
    second += (value * value - second) * gained_second
    _store(first_kept, first_scale, first_limits, first, row, at, size, EIGHT, BLOCK)
    _store(second_kept, second_scale, second_limits, second, row, at, size, EIGHT, BLOCK)
    factor = rate / tl.maximum(tl.sqrt(tl.load(mean_square)) / limit, 1.0)
    before = tl.load(kept + at, mask=inside, other=0.0).to(tl.float32)
    update = first * first_by / (tl.sqrt(second * second_by) + eps)
    after = before - before * lost - update * factor
    if ROUNDS:
        after = _rounded(after, at + start, key)
    tl.store(weight + at, after, mask=inside)
    if HAS_MASTER:
        tl.store(kept + at, after, mask=inside)


@triton.jit
def _loaded(kept, scale, table, row, at, size, EIGHT: tl.constexpr, BLOCK: tl.constexpr):
    moment = tl.load(kept + at, mask=at < size, other=0)
    if EIGHT:
        by = tl.load(scale + row, mask=row * BLOCK < size, other=0.0)
        moment = tl.load(table + moment.to(tl.int32)) * by[:, None]
    return moment


@triton.jit
def _store(kept, scale, limits, moment, row, at, size, EIGHT: tl.constexpr, BLOCK: tl.constexpr):
    if EIGHT:
        largest = tl.max(tl.abs(moment), 1)
        share = moment / tl.maximum(largest, 1e-30)[:, None]
        code = tl.zeros_like(share).to(tl.int32)  # how many limits are below
        for power in tl.static_range(8):
            higher = code + (128 >> power)
            code = tl.where(share > tl.load(limits + higher - 1), higher, code)
        tl.store(kept + at, code.to(tl.uint8), mask=at < size)
        tl.store(scale + row, largest, mask=row * BLOCK < size)
    else:
        tl.store(kept + at, moment, mask=at < size)

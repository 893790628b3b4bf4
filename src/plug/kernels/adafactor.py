"""Adafactor's step on one weight, in Triton: bfloat16 in, bfloat16 out, float32 in registers only.

Three passes read the gradient of a matrix: for its squares by row and column, for the length of
the update, for the update itself. PyTorch adds the sums of tiles in a fixed order, so a step
repeats bit by bit. `plug.finetuning.adafactor` has the same step in plain PyTorch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_ROWS, _COLUMNS = 128, 1024  # a tile; each program reads it `_STEP` rows at a time
_STEP = 8
# A tile whose rows lie in one warp each, so that they are added up without shared memory.
_SUMMED_COLUMNS, _SUMMED_STEP = 256, 32
_BLOCK = 4096  # of a vector


def mean_squares(gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Return the means of the squares of ``gradient`` (rows, columns), by row and by column."""
    rows, columns = gradient.shape
    down, across = triton.cdiv(rows, _ROWS), triton.cdiv(columns, _SUMMED_COLUMNS)
    by_row = gradient.new_empty(across, rows, dtype=torch.float32)
    by_column = gradient.new_empty(down, columns, dtype=torch.float32)
    _squares[(down, across)](
        gradient, by_row, by_column, rows, columns,
        ROWS=_ROWS, COLUMNS=_SUMMED_COLUMNS, STEP=_SUMMED_STEP, num_warps=8,
    )  # fmt: skip
    return by_row.sum(0) / columns, by_column.sum(0) / rows


def weighted_square(gradient: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """Return the sum of (gradient * row * column) ** 2; row (rows,), column (columns,) float32."""
    rows, columns = gradient.shape
    down, across = triton.cdiv(rows, _ROWS), triton.cdiv(columns, _COLUMNS)
    sums = gradient.new_empty(down * across, dtype=torch.float32)
    _weighted_square[(down, across)](
        gradient, row, column, sums, rows, columns,
        ROWS=_ROWS, COLUMNS=_COLUMNS, STEP=_STEP, num_warps=8,
    )  # fmt: skip
    return sums.sum()


def apply(
    weight: Tensor,
    gradient: Tensor,
    row: Tensor,
    column: Tensor,
    factor: Tensor,
    kept: float,
    key: int,
) -> None:
    """Set weight to kept * weight - factor * gradient * row * column.

    Args:
        weight: (rows, columns), bfloat16 (rounded stochastically) or float32.
        gradient: the same shape, contiguous as the weight.
        row: (rows,), float32.
        column: (columns,), float32.
        factor: one number, float32, on the device.
        kept: what weight decay leaves of the weight.
        key: of the random bits; 0 … 2**31 - 1.
    """
    rows, columns = weight.shape
    grid = (triton.cdiv(rows, _ROWS), triton.cdiv(columns, _COLUMNS))
    _apply[grid](
        weight, gradient, row, column, factor, 1 - kept, key, rows, columns,
        ROUNDS=weight.dtype == torch.bfloat16,
        ROWS=_ROWS, COLUMNS=_COLUMNS, STEP=_STEP, num_warps=8,
    )  # fmt: skip


def update_vector(
    weight: Tensor,
    master: Tensor,
    gradient: Tensor,
    square: Tensor,
    *,
    rate: float,
    decay: float,
    kept: float,
    limit: float,
    tiny: float,
) -> None:
    """Take a whole step on a vector; ``master`` (float32) is what ``weight`` is rounded from."""
    _vector[(1,)](
        weight, master, gradient, square, rate, 1 - decay, 1 - kept, limit, tiny, len(weight),
        BLOCK=min(_BLOCK, triton.next_power_of_2(len(weight))), num_warps=8,
    )  # fmt: skip


@triton.jit
def _squares(
    gradient, by_row, by_column, rows, columns,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    down, across = tl.program_id(0), tl.program_id(1)
    column = across * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([STEP, COLUMNS], tl.float32)
    for first in range(0, ROWS, STEP):
        row = down * ROWS + first + tl.arange(0, STEP)
        inside = (row < rows)[:, None] & (column < columns)[None, :]
        at = row.to(tl.int64)[:, None] * columns + column[None, :]
        value = tl.load(gradient + at, mask=inside, other=0.0).to(tl.float32)
        square = value * value
        total += square
        tl.store(by_row + across.to(tl.int64) * rows + row, tl.sum(square, 1), mask=row < rows)
    at = down.to(tl.int64) * columns + column
    tl.store(by_column + at, tl.sum(total, 0), mask=column < columns)


@triton.jit
def _weighted_square(
    gradient, by_row, by_column, sums, rows, columns,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    down, across = tl.program_id(0), tl.program_id(1)
    column = across * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([STEP, COLUMNS], tl.float32)
    for first in range(0, ROWS, STEP):
        row = down * ROWS + first + tl.arange(0, STEP)
        inside = (row < rows)[:, None] & (column < columns)[None, :]
        at = row.to(tl.int64)[:, None] * columns + column[None, :]
        value = tl.load(gradient + at, mask=inside, other=0.0).to(tl.float32)
        value *= tl.load(by_row + row, mask=row < rows, other=0.0)[:, None]
        total += value * value
    scale = tl.load(by_column + column, mask=column < columns, other=0.0)
    total_of_columns = tl.sum(total, 0) * scale * scale
    tl.store(sums + down * tl.num_programs(1) + across, tl.sum(total_of_columns, 0))


@triton.jit(do_not_specialize=["key"])  # another one for every step
def _apply(
    weight, gradient, by_row, by_column, factor, lost, key, rows, columns,
    ROUNDS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    down, across = tl.program_id(0), tl.program_id(1)
    column = across * COLUMNS + tl.arange(0, COLUMNS)
    scale = tl.load(by_column + column, mask=column < columns, other=0.0) * tl.load(factor)
    for first in range(0, ROWS, STEP):
        row = down * ROWS + first + tl.arange(0, STEP)
        inside = (row < rows)[:, None] & (column < columns)[None, :]
        at = row.to(tl.int64)[:, None] * columns + column[None, :]
        change = tl.load(gradient + at, mask=inside, other=0.0).to(tl.float32)
        change *= tl.load(by_row + row, mask=row < rows, other=0.0)[:, None] * scale[None, :]
        value = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
        value = value - value * lost - change
        if ROUNDS:
            value = _rounded(value, at, key)
        tl.store(weight + at, value, mask=inside)


@triton.jit
def _rounded(value, at, key):
    """Round to bfloat16, up or down as likely as it is near; see `plug.finetuning.adafactor`."""
    bits = at.to(tl.uint32) * 0x9E3779B1
    bits ^= key.to(tl.uint32)
    bits ^= bits >> 16
    bits *= 0x7FEB352D
    bits ^= bits >> 15
    bits *= 0x846CA68B
    bits ^= bits >> 16
    bits = (value.to(tl.uint32, bitcast=True) + (bits & 0xFFFF)) & 0xFFFF0000
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _vector(
    weight, master, gradient, squares, rate, gained, lost, limit, tiny, size, BLOCK: tl.constexpr
):
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(0, size, BLOCK):
        at = first + tl.arange(0, BLOCK)
        value = tl.load(gradient + at, mask=at < size, other=0.0).to(tl.float32)
        square = tl.load(squares + at, mask=at < size, other=1.0)
        square += (value * value + tiny - square) * gained
        tl.store(squares + at, square, mask=at < size)
        total += value * value / square
    length = tl.sqrt(tl.sum(total, 0) / size)
    factor = rate / tl.maximum(length / limit, 1.0)
    for first in range(0, size, BLOCK):
        at = first + tl.arange(0, BLOCK)
        value = tl.load(gradient + at, mask=at < size, other=0.0).to(tl.float32)
        square = tl.load(squares + at, mask=at < size, other=1.0)
        before = tl.load(master + at, mask=at < size, other=0.0)
        after = before - before * lost - factor * value / tl.sqrt(square)
        tl.store(master + at, after, mask=at < size)
        tl.store(weight + at, after, mask=at < size)

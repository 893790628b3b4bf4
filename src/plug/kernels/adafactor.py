"""Adafactor's step on one weight, in Triton: bfloat16 in, bfloat16 out, float32 in registers only.

Three passes read the gradient of a matrix: for its squares by row and column, for the length of
the update, for the update itself. Sums of tiles are written, then added in a fixed order, so a step
repeats bit by bit. `plug.finetuning.adafactor` has the same step in plain PyTorch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_ROWS, _COLUMNS = 128, 1024  # a tile; each program reads it `_STEP` rows at a time
_STEP = 8
_MOMENTS = 128  # of a program
_BLOCK = 4096  # of a vector


def update_matrix(
    weight: Tensor,
    gradient: Tensor,
    row: Tensor,
    column: Tensor,
    *,
    rate: float,
    decay: float,
    kept: float,
    limit: float,
    tiny: float,
    key: int,
) -> None:
    """Take a step on a matrix, in place.

    Args:
        weight: (rows, columns), bfloat16 (rounded stochastically) or float32.
        gradient: the same shape, contiguous as the weight.
        row: (rows,), float32, the second moment by row.
        column: (columns,), float32, by column.
        rate: root mean square of the update.
        decay: share of the second moment that is kept.
        kept: what weight decay leaves of the weight.
        limit: the update is scaled down to it where its root mean square is larger.
        tiny: added to squares.
        key: of the random bits; 0 … 2**31 - 1.
    """
    rows, columns = weight.shape
    down, across = grid = triton.cdiv(rows, _ROWS), triton.cdiv(columns, _COLUMNS)
    blocks = triton.cdiv(rows, _MOMENTS)
    tiles = down * across
    # One allocation for all that passes tell each other.
    sizes = (across * rows, down * columns, blocks, tiles)
    by_row, by_column, sums, squares = gradient.new_empty(sum(sizes), dtype=torch.float32).split(
        sizes
    )
    tile = {"ROWS": _ROWS, "COLUMNS": _COLUMNS, "STEP": _STEP, "num_warps": 8}
    wide = {"SUMS": triton.next_power_of_2(blocks), **tile}
    _squares[grid](gradient, by_row, by_column, rows, columns, **tile)
    _moments[(blocks + triton.cdiv(columns, _MOMENTS),)](
        by_row, by_column, row, column, sums, rows, columns, across, down, 1 - decay, tiny,
        BLOCK=_MOMENTS, AT_ONCE=32, num_warps=8,
    )  # fmt: skip
    _weighted_square[grid](gradient, row, column, sums, squares, rows, columns, blocks, **wide)
    _apply[grid](
        weight, gradient, row, column, sums, squares, rate, limit, 1 - kept, key,
        rows, columns, blocks, tiles,
        ROUNDS=weight.dtype == torch.bfloat16, TILES=triton.next_power_of_2(tiles), **wide,
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
def _moments(
    by_row, by_column, row, column, sums, rows, columns, across, down, gained, tiny,
    BLOCK: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Move both moments towards the means of the squares; write sums of the new ones by row."""
    block = tl.program_id(0)
    blocks = tl.cdiv(rows, BLOCK)
    if block < blocks:
        moved = _moved(by_row, row, block * BLOCK, rows, across, columns, gained, tiny,
                       BLOCK, AT_ONCE)  # fmt: skip
        tl.store(sums + block, tl.sum(moved, 0))
    else:
        _moved(by_column, column, (block - blocks) * BLOCK, columns, down, rows, gained, tiny,
               BLOCK, AT_ONCE)  # fmt: skip


@triton.jit
def _moved(
    parts, moments, first, size, count, added, gained, tiny,
    BLOCK: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    at = first + tl.arange(0, BLOCK)
    total = tl.zeros([AT_ONCE, BLOCK], tl.float32)
    for start in range(0, count, AT_ONCE):
        part = start + tl.arange(0, AT_ONCE)
        inside = (part < count)[:, None] & (at < size)[None, :]
        total += tl.load(
            parts + part.to(tl.int64)[:, None] * size + at[None, :], mask=inside, other=0.0
        )
    mean = tl.sum(total, 0) / added
    moment = tl.load(moments + at, mask=at < size, other=0.0)
    moment += (mean + tiny - moment) * gained
    tl.store(moments + at, moment, mask=at < size)
    return tl.where(at < size, moment, 0.0)


@triton.jit
def _mean(sums, rows, blocks, SUMS: tl.constexpr):
    at = tl.arange(0, SUMS)
    return tl.sum(tl.load(sums + at, mask=at < blocks, other=0.0), 0) / rows


@triton.jit
def _weighted_square(
    gradient, by_row, by_column, sums, squares, rows, columns, blocks,
    SUMS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Add up the squares of the update before it is scaled, by tile."""
    down, across = tl.program_id(0), tl.program_id(1)
    mean = _mean(sums, rows, blocks, SUMS)
    column = across * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([STEP, COLUMNS], tl.float32)
    for first in range(0, ROWS, STEP):
        row = down * ROWS + first + tl.arange(0, STEP)
        inside = (row < rows)[:, None] & (column < columns)[None, :]
        at = row.to(tl.int64)[:, None] * columns + column[None, :]
        value = tl.load(gradient + at, mask=inside, other=0.0).to(tl.float32)
        of_row = tl.load(by_row + row, mask=row < rows, other=1.0)
        total += value * value * (mean / of_row)[:, None]
    of_column = tl.load(by_column + column, mask=column < columns, other=1.0)
    tl.store(squares + down * tl.num_programs(1) + across, tl.sum(tl.sum(total, 0) / of_column, 0))


@triton.jit(do_not_specialize=["key"])  # another one for every step
def _apply(
    weight, gradient, by_row, by_column, sums, squares, rate, limit, lost, key,
    rows, columns, blocks, tiles,
    ROUNDS: tl.constexpr, TILES: tl.constexpr, SUMS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    down, across = tl.program_id(0), tl.program_id(1)
    tile = tl.arange(0, TILES)
    square = tl.sum(tl.load(squares + tile, mask=tile < tiles, other=0.0), 0)
    length = tl.sqrt(square / rows / columns)
    factor = rate / tl.maximum(length / limit, 1.0)
    mean = _mean(sums, rows, blocks, SUMS)
    column = across * COLUMNS + tl.arange(0, COLUMNS)
    of_column = tl.load(by_column + column, mask=column < columns, other=1.0)
    scale = factor / tl.sqrt(of_column)
    for first in range(0, ROWS, STEP):
        row = down * ROWS + first + tl.arange(0, STEP)
        inside = (row < rows)[:, None] & (column < columns)[None, :]
        at = row.to(tl.int64)[:, None] * columns + column[None, :]
        of_row = tl.load(by_row + row, mask=row < rows, other=1.0)
        change = tl.load(gradient + at, mask=inside, other=0.0).to(tl.float32)
        change *= tl.sqrt(mean / of_row)[:, None] * scale[None, :]
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

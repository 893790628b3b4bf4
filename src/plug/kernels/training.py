"""Triton kernels for training adapters: their thin products, dropout, norms and GELU, both ways.

`plug.finetuning.plain_training` has the same functions in plain PyTorch. Tensors have two
dimensions, (rows, size), and are contiguous along the second. Arithmetic is in float32, results
are rounded once.

Dropout keeps no mask: whether an element is kept is a hash of its place and a seed, so the backward
pass asks again.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from plug.kernels.rows import FP8, Fp8Rows, warps

_BLOCK = 4096  # elements of a program of an elementwise kernel


class _Shape(NamedTuple):
    """What a program takes at a time, how often, and by how many warps."""

    rows: int
    columns: int
    steps: int  # along the columns, or along the rows where rows are summed up
    warps: int


# Measured on an H100 with 6,144 rows of 8,192 and 32,768 columns.
_SHAPES = {
    "project": _Shape(64, 128, 16, 8),
    "outer": _Shape(64, 128, 16, 4),
    "expand": _Shape(32, 128, 1, 4),
    "through_gelu": _Shape(64, 64, 2, 4),
    "back_through_gelu": _Shape(16, 128, 16, 4),
    "quantize": _Shape(1, 0, 1, 32),
    "quantize_columns": _Shape(128, 64, 8, 8),  # not measured yet
}
MULTIPLE = 16  # of rows that the cards' FP8 products sum over
_SEEDS = ("seed", "second", "threshold")  # whose values make no other kernel


def project(
    x: Tensor, a: Tensor, *, alpha: float = 1.0, rate: float = 0.0, seed: int = 0
) -> Tensor:
    """Compute alpha * dropout(x) a^T for few outputs: reads ``x`` once and writes little.

    Args:
        x: (rows, size).
        a: (rank, size), any strides and float dtype.
        alpha: factor.
        rate: of dropout; 0 is none.
        seed: of dropout.

    Returns:
        float32 (rows, rank).
    """
    rows, size = x.shape
    rank = len(a)
    shape = _SHAPES["project"]
    width = _columns(shape, rank, 64)
    chunk = shape.columns * shape.steps
    parts = triton.cdiv(size, chunk)
    out = torch.empty(parts, rows, rank, dtype=torch.float32, device=x.device)
    _project[(triton.cdiv(rows, shape.rows), parts)](
        x, a, out, rows, size, rank, chunk, x.stride(0), a.stride(0), a.stride(1),
        alpha / (1 - rate), *_dropout(rate, seed), DROP=rate > 0,
        RANK=_whole(rank), ROWS=shape.rows, COLUMNS=width,
        num_stages=4, num_warps=shape.warps,
    )  # fmt: skip
    return _total(out)


def outer(
    u: Tensor,
    x: Tensor,
    *,
    alpha: float = 1.0,
    rate: float = 0.0,
    seed: int = 0,
    transposed: bool = False,
) -> Tensor:
    """Compute alpha * u^T dropout(x), the gradient of a thin matrix, in float32.

    Args:
        u: (rows, rank).
        x: (rows, size).
        alpha: factor.
        rate: of dropout, as in `project`, and so ``seed``.
        seed: of dropout.
        transposed: return (size, rank).

    Returns:
        (rank, size).
    """
    rows, size = x.shape
    rank = u.shape[1]
    shape = _SHAPES["outer"]
    width = _columns(shape, rank, 64)
    chunk = shape.rows * shape.steps
    columns, parts = triton.cdiv(size, width), triton.cdiv(rows, chunk)
    sizes = (parts, size, rank) if transposed else (parts, rank, size)
    out = torch.empty(sizes, dtype=torch.float32, device=x.device)
    strides = (1, rank) if transposed else (size, 1)
    _outer[(columns, parts)](
        u, x, out, rows, size, rank, chunk, u.stride(0), x.stride(0), *strides,
        alpha / (1 - rate), *_dropout(rate, seed), DROP=rate > 0,
        RANK=_whole(rank), ROWS=shape.rows, COLUMNS=width,
        num_stages=3, num_warps=shape.warps,
    )  # fmt: skip
    return _total(out)


def expand_(
    y: Tensor,
    u: Tensor,
    b: Tensor,
    *,
    alpha: float = 1.0,
    rate: float = 0.0,
    seed: int = 0,
    residual: Tensor | None = None,
) -> Tensor:
    """Add alpha * u b to ``y`` in place, with one dropout and one sum more, and return it.

    Args:
        y: (rows, size).
        u: (rows, rank).
        b: (rank, size), any strides and float dtype.
        alpha: factor.
        rate: of dropout; of the product without ``residual``, else of the whole.
        seed: of dropout.
        residual: (rows, size): return residual + dropout(y + alpha * u b).
    """
    rows, size = y.shape
    rank = u.shape[1]
    shape = _SHAPES["expand"]
    width = _columns(shape, rank, 64)
    grid = (triton.cdiv(rows, shape.rows) * triton.cdiv(size, width),)
    other = y if residual is None else residual
    _expand[grid](
        y, u, b, other, rows, size, rank, y.stride(0), u.stride(0), b.stride(0), b.stride(1),
        other.stride(0), alpha, 1 / (1 - rate), *_dropout(rate, seed), DROP=rate > 0,
        RESIDUAL=residual is not None, RANK=_whole(rank), ROWS=shape.rows, COLUMNS=width,
        num_warps=shape.warps,
    )  # fmt: skip
    return y


def through_gelu_(
    y: Tensor,
    u: Tensor,
    b: Tensor,
    a: Tensor,
    *,
    alpha: float,
    rate: float,
    seed: int,
    wants_gelu: bool,
) -> tuple[Tensor, Tensor | None]:
    """Between two layers: finish the first one's output, and project its GELU for the second.

    Args:
        y: (rows, size); alpha * u b is added to it in place.
        u: (rows, rank).
        b: (rank, size), any strides and float dtype.
        a: (next rank, size), likewise.
        alpha: factor.
        rate: of dropout before the projection, as ``seed``.
        seed: of dropout.
        wants_gelu: return the GELU too.

    Returns:
        dropout(gelu(y)) a^T, float32 (rows, next rank), and gelu(y).
    """
    rows, size = y.shape
    rank, next_rank = u.shape[1], len(a)
    shape = _SHAPES["through_gelu"]
    width = _columns(shape, max(rank, next_rank), 64)
    chunk = shape.columns * shape.steps
    parts = triton.cdiv(size, chunk)
    out = torch.empty(parts, rows, next_rank, dtype=torch.float32, device=y.device)
    activated = torch.empty_like(y) if wants_gelu else None
    _through_gelu[(triton.cdiv(rows, shape.rows), parts)](
        y, u, b, a, out, y if activated is None else activated, rows, size, rank, next_rank, chunk,
        y.stride(0), u.stride(0), b.stride(0), b.stride(1), a.stride(0), a.stride(1),
        alpha, 1 / (1 - rate), *_dropout(rate, seed), DROP=rate > 0, GELU=wants_gelu,
        RANK=_whole(rank), NEXT=_whole(next_rank), ROWS=shape.rows, COLUMNS=width,
        num_warps=shape.warps,
    )  # fmt: skip
    return _total(out), activated


def back_through_gelu_(
    gradient: Tensor,
    y: Tensor,
    u: Tensor,
    a: Tensor,
    thin: Tensor,
    *,
    alpha: float,
    rate: float,
    seed: int,
) -> tuple[Tensor, Tensor]:
    """Do what `through_gelu_` did, backward.

    Args:
        gradient: of gelu(y) by the second layer's weight (rows, size); becomes that of ``y``.
        y: that `through_gelu_` finished.
        u: (rows, next rank), the gradient of what it returned first.
        a: (next rank, size), as there.
        thin: (rows, rank), its ``u``.
        alpha: as there, as ``rate`` and ``seed``.
        rate: of dropout.
        seed: of dropout.

    Returns:
        The gradients of ``a``, and of ``b`` as (size, rank), in float32.
    """
    rows, size = y.shape
    rank, next_rank = thin.shape[1], u.shape[1]
    shape = _SHAPES["back_through_gelu"]
    width = _columns(shape, max(rank, next_rank), 32)
    chunk = shape.rows * shape.steps
    columns, parts = triton.cdiv(size, width), triton.cdiv(rows, chunk)
    of_a = torch.empty(parts, next_rank, size, dtype=torch.float32, device=y.device)
    of_b = torch.empty(parts, size, rank, dtype=torch.float32, device=y.device)
    _back_through_gelu[(columns, parts)](
        gradient, y, u, a, thin, of_a, of_b, rows, size, rank, next_rank, chunk,
        gradient.stride(0), y.stride(0), u.stride(0), a.stride(0), a.stride(1), thin.stride(0),
        alpha, 1 / (1 - rate), *_dropout(rate, seed), DROP=rate > 0,
        RANK=_whole(rank), NEXT=_whole(next_rank), ROWS=shape.rows, COLUMNS=width,
        num_warps=shape.warps,
    )  # fmt: skip
    return _total(of_a), _total(of_b)


def dropped(gradient: Tensor, *, rate: float, seed: int) -> Tensor:
    """Return the gradient of y in x + dropout(y); itself where nothing is dropped."""
    if rate == 0:
        return gradient
    out = torch.empty_like(gradient)
    _dropped[(triton.cdiv(out.numel(), _BLOCK),)](
        gradient, out, out.numel(), 1 / (1 - rate), *_dropout(rate, seed), BLOCK=_BLOCK
    )
    return out


def norm(x: Tensor, layer: nn.LayerNorm) -> Tensor:
    """Return the LayerNorm of ``x``, contiguous."""
    out = torch.empty_like(x)
    rows, size = x.shape
    _norm[(rows,)](
        x, layer.weight, layer.bias, out, layer.eps, size,
        BLOCK=triton.next_power_of_2(size), num_warps=warps(size),
    )  # fmt: skip
    return out


def norm_backward_(gradient: Tensor, x: Tensor, layer: nn.LayerNorm, residual: Tensor) -> Tensor:
    """Return ``residual`` + the gradient of the norm's input, written over ``gradient``.

    Args:
        gradient: of the norm's output (rows, size).
        x: the norm's input.
        layer: the norm.
        residual: the gradient of ``x`` by its other use.
    """
    rows, size = x.shape
    _norm_backward[(rows,)](
        gradient, x, layer.weight, residual, layer.eps, size,
        BLOCK=triton.next_power_of_2(size), num_warps=warps(size),
    )  # fmt: skip
    return gradient


def quantize(x: Tensor, units: Tensor | None = None, *, gelu: bool = False) -> Fp8Rows:
    """Round rows to FP8, each in units of its largest value.

    Args:
        x: (rows, size).
        units: float32 (size,): round x * units instead.
        gelu: round the GELU of ``x``.
    """
    rows, size = x.shape
    out = Fp8Rows(
        torch.empty(rows, size, dtype=FP8, device=x.device),
        torch.empty(rows, 1, dtype=torch.float32, device=x.device),
        x.dtype,
    )
    _quantize[(rows,)](
        x, x if units is None else units, out.values, out.scale, size, x.stride(0),
        GELU=gelu, UNITS=units is not None,
        BLOCK=triton.next_power_of_2(size), num_warps=warps(size, _SHAPES["quantize"].warps),
    )  # fmt: skip
    return out


def quantize_columns(x: Tensor) -> Fp8Rows:
    """Round columns to FP8, each in units of its largest value: the rows of x^T.

    Products sum along these rows, so that their length is rounded up to a multiple of 16, by zeros.

    Args:
        x: (rows, size), contiguous.

    Returns:
        (size, rows).
    """
    rows, size = x.shape
    length = -(-rows // MULTIPLE) * MULTIPLE
    shape = _SHAPES["quantize_columns"]
    chunk = shape.rows * shape.steps
    across, parts = triton.cdiv(size, shape.columns), triton.cdiv(rows, chunk)
    largest = torch.empty(parts, size, dtype=torch.float32, device=x.device)
    _largest[(across, parts)](
        x, largest, rows, size, chunk, x.stride(0), ROWS=shape.rows, COLUMNS=shape.columns,
        num_warps=shape.warps,
    )  # fmt: skip
    scale = largest.amax(0).clamp_(min=1e-30).mul_(1 / 448.0)
    out = Fp8Rows(torch.empty(size, length, dtype=FP8, device=x.device), scale[:, None], x.dtype)
    _quantize_columns[(across, triton.cdiv(length, shape.rows))](
        x, scale, out.values, rows, length, size, x.stride(0),
        ROWS=shape.rows, COLUMNS=shape.columns, num_warps=shape.warps,
    )  # fmt: skip
    return out


def multiply_fp8(
    x: Fp8Rows,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    out: Tensor,
    *,
    fast: bool = True,
) -> None:
    """Multiply rows with a weight in FP8.

    Args:
        x: (rows, in).
        weight: FP8 (out, in).
        scale: float32 (out,), the units of the weight's rows.
        bias: (out,), taken as bfloat16.
        out: bfloat16 (rows, out), a slice of a wider tensor too.
        fast: sum up in the tensor cores' own registers, with fewer bits than float32 has.
    """
    torch._scaled_mm(
        x.values, weight.t(), scale_a=x.scale, scale_b=scale[None, :],
        bias=None if bias is None else bias.bfloat16(),
        out_dtype=torch.bfloat16, use_fast_accum=fast, out=out,
    )  # fmt: skip


def unpack(
    weight: Tensor,
    scale: Tensor,
    center: Tensor | None,
    out: Tensor,
    *,
    units: Tensor | None = None,
    transposed: bool = False,
) -> None:
    """Dequantise a weight of `plug.quantization.scheme` into ``out``.

    Args:
        weight: int8 (rows, size), or of 4 bits uint8 (rows, size / 2); rows or whole groups of
            columns of a larger one too.
        scale: of the format.
        center: of the format with 4 bits, its strides those of ``scale``; None: 8 bits.
        out: (rows, size), or (size, rows) where ``transposed``; the second dimension contiguous.
        units: float32 (rows,), with 4 bits: write in units of them. The units of 8 bits are their
            scales: the integers are written where ``out`` is FP8.
        transposed: write the transposed weight.
    """
    rows = len(weight)
    bits = 8 if center is None else 4
    size = weight.shape[1] * 8 // bits
    if bits == 4:
        weight = weight.view(torch.int32)
    block_rows = 64 if transposed else 16
    grid = (triton.cdiv(rows, block_rows), triton.cdiv(size, 128))
    _unpack[grid](
        weight, scale, scale if center is None else center, scale if units is None else units,
        out, rows, size, weight.stride(0), scale.stride(0), out.stride(0),
        BITS=bits, IN_UNITS=units is not None, PLAIN=bits == 8 and out.dtype == FP8,
        TRANSPOSED=transposed, ROWS=block_rows, COLUMNS=128,
    )  # fmt: skip


def _columns(shape: _Shape, rank: int, most: int) -> int:
    """Columns of a program: fewer for ranks above ``most``, so that registers suffice."""
    return max(32, shape.columns * most // max(most, _whole(rank)))


def _total(parts: Tensor) -> Tensor:
    return parts[0] if len(parts) == 1 else parts.sum(0)


def _whole(rank: int) -> int:
    return max(16, triton.next_power_of_2(rank))


def _dropout(rate: float, seed: int) -> tuple[int, int, int]:
    """Seed, a second seed, and how many of 2^32 hashes are dropped; all 32 bits, signed."""
    return _signed(seed), _signed(seed * 0x27D4EB2F), _signed(int(rate * 2**32))


def _signed(value: int) -> int:
    value &= 2**32 - 1
    return value - 2**32 if value >= 2**31 else value


@triton.jit
def _kept(place, seed, second, threshold):
    h = place.to(tl.uint32) ^ seed.to(tl.uint32)
    h = (h ^ (h >> 16)) * 0x7FEB352D
    h = ((h ^ (h >> 15)) + second.to(tl.uint32)) * 0x846CA68B
    return h >= threshold.to(tl.uint32)


@triton.jit
def _cdf(x):
    """The normal distribution's, within 1e-7, and exp(-x^2 / 2).

    Source: Abramowitz and Stegun 1964, 7.1.26.
    """
    z = tl.abs(x) * 0.7071067811865476
    e = tl.exp(-z * z)
    t = 1.0 / (1.0 + 0.3275911 * z)
    tail = ((1.061405429 * t - 1.453152027) * t + 1.421413741) * t - 0.284496736
    tail = (tail * t + 0.254829592) * t * e * 0.5
    return tl.where(x < 0, tail, 1.0 - tail), e


@triton.jit
def _gelu(x):
    cdf, _ = _cdf(x)
    return x * cdf


@triton.jit(do_not_specialize=_SEEDS)
def _project(
    x, a, out, rows, size, rank, chunk, x_stride, a_stride, a_step,
    alpha, seed, second, threshold,
    DROP: tl.constexpr, RANK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    part = tl.program_id(1)
    r = tl.arange(0, RANK)
    total = tl.zeros((ROWS, RANK), tl.float32)
    for first in range(part * chunk, tl.minimum(size, (part + 1) * chunk), COLUMNS):
        k = first + tl.arange(0, COLUMNS)
        inside = (m[:, None] < rows) & (k[None, :] < size)
        value = tl.load(x + m[:, None].to(tl.int64) * x_stride + k[None, :], mask=inside, other=0.0)
        if DROP:
            kept = _kept(m[:, None] * size + k[None, :], seed, second, threshold)
            value = tl.where(kept, value, 0.0)
        thin = tl.load(
            a + k[:, None] * a_step + r[None, :] * a_stride,
            mask=(k[:, None] < size) & (r[None, :] < rank), other=0.0,
        )  # fmt: skip
        total = tl.dot(value, thin.to(value.dtype), total, input_precision="ieee")
    at = out + part * rows * rank + m[:, None] * rank + r[None, :]
    tl.store(at, total * alpha, mask=(m[:, None] < rows) & (r[None, :] < rank))


@triton.jit(do_not_specialize=_SEEDS)
def _outer(
    u, x, out, rows, size, rank, chunk, u_stride, x_stride, out_rank, out_step,
    alpha, seed, second, threshold,
    DROP: tl.constexpr, RANK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    k = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    part = tl.program_id(1)
    r = tl.arange(0, RANK)
    total = tl.zeros((RANK, COLUMNS), tl.float32)
    end = tl.minimum(rows, (part + 1) * chunk)
    for first in range(part * chunk, end, ROWS):
        m = first + tl.arange(0, ROWS)
        inside = (m[:, None] < end) & (k[None, :] < size)
        value = tl.load(x + m[:, None].to(tl.int64) * x_stride + k[None, :], mask=inside, other=0.0)
        if DROP:
            kept = _kept(m[:, None] * size + k[None, :], seed, second, threshold)
            value = tl.where(kept, value, 0.0)
        thin = tl.load(
            u + m[None, :] * u_stride + r[:, None],
            mask=(m[None, :] < end) & (r[:, None] < rank), other=0.0,
        )  # fmt: skip
        total = tl.dot(thin.to(value.dtype), value, total, input_precision="ieee")
    at = out + part * rank * size + r[:, None] * out_rank + k[None, :] * out_step
    tl.store(at, total * alpha, mask=(r[:, None] < rank) & (k[None, :] < size))


@triton.jit(do_not_specialize=_SEEDS)
def _expand(
    y, u, b, residual, rows, size, rank, y_stride, u_stride, b_stride, b_step, residual_stride,
    alpha, scale, seed, second, threshold,
    DROP: tl.constexpr, RESIDUAL: tl.constexpr, RANK: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    across = tl.cdiv(size, COLUMNS)
    m = tl.program_id(0) // across * ROWS + tl.arange(0, ROWS)
    n = tl.program_id(0) % across * COLUMNS + tl.arange(0, COLUMNS)
    r = tl.arange(0, RANK)
    inside = (m[:, None] < rows) & (n[None, :] < size)
    thin = tl.load(
        u + m[:, None] * u_stride + r[None, :],
        mask=(m[:, None] < rows) & (r[None, :] < rank), other=0.0,
    )  # fmt: skip
    wide = tl.load(
        b + r[:, None] * b_stride + n[None, :] * b_step,
        mask=(r[:, None] < rank) & (n[None, :] < size), other=0.0,
    )  # fmt: skip
    half = y.dtype.element_ty
    total = tl.dot(thin.to(half), wide.to(half), input_precision="ieee") * alpha
    at = y + m[:, None].to(tl.int64) * y_stride + n[None, :]
    before = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    if RESIDUAL:
        total += before
        place = residual + m[:, None].to(tl.int64) * residual_stride + n[None, :]
        before = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    if DROP:
        kept = _kept(m[:, None] * size + n[None, :], seed, second, threshold)
        total = tl.where(kept, total * scale, 0.0)
    tl.store(at, before + total, mask=inside)


@triton.jit(do_not_specialize=_SEEDS)
def _through_gelu(
    y, u, b, a, out, activated, rows, size, rank, next_rank, chunk,
    y_stride, u_stride, b_stride, b_step, a_stride, a_step,
    alpha, scale, seed, second, threshold,
    DROP: tl.constexpr, GELU: tl.constexpr, RANK: tl.constexpr, NEXT: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    part = tl.program_id(1)
    r, s = tl.arange(0, RANK), tl.arange(0, NEXT)
    thin = tl.load(
        u + m[:, None] * u_stride + r[None, :],
        mask=(m[:, None] < rows) & (r[None, :] < rank), other=0.0,
    )  # fmt: skip
    total = tl.zeros((ROWS, NEXT), tl.float32)
    for first in range(part * chunk, tl.minimum(size, (part + 1) * chunk), COLUMNS):
        k = first + tl.arange(0, COLUMNS)
        inside = (m[:, None] < rows) & (k[None, :] < size)
        at = m[:, None].to(tl.int64) * y_stride + k[None, :]
        loaded = tl.load(y + at, mask=inside, other=0.0)
        wide = tl.load(
            b + r[:, None] * b_stride + k[None, :] * b_step,
            mask=(r[:, None] < rank) & (k[None, :] < size), other=0.0,
        )  # fmt: skip
        added = tl.dot(thin.to(loaded.dtype), wide.to(loaded.dtype), input_precision="ieee")
        value = (loaded.to(tl.float32) + added * alpha).to(loaded.dtype)
        tl.store(y + at, value, mask=inside)
        gelu = _gelu(value.to(tl.float32)).to(loaded.dtype)
        if GELU:
            tl.store(activated + at, gelu, mask=inside)
        if DROP:
            kept = _kept(m[:, None] * size + k[None, :], seed, second, threshold)
            gelu = tl.where(kept, gelu, 0.0)
        next_thin = tl.load(
            a + k[:, None] * a_step + s[None, :] * a_stride,
            mask=(k[:, None] < size) & (s[None, :] < next_rank), other=0.0,
        )  # fmt: skip
        total = tl.dot(gelu, next_thin.to(gelu.dtype), total, input_precision="ieee")
    at = out + part * rows * next_rank + m[:, None] * next_rank + s[None, :]
    tl.store(at, total * scale, mask=(m[:, None] < rows) & (s[None, :] < next_rank))


@triton.jit(do_not_specialize=_SEEDS)
def _back_through_gelu(
    gradient, y, u, a, thin, of_a, of_b, rows, size, rank, next_rank, chunk,
    gradient_stride, y_stride, u_stride, a_stride, a_step, thin_stride,
    alpha, scale, seed, second, threshold,
    DROP: tl.constexpr, RANK: tl.constexpr, NEXT: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    k = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    part = tl.program_id(1)
    r, s = tl.arange(0, RANK), tl.arange(0, NEXT)
    wide = tl.load(
        a + s[:, None] * a_stride + k[None, :] * a_step,
        mask=(s[:, None] < next_rank) & (k[None, :] < size), other=0.0,
    )  # fmt: skip
    total_a = tl.zeros((NEXT, COLUMNS), tl.float32)
    total_b = tl.zeros((RANK, COLUMNS), tl.float32)
    end = tl.minimum(rows, (part + 1) * chunk)
    for first in range(part * chunk, end, ROWS):
        m = first + tl.arange(0, ROWS)
        inside = (m[:, None] < end) & (k[None, :] < size)
        at = gradient + m[:, None].to(tl.int64) * gradient_stride + k[None, :]
        slope = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        place = y + m[:, None].to(tl.int64) * y_stride + k[None, :]
        loaded = tl.load(place, mask=inside, other=0.0)
        value = loaded.to(tl.float32)
        after = tl.load(
            u + m[:, None] * u_stride + s[None, :],
            mask=(m[:, None] < end) & (s[None, :] < next_rank), other=0.0,
        )  # fmt: skip
        before = tl.load(
            thin + m[None, :] * thin_stride + r[:, None],
            mask=(m[None, :] < end) & (r[:, None] < rank), other=0.0,
        )  # fmt: skip
        after, before = after.to(loaded.dtype), before.to(loaded.dtype)
        cdf, e = _cdf(value)
        gelu = value * cdf
        added = tl.dot(after, wide.to(after.dtype), input_precision="ieee")
        if DROP:
            kept = _kept(m[:, None] * size + k[None, :], seed, second, threshold)
            gelu = tl.where(kept, gelu, 0.0)
            added = tl.where(kept, added * scale, 0.0)
        total_a = tl.dot(tl.trans(after), gelu.to(loaded.dtype), total_a, input_precision="ieee")
        slope = (slope + added) * (cdf + value * 0.3989422804014327 * e)
        found = slope.to(loaded.dtype)
        tl.store(at, found, mask=inside)
        total_b = tl.dot(before, found, total_b, input_precision="ieee")
    at = of_a + part * next_rank * size + s[:, None] * size + k[None, :]
    tl.store(at, total_a * scale, mask=(s[:, None] < next_rank) & (k[None, :] < size))
    at = of_b + part * rank * size + k[None, :] * rank + r[:, None]
    tl.store(at, total_b * alpha, mask=(r[:, None] < rank) & (k[None, :] < size))


@triton.jit(do_not_specialize=_SEEDS)
def _dropped(y, out, count, scale, seed, second, threshold, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < count
    value = tl.load(y + i, mask=inside, other=0.0).to(tl.float32)
    value = tl.where(_kept(i, seed, second, threshold), value * scale, 0.0)
    tl.store(out + i, value, mask=inside)


@triton.jit
def _norm(x, weight, bias, out, eps, size, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    inside = i < size
    at = tl.program_id(0).to(tl.int64) * size + i
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    centered = tl.where(inside, value - tl.sum(value, 0) / size, 0.0)
    deviation = tl.sqrt(tl.sum(centered * centered, 0) / size + eps)
    w = tl.load(weight + i, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(bias + i, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, centered / deviation * w + b, mask=inside)


@triton.jit
def _norm_backward(gradient, x, weight, residual, eps, size, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    inside = i < size
    at = tl.program_id(0).to(tl.int64) * size + i
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    centered = tl.where(inside, value - tl.sum(value, 0) / size, 0.0)
    inverse = 1.0 / tl.sqrt(tl.sum(centered * centered, 0) / size + eps)
    unit = centered * inverse
    w = tl.load(weight + i, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(gradient + at, mask=inside, other=0.0).to(tl.float32) * w
    mean = tl.sum(g, 0) / size
    along = tl.sum(g * unit, 0) / size
    total = tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
    total += (g - mean - unit * along) * inverse
    tl.store(gradient + at, total, mask=inside)


@triton.jit
def _quantize(
    x, units, out, scale, size, x_stride,
    GELU: tl.constexpr, UNITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    inside = i < size
    value = tl.load(x + row * x_stride + i, mask=inside, other=0.0).to(tl.float32)
    if GELU:
        value = _gelu(value)
    if UNITS:
        value *= tl.load(units + i, mask=inside, other=0.0)
    unit = tl.maximum(tl.max(tl.abs(value), 0), 1e-30) / 448.0
    tl.store(scale + row, unit)
    tl.store(out + row * size + i, (value / unit).to(tl.float8e4nv), mask=inside)


@triton.jit
def _nibble(word, shift: tl.constexpr):
    # 2^23 + q is exact, and quicker than turning an integer into a float.
    return (((word >> shift) & 15) | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0


@triton.jit
def _largest(
    x, out, rows, size, chunk, x_stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    k = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    part = tl.program_id(1)
    found = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(part * chunk, tl.minimum(rows, (part + 1) * chunk), ROWS):
        m = first + tl.arange(0, ROWS)
        inside = (m[:, None] < rows) & (k[None, :] < size)
        value = tl.load(x + m[:, None].to(tl.int64) * x_stride + k[None, :], mask=inside, other=0.0)
        found = tl.maximum(found, tl.abs(value.to(tl.float32)))
    tl.store(out + part * size + k, tl.max(found, 0), mask=k < size)


@triton.jit
def _quantize_columns(
    x, scale, out, rows, length, size, x_stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    k = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    m = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    inside = (m[:, None] < rows) & (k[None, :] < size)
    value = tl.load(x + m[:, None].to(tl.int64) * x_stride + k[None, :], mask=inside, other=0.0)
    unit = tl.load(scale + k, mask=k < size, other=1.0)
    turned = tl.trans((value.to(tl.float32) / unit[None, :]).to(tl.float8e4nv))
    at = out + k[:, None].to(tl.int64) * length + m[None, :]
    tl.store(at, turned, mask=(k[:, None] < size) & (m[None, :] < length))


@triton.jit
def _unpack(
    weight, scale, center, units, out, rows, size, weight_stride, scale_stride, out_stride,
    BITS: tl.constexpr, IN_UNITS: tl.constexpr, PLAIN: tl.constexpr, TRANSPOSED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    group = tl.program_id(1)  # of 128 columns, which share a scale with 4 bits
    k = group * COLUMNS + tl.arange(0, COLUMNS)
    if BITS == 8:
        at = weight + n[:, None].to(tl.int64) * weight_stride + k[None, :]
        value = tl.load(at, mask=(n[:, None] < rows) & (k[None, :] < size), other=0)
        value = value.to(tl.float32)
        if not PLAIN:
            value *= tl.load(scale + n, mask=n < rows, other=0.0)[:, None]
    else:
        # Eight neighbours in a word, see `NIBBLES`: column c stands at bit 4 (c / 2) + 16 (c % 2).
        at = n.to(tl.int64) * scale_stride + group
        step = tl.load(scale + at, mask=n < rows, other=0.0).to(tl.float32)
        least = tl.load(center + at, mask=n < rows, other=0.0).to(tl.float32) - 8.0 * step
        if IN_UNITS:
            unit = tl.load(units + n, mask=n < rows, other=1.0)
            step, least = step / unit, least / unit
        word = group * (COLUMNS // 8) + tl.arange(0, COLUMNS // 8)
        at = weight + n[:, None].to(tl.int64) * weight_stride + word[None, :]
        w = tl.load(at, mask=n[:, None] < rows, other=0)
        even = tl.interleave(
            tl.interleave(_nibble(w, 0), _nibble(w, 8)),
            tl.interleave(_nibble(w, 4), _nibble(w, 12)),
        )
        odd = tl.interleave(
            tl.interleave(_nibble(w, 16), _nibble(w, 24)),
            tl.interleave(_nibble(w, 20), _nibble(w, 28)),
        )
        value = tl.interleave(even, odd) * step[:, None] + least[:, None]
    if TRANSPOSED:
        turned = tl.trans(value.to(out.dtype.element_ty))
        at = k[:, None].to(tl.int64) * out_stride + n[None, :]
        tl.store(out + at, turned, mask=(k[:, None] < size) & (n[None, :] < rows))
    else:
        at = n[:, None].to(tl.int64) * out_stride + k[None, :]
        tl.store(out + at, value, mask=(n[:, None] < rows) & (k[None, :] < size))

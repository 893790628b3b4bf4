"""Triton kernels over rows: embeddings, norms, rows in FP8.

All arithmetic is in float32; results are rounded once.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from plug.kernels.launch import overlap

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0


class Fp8Rows(NamedTuple):
    """Rows in FP8 with a float32 scale each: x = values * scale."""

    values: Tensor  # (rows, size), e4m3
    scale: Tensor  # (rows, 1)
    dtype: torch.dtype  # of x

    @classmethod
    def like(cls, x: Tensor) -> Fp8Rows:
        """Return rows of the shape of ``x`` (rows, size), without values."""
        scale = torch.empty(len(x), 1, dtype=torch.float32, device=x.device)
        return cls(torch.empty_like(x, dtype=FP8), scale, x.dtype)


def add_norm(x: Tensor, delta: Tensor | None, norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
    """Compute a residual sum and its LayerNorm.

    Args:
        x: (rows, size), contiguous.
        delta: what to add first, the same shape; None adds nothing.
        norm: with weight and bias of x's dtype.

    Returns:
        x + delta (x itself without delta), and the norm of it.
    """
    out = torch.empty_like(x)
    return _launch_add_norm(x, delta, norm, out, None), out


def add_norm_fp8(x: Tensor, delta: Tensor | None, norm: nn.LayerNorm) -> tuple[Tensor, Fp8Rows]:
    """Do as `add_norm`, and return the norm as `quantize_rows` would."""
    out = Fp8Rows.like(x)
    return _launch_add_norm(x, delta, norm, out.values, out.scale), out


def _launch_add_norm(
    x: Tensor, delta: Tensor | None, norm: nn.LayerNorm, out: Tensor, scale: Tensor | None
) -> Tensor:
    rows, size = x.shape
    total = x if delta is None else torch.empty_like(x)
    _add_norm[(rows,)](
        x,
        delta,
        norm.weight,
        norm.bias,
        total,
        out,
        scale,
        norm.eps,
        size,
        HAS_DELTA=delta is not None,
        IN_FP8=scale is not None,
        BLOCK=triton.next_power_of_2(size),
        num_warps=warps(size),
        **overlap(x.device),
    )
    return total


def embed(token_ids: Tensor, positions: Tensor, embeddings: Any) -> Tensor:
    """Compute `Embeddings` of tokens of type 0: ids and positions (rows,) to (rows, size)."""
    words = embeddings.word_embeddings.weight
    rows, size = len(token_ids), words.shape[1]
    out = words.new_empty(rows, size)
    _embed[(rows,)](
        token_ids,
        positions,
        words,
        embeddings.position_embeddings.weight,
        embeddings.token_type_embeddings.weight,
        embeddings.layer_norm.weight,
        embeddings.layer_norm.bias,
        out,
        embeddings.layer_norm.eps,
        size,
        BLOCK=triton.next_power_of_2(size),
        num_warps=warps(size),
        **overlap(out.device),
    )
    return out


def quantize_rows(x: Tensor, *, gelu: bool = False) -> Fp8Rows:
    """Round rows (rows, size) to FP8, in units of each row's largest value.

    Args:
        x: in any float dtype.
        gelu: round the exact GELU of x.
    """
    rows, size = x.shape
    out = Fp8Rows.like(x)
    block = triton.next_power_of_2(size)
    _quantize_rows[(rows,)](
        x,
        out.values,
        out.scale,
        size,
        GELU=gelu,
        BLOCK=block,
        num_warps=warps(size),
        **overlap(x.device),
    )
    return out


def gelu_(x: Tensor) -> Tensor:
    """Compute the exact GELU in place; what was just written is still in the card's cache."""
    _gelu_in_place[(triton.cdiv(x.numel(), 4096),)](x, x.numel(), BLOCK=4096)
    return x


def warps(size: int, most: int = 16) -> int:
    """Return one warp for each 1,024 elements of a row, at least 1; Triton takes powers of two."""
    return min(most, 2 ** (max(1, size // 1024).bit_length() - 1))


@triton.jit
def _normalized(value, inside, weight, bias, eps, size):
    mean = tl.sum(value, 0) / size
    centered = tl.where(inside, value - mean, 0.0)
    deviation = tl.sqrt(tl.sum(centered * centered, 0) / size + eps)
    return centered / deviation * weight.to(tl.float32) + bias.to(tl.float32)


@triton.jit
def _add_norm(
    x,
    delta,
    weight,
    bias,
    total,
    out,
    scale,
    eps,
    size,
    HAS_DELTA: tl.constexpr,
    IN_FP8: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    i = tl.arange(0, BLOCK)
    inside = i < size
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
    w = tl.load(weight + i, mask=inside, other=0.0)
    b = tl.load(bias + i, mask=inside, other=0.0)
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
    at = tl.program_id(0).to(tl.int64) * size + i
    loaded = tl.load(x + at, mask=inside, other=0.0)
    value = loaded.to(tl.float32)
    if HAS_DELTA:
        value += tl.load(delta + at, mask=inside, other=0.0).to(tl.float32)
        value = value.to(loaded.dtype).to(tl.float32)  # what the next layer will see
        tl.store(total + at, value, mask=inside)
    normalized = _normalized(value, inside, w, b, eps, size)
    if IN_FP8:
        normalized = normalized.to(loaded.dtype).to(tl.float32)
        _store_fp8(normalized, out + at, scale + tl.program_id(0), inside)
    else:
        tl.store(out + at, normalized, mask=inside)


@triton.jit
def _store_fp8(value, to, scale, inside):
    unit = tl.maximum(tl.max(tl.where(inside, tl.abs(value), 0.0), 0), 1e-12) / 448.0
    tl.store(scale, unit)
    tl.store(to, (value / unit).to(tl.float8e4nv), mask=inside)


@triton.jit
def _embed(
    token_ids,
    positions,
    words,
    places,
    types,
    weight,
    bias,
    out,
    eps,
    size,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    inside = i < size
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
    w = tl.load(weight + i, mask=inside, other=0.0)
    b = tl.load(bias + i, mask=inside, other=0.0)
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
    word = tl.load(token_ids + row).to(tl.int64)
    place = tl.load(positions + row).to(tl.int64)
    value = tl.load(words + word * size + i, mask=inside, other=0.0).to(tl.float32)
    value += tl.load(places + place * size + i, mask=inside, other=0.0).to(tl.float32)
    value += tl.load(types + i, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * size + i, _normalized(value, inside, w, b, eps, size), mask=inside)


@triton.jit
def _gelu(value):
    return 0.5 * value * (1.0 + tl.math.erf(value * 0.7071067811865476))


@triton.jit
def _gelu_in_place(x, size, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(x + at, _gelu(value), mask=inside)


@triton.jit
def _quantize_rows(
    x, out, scale, size, GELU: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    inside = i < size
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    value = tl.load(x + row * size + i, mask=inside, other=0.0).to(tl.float32)
    if GELU:
        value = _gelu(value)
    _store_fp8(value, out + row * size + i, scale + row, inside)

"""A Triton kernel of GELU's backward pass that sums the bias's gradient on the way.

Alone, that sum reads again all that the backward pass has just written.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

_ROWS, _COLUMNS, _STEPS, _WARPS = 16, 256, 16, 4  # a block, and how many a program takes


class BiasedGelu(torch.autograd.Function):
    """gelu(product + bias), exact (erf); (…, size) and (size,) to (…, size) in product's dtype."""

    @staticmethod
    def forward(ctx: Any, product: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(product, bias)
        return F.gelu(product.float() + bias.float()).to(product.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        product, bias = ctx.saved_tensors
        of_product, of_bias = gelu_backward(gradient, product, bias)
        return of_product, of_bias.sum(0).to(bias.dtype)


@torch.library.custom_op("plug::gelu_backward", mutates_args=())
def gelu_backward(gradient: Tensor, product: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradient of ``product``, and parts of the bias's gradient.

    Args:
        gradient: (…, size), of gelu(product + bias).
        product: (…, size).
        bias: (size,), contiguous.

    Returns:
        (…, size) in the dtype of ``product``, and float32 (parts, size), to be summed.
    """
    size = product.shape[-1]
    gradient, product = gradient.contiguous(), product.contiguous()
    of_product, of_bias = _empty(product)
    grid = (len(of_bias), triton.cdiv(size, _COLUMNS))
    _gelu_backward[grid](
        gradient, product, bias, of_product, of_bias, product.numel() // size, size,
        ROWS=_ROWS, COLUMNS=_COLUMNS, STEPS=_STEPS, num_warps=_WARPS,
    )  # fmt: skip
    return of_product, of_bias


@gelu_backward.register_fake
def _(gradient: Tensor, product: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ARG001
    return _empty(product)


def _empty(product: Tensor) -> tuple[Tensor, Tensor]:
    size = product.shape[-1]
    rows = product.numel() // size
    parts = (rows + _ROWS * _STEPS - 1) // (_ROWS * _STEPS)
    of_bias = product.new_empty((parts, size), dtype=torch.float32)
    return product.new_empty(product.shape), of_bias


@triton.jit
def _gelu_backward(
    gradient, product, bias, of_product, of_bias, rows, size,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(0)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < size
    added = tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    total = tl.zeros([COLUMNS], tl.float32)
    for step in range(STEPS):
        row = (part * STEPS + step) * ROWS + tl.arange(0, ROWS)
        place = row[:, None].to(tl.int64) * size + column[None, :]
        mask = (row < rows)[:, None] & inside[None, :]
        x = tl.load(product + place, mask=mask, other=0.0).to(tl.float32) + added[None, :]
        g = tl.load(gradient + place, mask=mask, other=0.0).to(tl.float32)
        share = 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)
        slope = share + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
        result = (g * slope).to(of_product.dtype.element_ty)
        tl.store(of_product + place, result, mask=mask)
        total += tl.sum(g * slope, 0)
    tl.store(of_bias + part * size + column, total, mask=inside)

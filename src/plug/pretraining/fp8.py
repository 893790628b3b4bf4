"""Linear layers whose three products are in FP8, applied to a model from outside.

y = x W^T + b, the gradient of x, and that of W: both operands are rounded to e4m3 along the sum, in
units of each row's largest value. So x, W and the gradient of y are rounded twice each, by rows and
by columns. Of x its columns alone are kept for the backward pass, in 8 bits. Weights are kept, and
gathered by FSDP2, as they are: they are rounded at each use, which takes a hundredth of a product.

Heads, the word table, norms, attention and the residual stream stay in bf16.
"""

from __future__ import annotations

import weakref
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from plug.errors import UsageError
from plug.finetuning.adapted_products import functions
from plug.finetuning.recomputation import layers_of
from plug.model.plug import Plug

MULTIPLE = 16  # sizes that the cards' FP8 products take


def check_fp8(device: torch.device) -> None:
    """Raise a `UsageError` unless the device multiplies FP8 rows with a scale each."""
    if device.type != "cuda":
        raise UsageError(
            "fp8_products 要有 FP8 乘法的显卡（计算能力 9.0 起，如 H100），现在用的是 CPU。"
            "请去掉这项设置。"
        )
    found = torch.cuda.get_device_capability(device)
    if found < (9, 0):
        raise UsageError(
            f"fp8_products 要计算能力 9.0 起的显卡（如 H100），{torch.cuda.get_device_name(device)}"
            f" 是 {found[0]}.{found[1]}。请去掉这项设置。"
        )


def multiply_in_fp8(model: Plug) -> None:
    """Have the linear layers of encoder and decoder multiply in FP8; before the model is sharded.

    Raises:
        UsageError: a size is no multiple of 16.
    """
    config = model.config
    for name in ("hidden_size", "intermediate_size"):
        if getattr(config, name) % MULTIPLE:
            raise UsageError(
                f"fp8_products 要求 {name} 是 {MULTIPLE} 的倍数，现在是 {getattr(config, name)}。"
                "请改大小，或去掉这项设置。"
            )
    for layer in layers_of(model):
        for part in layer.modules():
            if isinstance(part, nn.Linear):
                part.__class__ = Fp8Linear


class Fp8Linear(nn.Linear):
    """As `nn.Linear`, multiplied in FP8, forward and backward."""

    def forward(self, x: Tensor) -> Tensor:
        keeps = torch.is_grad_enabled() and (x.requires_grad or self.weight.requires_grad)
        rounded = _rounded(x, keeps)
        return cast(Tensor, _Multiply.apply(x, self.weight, self.bias, *rounded))


class _Last:
    """The input that was rounded last: queries, keys and values read the same one."""

    source: weakref.ref[Tensor] | None = None
    version = 0
    rounded: tuple[Tensor | None, ...] = ()


def _rounded(x: Tensor, keeps: bool) -> tuple[Tensor | None, ...]:
    """Rows of ``x`` in FP8 and their scales; with ``keeps`` its columns too, else None twice."""
    known = _Last.source is not None and _Last.source() is x and _Last.version == x._version
    if known and (not keeps or _Last.rounded[2] is not None):
        return _Last.rounded
    with torch.no_grad():
        run, flat = functions(x), x.reshape(-1, x.shape[-1])
        rows = run.quantize(flat)
        columns = run.quantize_columns(flat) if keeps else (None, None)
        _Last.rounded = (rows[0], rows[1], columns[0], columns[1])
    _Last.source, _Last.version = weakref.ref(x, _forget), x._version
    return _Last.rounded


def _forget(source: weakref.ref[Tensor]) -> None:
    """Let go of what was rounded when its source has gone."""
    if _Last.source is source:
        _Last.source, _Last.rounded = None, ()


class _Multiply(torch.autograd.Function):
    """x W^T + b from rounded x; ``x`` itself is there for its shape and its gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        rows: Tensor,
        row_scale: Tensor,
        columns: Tensor | None,
        column_scale: Tensor | None,
    ) -> Tensor:
        run = functions(x)
        w = run.quantize(weight)
        out = x.new_empty(len(rows), len(weight))
        run.multiply_fp8(run.Fp8Rows(rows, row_scale, x.dtype), *_operand(w), bias, out)
        ctx.save_for_backward(weight, columns, column_scale)
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        weight, columns, column_scale = ctx.saved_tensors
        run = functions(gradient)
        of_y = gradient.reshape(-1, gradient.shape[-1])
        of_x = of_weight = of_bias = None
        if ctx.needs_input_grad[0]:
            flat = of_y.new_empty(len(of_y), weight.shape[1])
            w = run.quantize_columns(weight)
            run.multiply_fp8(run.quantize(of_y), *_operand(w), None, flat)
            of_x = flat.view(*gradient.shape[:-1], -1)
        if ctx.needs_input_grad[1]:
            # A sum over all tokens: too long for the coarse sums of `fast`.
            of_weight = of_y.new_empty(weight.shape)
            turned = run.quantize_columns(of_y)
            run.multiply_fp8(turned, columns, column_scale.flatten(), None, of_weight, fast=False)
            of_weight = of_weight.to(weight.dtype)
        if ctx.needs_input_grad[2]:
            of_bias = of_y.sum(0, dtype=torch.float32).to(weight.dtype)
        return of_x, of_weight, of_bias, None, None, None, None


def _operand(rows: Any) -> tuple[Tensor, Tensor]:
    """A rounded matrix as the second operand of `multiply_fp8`: values, and a scale a row."""
    return rows[0], rows[1].flatten()

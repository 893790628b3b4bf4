"""The fastest product of few rows with a weight, on each device. The decoding engine calls it."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Product = Callable[[Tensor], Tensor]

# Half of the smallest step of float16: what rounding can cost the tiniest weights (below 2^-14).
_NEGLIGIBLE = 2.0**-25


def product(weight: Tensor, bias: Tensor | None) -> Product:
    """A function from (…, in) to (…, out), `F.linear` with what the device does best.

    On a CPU, float32 weights that float16 holds without loss (all that were saved in bfloat16 or
    float16) are packed in it for FBGEMM: activations and sums stay in float32, half as much is
    read, and a product with one row takes a fifth to a third of the time.

    Args:
        weight: (out, in).
        bias: (out,) or None.
    """
    weight = weight.detach()
    if _fits_half(weight):
        packed = torch.ops.quantized.linear_prepack_fp16(weight, bias)
        multiply = torch.ops.quantized.linear_dynamic_fp16.default
        return lambda x: multiply(x, packed)
    return lambda x: F.linear(x, weight, bias)


def _fits_half(weight: Tensor) -> bool:
    if weight.device.type != "cpu" or weight.dtype != torch.float32:
        return False
    if "fbgemm" not in torch.backends.quantized.supported_engines:
        return False
    return bool((weight.half().float() - weight).abs_().max() <= _NEGLIGIBLE)

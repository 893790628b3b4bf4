"""The fastest product of few rows with a weight, on each device. The decoding engine calls it.

On a CPU these serve where `kernels/cpu` cannot be built.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from plug.quantization.scheme import unpack_nibbles

Product = Callable[[Tensor], Tensor]

# Half of the smallest step of float16: what rounding can cost the tiniest weights (below 2^-14).
_NEGLIGIBLE = 2.0**-25


def product(weight: Tensor, bias: Tensor | None, *, lossless: bool = True) -> Product:
    """A function from (…, in) to (…, out), `F.linear` with what the device does best.

    On a CPU, float32 weights that float16 holds without loss (all that were saved in bfloat16 or
    float16) are packed in it for FBGEMM: activations and sums stay in float32, half as much is
    read, and a product with one row takes a fifth to a third of the time. Each row's sum is the
    same whatever other rows there are.

    Args:
        weight: (out, in).
        bias: (out,) or None.
        lossless: False packs weights that are rounded by it (by 2^-11 at most) as well.
    """
    weight = weight.detach()
    if _packs(weight, lossless):
        packed = torch.ops.quantized.linear_prepack_fp16(weight, bias)
        multiply = torch.ops.quantized.linear_dynamic_fp16.default._op
        return lambda x: multiply(x, packed)
    return lambda x: F.linear(x, weight, bias)


def product_8bit(
    weight: Tensor, scale: Tensor, bias: Tensor, *, row_by_row: bool = True
) -> Product | None:
    """The same for int8 weights (out, in) and one scale an output; None where there is no kernel.

    On a CPU, FBGEMM's product of integers: activations are rounded to 8 bits over their range. The
    kernel has one range for all it is given: ``row_by_row`` multiplies rows one by one, so that
    they do not depend on each other; without it they do, as the tokens of one source may.
    """
    if not _has_fbgemm(weight):
        return None
    zeros = torch.zeros(len(scale), dtype=torch.long)
    with warnings.catch_warnings():
        # PyTorch 2.13 announces the end of such tensors, and has no other way to pack for FBGEMM.
        warnings.filterwarnings("ignore", message=".*quantized tensor creation.*")
        quantized = torch._make_per_channel_quantized_tensor(weight, scale.double(), zeros, 0)
        packed = torch.ops.quantized.linear_prepack(quantized, bias)
    multiply = torch.ops.quantized.linear_dynamic.default._op
    # Without VNNI, sums of two products can overflow their 16 bits unless a bit is spared.
    spare_a_bit = not torch.cpu._is_vnni_supported()

    def rows(x: Tensor) -> Tensor:
        if not row_by_row or x.numel() == x.shape[-1]:
            return multiply(x, packed, spare_a_bit)
        parts = [multiply(row, packed, spare_a_bit) for row in x.reshape(-1, 1, x.shape[-1])]
        return torch.cat(parts).view(*x.shape[:-1], -1)

    return rows


def product_4bit(weight: Tensor, scale: Tensor, center: Tensor, bias: Tensor) -> Product | None:
    """The same for 4-bit weights (out, in / 2), as `pack_nibbles` has them, and groups of inputs.

    On a CPU, PyTorch's kernel with activations in bfloat16 and sums in float32.
    """
    if not _has_fbgemm(weight):
        return None
    unpacked = unpack_nibbles(weight).int()
    packed = torch._convert_weight_to_int4pack_for_cpu(unpacked, 1)
    group_size = unpacked.shape[1] // scale.shape[1]
    scales = torch.stack([scale, center], dim=2).transpose(0, 1).contiguous().bfloat16()
    multiply = torch.ops.aten._weight_int4pack_mm_for_cpu.default._op

    def rows(x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1]).bfloat16()
        result = multiply(flat, packed, group_size, scales).float().add_(bias)
        return result.view(*x.shape[:-1], -1)

    return rows


def _has_fbgemm(weight: Tensor) -> bool:
    supported = "fbgemm" in torch.backends.quantized.supported_engines
    return weight.device.type == "cpu" and supported


def fits_halves(weight: Tensor) -> bool:
    """Whether float16 holds float32 weights without loss, as all do that were saved in 16 bits."""
    return bool((weight.half().float() - weight).abs_().max() <= _NEGLIGIBLE)


def _packs(weight: Tensor, lossless: bool) -> bool:
    if not _has_fbgemm(weight) or weight.dtype != torch.float32:
        return False
    return fits_halves(weight) if lossless else bool(weight.half().isfinite().all())

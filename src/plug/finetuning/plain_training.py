"""The functions of `plug.kernels.training` in plain PyTorch: for a CPU, and to compare with."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plug.quantization.scheme import Scheme

FP8, FP8_MAX = torch.float8_e4m3fn, 448.0
_WORD = 2**32 - 1


class Fp8Rows(tuple[Tensor, Tensor, torch.dtype]):
    """Values (rows, size) in FP8, float32 scales (rows, 1), and the dtype of their product."""


def project(
    x: Tensor,
    a: Tensor,
    *,
    alpha: float = 1.0,
    gelu: bool = False,
    rate: float = 0.0,
    seed: int = 0,
) -> Tensor:
    """Compute alpha * dropout(x) a^T."""
    return alpha * (_input(x, gelu, rate, seed) @ a.t().to(x.dtype))


def outer(
    u: Tensor,
    x: Tensor,
    *,
    alpha: float = 1.0,
    gelu: bool = False,
    rate: float = 0.0,
    seed: int = 0,
    transposed: bool = False,
) -> Tensor:
    """Compute alpha * u^T dropout(x) in float32, or its transpose."""
    found = alpha * (u.float().t() @ _input(x, gelu, rate, seed).float())
    return found.t() if transposed else found


def expand_(
    y: Tensor,
    u: Tensor,
    b: Tensor,
    *,
    alpha: float = 1.0,
    rate: float = 0.0,
    seed: int = 0,
    before_gelu: Tensor | None = None,
) -> Tensor:
    """Add alpha * dropout(u b) in place; then multiply by the derivative of GELU."""
    y += alpha * _dropout(u @ b.to(u.dtype), rate, seed)
    if before_gelu is not None:
        with torch.enable_grad():
            x = before_gelu.detach().requires_grad_()
            (slope,) = torch.autograd.grad(F.gelu(x).sum(), x)
        y *= slope
    return y


def residual_(y: Tensor, x: Tensor, *, rate: float, seed: int) -> Tensor:
    """Return x + dropout(y)."""
    return x + _dropout(y, rate, seed)


def dropped(gradient: Tensor, *, rate: float, seed: int) -> Tensor:
    """Return the gradient of y in `residual_`."""
    return _dropout(gradient, rate, seed)


def norm(x: Tensor, layer: nn.LayerNorm) -> Tensor:
    """Return the LayerNorm."""
    return F.layer_norm(x, layer.normalized_shape, layer.weight, layer.bias, layer.eps)


def norm_backward_(gradient: Tensor, x: Tensor, layer: nn.LayerNorm, residual: Tensor) -> Tensor:
    """Return ``residual`` + the gradient of the norm's input."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        (found,) = torch.autograd.grad(norm(x, layer), x, gradient)
    return residual + found


def gelu(x: Tensor) -> Tensor:
    """Return the exact GELU."""
    return F.gelu(x)


def quantize(x: Tensor, units: Tensor | None = None, *, gelu: bool = False) -> Fp8Rows:
    """Round the rows of x * units to FP8."""
    value = F.gelu(x.float()) if gelu else x.float()
    if units is not None:
        value = value * units
    scale = value.abs().amax(1, keepdim=True).clamp_min(1e-30) / FP8_MAX
    return Fp8Rows(((value / scale).to(FP8), scale, x.dtype))


def multiply_fp8(x: Fp8Rows, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """Multiply rows with a weight in FP8 (out, in), whose rows have the units ``scale``."""
    values, units, dtype = x
    found = (values.float() * units) @ (weight.float() * scale[:, None]).t()
    return (found if bias is None else found + bias).to(dtype)


def unpack(
    weight: Tensor,
    scale: Tensor,
    center: Tensor | None,
    out: Tensor,
    *,
    units: Tensor | None = None,
    transposed: bool = False,
) -> None:
    """Dequantise into ``out``; see the kernel."""
    if center is not None:
        tensors = {"weight": weight, "scale": scale, "center": center}
        found = Scheme.of(4).dequantize(tensors, torch.float32)
    elif out.dtype == FP8:
        found = weight.float()
    else:
        found = Scheme.of(8).dequantize({"weight": weight, "scale": scale}, torch.float32)
    if units is not None:
        found = found / units[:, None]
    out.copy_(found.t() if transposed else found)


def _input(x: Tensor, gelu: bool, rate: float, seed: int) -> Tensor:
    return _dropout(F.gelu(x) if gelu else x, rate, seed)


def _dropout(x: Tensor, rate: float, seed: int) -> Tensor:
    if rate == 0:
        return x
    return torch.where(_kept(x.shape, rate, seed, x.device), x / (1 - rate), 0.0)


def _kept(shape: torch.Size, rate: float, seed: int, device: torch.device) -> Tensor:
    """Return which elements dropout keeps: the kernels' hash of place and seed, in 32 bits."""
    h = torch.arange(shape.numel(), device=device) & _WORD
    h = ((h ^ (seed & _WORD)) * 0x9E3779B1) & _WORD
    h = h ^ (h >> 15)
    h = (h + ((seed * 0x27D4EB2F) & _WORD)) & _WORD
    h = (h * 0x85EBCA6B) & _WORD
    h = h ^ (h >> 13)
    h = (h * 0xC2B2AE35) & _WORD
    h = h ^ (h >> 16)
    return (h >= (int(rate * 2**32) & _WORD)).view(shape)

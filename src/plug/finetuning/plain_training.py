"""The functions of `plug.kernels.training` in plain PyTorch: for a CPU, and to compare with."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plug.quantization.scheme import Scheme

FP8, FP8_MAX = torch.float8_e4m3fn, 448.0
_MULTIPLE = 16  # of rows that a card's FP8 products sum over
_WORD = 2**32 - 1


class Fp8Rows(NamedTuple):
    """Rows in FP8, as those of `plug.kernels.rows`, which needs Triton."""

    values: Tensor  # (rows, size)
    scale: Tensor  # float32 (rows, 1)
    dtype: torch.dtype  # of their product


def project(
    x: Tensor, a: Tensor, *, alpha: float = 1.0, rate: float = 0.0, seed: int = 0
) -> Tensor:
    """Compute alpha * dropout(x) a^T."""
    return alpha * (dropped(x, rate=rate, seed=seed) @ a.t().to(x.dtype))


def outer(
    u: Tensor,
    x: Tensor,
    *,
    alpha: float = 1.0,
    rate: float = 0.0,
    seed: int = 0,
    transposed: bool = False,
) -> Tensor:
    """Compute alpha * u^T dropout(x) in float32, or its transpose."""
    found = alpha * (u.float().t() @ dropped(x, rate=rate, seed=seed).float())
    return found.t() if transposed else found


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
    """Add alpha * u b in place, then ``residual``; see the kernel for what is dropped."""
    added = alpha * (u @ b.to(u.dtype))
    if residual is None:
        y += dropped(added, rate=rate, seed=seed)
    else:
        y.copy_(residual + dropped(y + added, rate=rate, seed=seed))
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
    """Add alpha * u b to ``y``; return dropout(gelu(y)) a^T, and gelu(y)."""
    expand_(y, u, b, alpha=alpha)
    activated = F.gelu(y)
    return project(activated, a, rate=rate, seed=seed), activated if wants_gelu else None


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
    """Make ``gradient`` that of ``y``; return those of the thin matrices."""
    of_a = outer(u, F.gelu(y), rate=rate, seed=seed)
    with torch.enable_grad():
        x = y.detach().requires_grad_()
        (slope,) = torch.autograd.grad(F.gelu(x).sum(), x)
    expand_(gradient, u, a, rate=rate, seed=seed).mul_(slope)
    return of_a, outer(thin, gradient, alpha=alpha, transposed=True)


def dropped(gradient: Tensor, *, rate: float, seed: int) -> Tensor:
    """Return dropout of a tensor."""
    if rate == 0:
        return gradient
    kept = _kept(gradient.shape, rate, seed, gradient.device)
    return torch.where(kept, gradient / (1 - rate), 0.0)


def norm(x: Tensor, layer: nn.LayerNorm) -> Tensor:
    """Return the LayerNorm."""
    return F.layer_norm(x, layer.normalized_shape, layer.weight, layer.bias, layer.eps)


def norm_backward_(gradient: Tensor, x: Tensor, layer: nn.LayerNorm, residual: Tensor) -> Tensor:
    """Return ``residual`` + the gradient of the norm's input."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        (found,) = torch.autograd.grad(norm(x, layer), x, gradient)
    return residual + found


def quantize(x: Tensor, units: Tensor | None = None, *, gelu: bool = False) -> Fp8Rows:
    """Round the rows of x * units to FP8."""
    value = F.gelu(x.float()) if gelu else x.float()
    if units is not None:
        value = value * units
    scale = value.abs().amax(1, keepdim=True).clamp_min(1e-30) / FP8_MAX
    return Fp8Rows((value / scale).to(FP8), scale, x.dtype)


def quantize_columns(x: Tensor) -> Fp8Rows:
    """Round the columns of ``x`` to FP8; the kernel says how."""
    turned = x.t().contiguous()
    return quantize(F.pad(turned, (0, -len(x) % _MULTIPLE)))


def multiply_fp8(
    x: Fp8Rows,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    out: Tensor,
    *,
    fast: bool = True,  # noqa: ARG001 (sums are in float32 here)
) -> None:
    """Multiply rows with a weight in FP8 (out, in), whose rows have the units ``scale``."""
    values, units, _ = x
    found = (values.float() * units) @ (weight.float() * scale[:, None]).t()
    out.copy_(found if bias is None else found + bias)


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


def _kept(shape: torch.Size, rate: float, seed: int, device: torch.device) -> Tensor:
    """Return which elements dropout keeps: the kernels' hash of place and seed, in 32 bits."""
    h = torch.arange(shape.numel(), device=device) & _WORD
    h = h ^ (seed & _WORD)
    h = ((h ^ (h >> 16)) * 0x7FEB352D) & _WORD
    h = ((h ^ (h >> 15)) + ((seed * 0x27D4EB2F) & _WORD)) & _WORD
    h = (h * 0x846CA68B) & _WORD
    return (h >= (int(rate * 2**32) & _WORD)).view(shape)

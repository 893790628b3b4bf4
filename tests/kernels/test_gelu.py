"""GELU with a bias: the backward pass against PyTorch's in float64."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("triton", reason="needs triton, which PyTorch for CUDA brings along")

from plug.kernels.gelu import BiasedGelu, gelu_backward


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 8), (3, 100, 300), (2, 256, 256)])
def test_against_float64(
    shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator
) -> None:
    product = (3 * torch.randn(shape, generator=generator)).to(dtype)
    bias, gradient = torch.randn(shape[-1], generator=generator), torch.randn_like(product)
    exact = [each.double().requires_grad_() for each in (product, bias)]
    expected = F.gelu(exact[0] + exact[1])
    theirs = torch.autograd.grad(expected, exact, gradient.double())
    inputs = (product.requires_grad_(), bias.requires_grad_())

    found = BiasedGelu.apply(*inputs)

    ours = torch.autograd.grad(found, inputs, gradient)
    for one, other in zip((found, *ours), (expected, *theirs), strict=True):
        assert one.shape == other.shape
        rounding = 1e-5 if one.dtype == torch.float32 else 8e-3
        torch.testing.assert_close(one.double(), other, rtol=rounding, atol=rounding)


def test_what_the_compiler_is_told(generator: torch.Generator) -> None:
    product, gradient = torch.randn(2, 2, 9, 24, generator=generator)
    torch.library.opcheck(gelu_backward, (gradient, product, torch.zeros(24)))

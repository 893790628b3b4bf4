"""Gradients through quantised layers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from plug.quantization.linear import QuantizedLinear
from plug.quantization.scheme import Scheme

BOTH = pytest.mark.parametrize("bits", [8, 4])


def filled(bits: int) -> QuantizedLinear:
    torch.manual_seed(0)
    scheme = Scheme.of(bits)
    layer = QuantizedLinear(128, 6, scheme)
    layer.load_state_dict({**scheme.quantize(torch.randn(6, 128)), "bias": torch.randn(6)})
    return layer


@BOTH
@pytest.mark.parametrize("autocast", [False, True])
def test_the_gradient_of_the_inputs_is_that_of_the_dequantised_weight(
    bits: int, autocast: bool
) -> None:
    layer = filled(bits)
    x, upstream = torch.randn(2, 3, 128, requires_grad=True), torch.randn(2, 3, 6)

    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = layer(x)
        expected = F.linear(x, layer.dequantized(x.dtype), layer.get_buffer("bias"))
    (gradient,) = torch.autograd.grad(y, x, upstream.to(y.dtype))
    (expected_gradient,) = torch.autograd.grad(expected, x, upstream.to(y.dtype))

    assert y.dtype == expected.dtype
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(gradient, expected_gradient)


@BOTH
def test_floats_of_the_weight_are_not_kept_for_the_backward_pass(bits: int) -> None:
    layer = filled(bits)
    kept: list[torch.Size] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(torch.randn(3, 128, requires_grad=True)).sum().backward()

    assert torch.Size([6, 128]) not in kept


@BOTH
def test_nothing_of_the_layer_is_trained(bits: int) -> None:
    layer = filled(bits)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}

    layer(torch.randn(3, 128, requires_grad=True)).sum().backward()

    assert list(layer.parameters()) == []
    assert all(torch.equal(tensor, before[name]) for name, tensor in layer.state_dict().items())

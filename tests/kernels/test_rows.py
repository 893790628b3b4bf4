"""Kernels over rows against PyTorch's own functions in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

pytest.importorskip("triton", reason="needs triton, which PyTorch for CUDA brings along")

from plug.kernels.rows import add_norm, embed, gelu_, quantize_rows, unpack_4bit
from plug.model.configuration import PRESETS
from plug.model.layers import Embeddings
from plug.quantization.scheme import Scheme


def norm(size: int, generator: torch.Generator) -> nn.LayerNorm:
    made = nn.LayerNorm(size, eps=1e-5)
    made.weight.data = 1 + 0.1 * torch.randn(size, generator=generator)
    made.bias.data = torch.randn(size, generator=generator)
    return made


@pytest.mark.parametrize("size", [64, 96, 1024])
@pytest.mark.parametrize("adds", [False, True])
@torch.inference_mode()
def test_the_sum_and_its_norm(adds: bool, size: int, generator: torch.Generator) -> None:
    x, delta = 3 * torch.randn(2, 5, size, generator=generator) + 1
    layer = norm(size, generator)

    total, normalized = add_norm(x, delta if adds else None, layer)

    expected = x.double() + (delta.double() if adds else 0)
    torch.testing.assert_close(total.double(), expected)
    torch.testing.assert_close(normalized.double(), layer.double()(expected), atol=1e-5, rtol=1e-5)


@torch.inference_mode()
def test_a_sum_in_half_precision_is_rounded_before_its_norm(generator: torch.Generator) -> None:
    x, delta = torch.randn(2, 4, 64, generator=generator).bfloat16()
    layer = norm(64, generator).bfloat16()

    total, normalized = add_norm(x, delta, layer)

    # The interpreter cuts off where a GPU rounds.
    torch.testing.assert_close(total, x + delta, atol=0, rtol=2**-7)
    expected = layer.double()(total.double())
    torch.testing.assert_close(normalized.double(), expected, atol=0.02, rtol=2**-8)


@torch.inference_mode()
def test_embeddings_of_tokens_anywhere(generator: torch.Generator) -> None:
    embeddings = Embeddings(PRESETS["test"]).eval()
    for parameter in embeddings.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    ids, positions = torch.tensor([7, 3, 7, 0]), torch.tensor([0, 5, 1, 2])

    got = embed(ids, positions, embeddings)

    expected = embeddings(ids[:, None], position_ids=positions[:, None])[:, 0]
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@torch.inference_mode()
def test_rows_that_fp8_can_hold_are_held_exactly(generator: torch.Generator) -> None:
    # Whole multiples of a unit that e4m3 has: the interpreter does not round as a GPU does.
    held = torch.randint(-15, 16, (3, 96), generator=generator) * 2.0 ** torch.randint(
        -3, 5, (3, 96), generator=generator
    )
    held[:, 5] = -448
    held[1] = 0
    units = torch.tensor([[2.0**-9], [1.0], [2.0**7]])

    eight, scale = quantize_rows((held * units).bfloat16())

    assert torch.equal(eight.float(), held)
    assert torch.equal(scale[[0, 2]], units[[0, 2]])


@torch.inference_mode()
def test_gelu_in_place_and_before_rounding(generator: torch.Generator) -> None:
    x = 3 * torch.randn(5, 1000, generator=generator)
    expected = F.gelu(x.double())

    eight, scale = quantize_rows(x, gelu=True)
    got = gelu_(x.clone())

    torch.testing.assert_close(got.double(), expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(
        scale[:, 0].double(), expected.abs().amax(1) / 448, atol=0, rtol=1e-5
    )
    # The interpreter's own rounding to FP8 goes wrong now and then, never by more than half.
    error = (eight.double() * scale - expected).norm() / expected.norm()
    assert error < (0.04 if x.is_cuda else 0.3)


@torch.inference_mode()
def test_four_bits_become_numbers(generator: torch.Generator) -> None:
    scheme = Scheme.of(4)
    tensors = scheme.quantize(torch.randn(6, 384, generator=generator))

    got = unpack_4bit(tensors["weight"], tensors["scale"], tensors["center"], None)

    expected = scheme.dequantize(tensors, torch.float32)
    torch.testing.assert_close(got.float(), expected, atol=0, rtol=2**-7)


@torch.inference_mode()
def test_four_bits_become_fp8_in_units_of_their_row(generator: torch.Generator) -> None:
    weight = torch.randint(0, 256, (3, 192), dtype=torch.uint8, generator=generator)
    scale = 2.0 ** torch.randint(-4, 3, (3, 3), generator=generator)
    tensors = {"weight": weight, "scale": scale, "center": torch.zeros(3, 3)}
    row_scale = torch.tensor([1.0, 0.5, 4.0])

    got = unpack_4bit(weight, scale, tensors["center"], row_scale)

    expected = Scheme.of(4).dequantize(tensors, torch.float32)
    assert torch.equal(got.float() * row_scale[:, None], expected)

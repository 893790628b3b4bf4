"""Kernels over rows against PyTorch's own functions in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

pytest.importorskip("triton", reason="needs triton, which PyTorch for CUDA brings along")

from plug.kernels.rows import add_norm, add_norm_fp8, embed, gelu_, quantize_rows, warps
from plug.model.configuration import PRESETS
from plug.model.layers import Embeddings


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

    eight, scale, _ = quantize_rows((held * units).bfloat16())

    assert torch.equal(eight.float(), held)
    assert torch.equal(scale[[0, 2]], units[[0, 2]])


@torch.inference_mode()
def test_a_norm_in_fp8_is_the_rounded_norm(generator: torch.Generator) -> None:
    x, delta = torch.randn(2, 5, 96, generator=generator).bfloat16()
    layer = norm(96, generator).bfloat16()

    total, got = add_norm_fp8(x, delta, layer)

    expected_total, normalized = add_norm(x, delta, layer)
    expected = quantize_rows(normalized)
    assert torch.equal(total, expected_total)
    assert torch.equal(got.values.float(), expected.values.float())
    assert torch.equal(got.scale, expected.scale)
    assert got.dtype == torch.bfloat16


@torch.inference_mode()
def test_gelu_in_place_and_before_rounding(generator: torch.Generator) -> None:
    x = 3 * torch.randn(5, 1000, generator=generator)
    expected = F.gelu(x.double())

    eight, scale, _ = quantize_rows(x, gelu=True)
    got = gelu_(x.clone())

    torch.testing.assert_close(got.double(), expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(
        scale[:, 0].double(), expected.abs().amax(1) / 448, atol=0, rtol=1e-5
    )
    # The interpreter's own rounding to FP8 goes wrong now and then, never by more than half.
    error = (eight.double() * scale - expected).norm() / expected.norm()
    assert error < (0.04 if x.is_cuda else 0.3)


@pytest.mark.parametrize("size", [1, 64, 1536, 3072, 5120, 8192, 24576, 32768, 10**6])
@pytest.mark.parametrize("most", [4, 16, 32])
def test_the_number_of_warps_is_a_power_of_two(size: int, most: int) -> None:
    count = warps(size, most)
    assert count.bit_count() == 1
    assert count == most or size / 2048 < count <= max(1, size / 1024)

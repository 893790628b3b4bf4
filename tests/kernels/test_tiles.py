"""4-bit weights in tiles against the weights that `Scheme` says they are."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="needs triton, which PyTorch for CUDA brings along")

from plug.kernels.tiles import tile_4bit, unpack_4bit
from plug.quantization.scheme import Scheme


@torch.inference_mode()
def test_a_tile_is_16_outputs_of_one_group(generator: torch.Generator) -> None:
    weight = torch.randint(0, 256, (48, 192), dtype=torch.uint8, generator=generator)
    scale, center = torch.randn(2, 48, 3, generator=generator).bfloat16()

    tiles, pairs = tile_4bit(weight, scale, center)

    assert torch.equal(tiles[1, 2, 5], weight[16 + 5, 2 * 64 :])
    assert torch.equal(pairs[2, 1, 3], torch.stack([scale[32 + 3, 1], center[32 + 3, 1]]))


@torch.inference_mode()
def test_four_bits_become_numbers(generator: torch.Generator) -> None:
    scheme = Scheme.of(4)
    tensors = scheme.quantize(torch.randn(48, 640, generator=generator))

    got = unpack_4bit(*tile_4bit(**tensors), None)

    expected = scheme.dequantize(tensors, torch.float32)
    torch.testing.assert_close(got.float(), expected, atol=0, rtol=2**-7)


@torch.inference_mode()
def test_four_bits_become_fp8_in_units_of_their_row(generator: torch.Generator) -> None:
    weight = torch.randint(0, 256, (32, 192), dtype=torch.uint8, generator=generator)
    scale = (2.0 ** torch.randint(-4, 3, (32, 3), generator=generator)).bfloat16()
    tensors = {"weight": weight, "scale": scale, "center": torch.zeros_like(scale)}
    row_scale = 2.0 ** torch.randint(-2, 3, (32,), generator=generator)

    got = unpack_4bit(*tile_4bit(**tensors), row_scale)

    expected = Scheme.of(4).dequantize(tensors, torch.float32)
    assert torch.equal(got.float() * row_scale[:, None], expected)

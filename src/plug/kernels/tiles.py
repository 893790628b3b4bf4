"""4-bit weights in tiles, in the order in which `skinny_gemm.cu` reads them, and out of them."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from plug.kernels.launch import compile_kernel, launch
from plug.quantization.scheme import unpack_nibbles

_THREADS = 256


def tile_4bit(weight: Tensor, scale: Tensor, center: Tensor) -> tuple[Tensor, Tensor]:
    """Reorder 4-bit weights of `plug.quantization.scheme` into tiles of 16 outputs and one group.

    A product reads a tile at a time. In a tile its bytes lie together, and so do its scales.

    Args:
        weight: uint8 (out, in / 2), with ``out`` a multiple of 16.
        scale: (out, in / 128).
        center: the same.

    Returns:
        Weights (out / 16, in / 128, 16, 64) uint8, and pairs of a scale and a center
        (out / 16, in / 128, 16, 2).
    """
    groups = scale.shape[1]
    tiles = weight.view(-1, 16, groups, 64).transpose(1, 2).contiguous()
    pairs = torch.stack([scale, center], 2).view(-1, 16, groups, 2).transpose(1, 2).contiguous()
    return tiles, pairs


def unpack_4bit(tiles: Tensor, pairs: Tensor, row_scale: Tensor | None) -> Tensor:
    """Dequantise the weights that `tile_4bit` returned, to (out, in).

    Args:
        tiles: of weights.
        pairs: of a scale and a center, bfloat16.
        row_scale: float32 (out,): the result is FP8 in units of it. None gives bfloat16.
    """
    blocks, groups = tiles.shape[:2]
    dtype = torch.bfloat16 if row_scale is None else torch.float8_e4m3fn
    if not tiles.is_cuda:
        return _unpacked(tiles, pairs, row_scale).to(dtype)
    out = torch.empty(16 * blocks, 128 * groups, dtype=dtype, device=tiles.device)
    count = tiles.numel() // 16  # a thread takes 16 bytes
    units = pairs if row_scale is None else row_scale  # not read without FP8
    arguments = (tiles, pairs, units, out, groups, count)
    kernel = _kernel(row_scale is not None, tiles.device.index)
    launch(kernel, -(-count // _THREADS), _THREADS, arguments)
    return out


def _unpacked(tiles: Tensor, pairs: Tensor, row_scale: Tensor | None) -> Tensor:
    rows = 16 * len(tiles)
    q = unpack_nibbles(tiles.transpose(1, 2).reshape(rows, -1)).unflatten(1, (-1, 128))
    scale, center = pairs.transpose(1, 2).reshape(rows, -1, 2).float().split(1, dim=2)
    weight = ((q - 8.0) * scale + center).flatten(1)
    return weight if row_scale is None else weight / row_scale[:, None]


@cache
def _kernel(in_fp8: bool, _device: int) -> Any:
    return compile_kernel("unpack_4bit.cu", "unpack_4bit", {"FP8": int(in_fp8)})

"""Attention of a decoding step against softmax written out, row by row in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="needs triton, which PyTorch for CUDA brings along")

from plug.kernels.attention import append_and_attend, attend

HEADS, HEAD_DIM, ROOM = 3, 8, 150


def alone(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """(heads, head_dim), (heads, positions, head_dim) twice, to (heads, head_dim)."""
    scores = torch.einsum("hd,hpd->hp", query.double(), keys.double()) / HEAD_DIM**0.5
    return torch.einsum("hp,hpd->hd", scores.softmax(1), values.double())


@torch.inference_mode()
def test_each_row_sees_its_own_length(generator: torch.Generator) -> None:
    query = 4 * torch.randn(4, HEADS * HEAD_DIM, generator=generator)
    keys, values = torch.randn(2, 5, HEADS, ROOM, HEAD_DIM, generator=generator)
    lengths = torch.tensor([1, 64, 0, 130, 7], dtype=torch.int32)
    for row, length in enumerate(lengths):
        values[row, :, length:] = float("nan")  # must not be read

    got = attend(query, keys, values, lengths).view(4, HEADS, HEAD_DIM)

    for row in (0, 1, 3):
        part = slice(None), slice(0, int(lengths[row]))
        expected = alone(query[row].view(HEADS, HEAD_DIM), keys[row][part], values[row][part])
        torch.testing.assert_close(got[row].double(), expected, atol=1e-6, rtol=1e-5)
    assert torch.equal(got[2], torch.zeros(HEADS, HEAD_DIM))


@torch.inference_mode()
def test_a_new_position_joins_and_is_seen(generator: torch.Generator) -> None:
    new = torch.randn(3, 3 * HEADS * HEAD_DIM, generator=generator)
    keys, values = torch.randn(2, 3, HEADS, ROOM, HEAD_DIM, generator=generator)
    before = keys.clone(), values.clone()
    positions = torch.tensor([0, 65, 149])

    got = append_and_attend(new, keys, values, positions).view(3, HEADS, HEAD_DIM)

    for row, position in enumerate(positions.tolist()):
        query, key, value = new[row].view(3, HEADS, HEAD_DIM)
        before[0][row, :, position], before[1][row, :, position] = key, value
        seen = slice(None), slice(0, position + 1)
        expected = alone(query, before[0][row][seen], before[1][row][seen])
        torch.testing.assert_close(got[row].double(), expected, atol=1e-6, rtol=1e-5)
    assert torch.equal(keys, before[0])
    assert torch.equal(values, before[1])

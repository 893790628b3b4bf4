"""Triton kernel of attention in a decoding step: one query for each row and head.

Each row's length is read on the device. So a row costs what its own length needs, and one CUDA
graph serves every length.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from plug.kernels.launch import overlap

# Positions at a time, and warps: the fastest for a usual window and source. The long source of a
# single row leaves most of the card idle, so it is read in larger pieces.
_USUAL, _LONG_SOURCE = (128, 4), (256, 8)


def attend(query: Tensor, keys: Tensor, values: Tensor, lengths: Tensor) -> Tensor:
    """Compute cross-attention for one position of each row.

    The keys and values may be read while the kernel before this one still runs.

    Args:
        query: (rows, heads * head_dim).
        keys: (at least rows, heads, room, head_dim), contiguous.
        values: the same.
        lengths: int32 (at least rows,), positions that hold something; 0 gives zeros.

    Returns:
        (rows, heads * head_dim).
    """
    return _launch(query, None, keys, values, lengths, early=True)


def append_and_attend(
    query_key_value: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    *,
    early: bool = False,
) -> Tensor:
    """Add one new position of each row to the caches, and compute its causal self-attention.

    Args:
        query_key_value: (rows, 3 * heads * head_dim).
        keys: (at least rows, heads, room, head_dim), contiguous; written at ``positions``.
        values: the same.
        positions: (rows,), where the new position stands, below ``room``.
        early: the caches may be read while the kernel before this one still runs. So no earlier
            kernel of this step may have written to them, or to ``positions``.

    Returns:
        (rows, heads * head_dim).
    """
    return _launch(query_key_value, query_key_value, keys, values, positions, early=early)


def _launch(
    query: Tensor,
    new: Tensor | None,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    *,
    early: bool,
) -> Tensor:
    rows = len(query)
    _, heads, room, head_dim = keys.shape
    out = query.new_empty(rows, heads * head_dim)
    is_long = new is None and room > _LONG_SOURCE[0] and rows * heads <= 256
    block, warps = _LONG_SOURCE if is_long else _USUAL
    _attend[(rows, heads)](
        query,
        keys,
        values,
        lengths,
        out,
        query.shape[1],
        room,
        head_dim**-0.5,
        HEADS=heads,
        HEAD_DIM=head_dim,
        PADDED_DIM=max(16, triton.next_power_of_2(head_dim)),
        HAS_NEW=new is not None,
        EARLY=early,
        BLOCK=block,
        num_warps=warps,
        **overlap(query.device),
    )
    return out


@triton.jit
def _attend(
    query,
    keys,
    values,
    lengths,
    out,
    stride,
    room,
    by,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    HAS_NEW: tl.constexpr,
    EARLY: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    d = tl.arange(0, PADDED_DIM)
    inside = d < HEAD_DIM
    at = query + row * stride + head * HEAD_DIM + d
    start = (row * HEADS + head) * room * HEAD_DIM
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
        if not EARLY:
            tl.extra.cuda.gdc_wait()
    length = tl.load(lengths + row).to(tl.int32)
    position = tl.arange(0, BLOCK)
    where = start + position[:, None] * HEAD_DIM + d[None, :]
    mask = (position < length)[:, None] & inside[None, :]
    k = tl.load(keys + where, mask=mask, other=0.0)
    v = tl.load(values + where, mask=mask, other=0.0)
    if OVERLAP and EARLY:
        tl.extra.cuda.gdc_wait()
    q = tl.load(at, mask=inside, other=0.0).to(tl.float32) * by
    # Softmax as it goes: the largest score so far, the sum of weights, the weighted sum of values.
    if HAS_NEW:
        key = tl.load(at + HEADS * HEAD_DIM, mask=inside, other=0.0)
        value = tl.load(at + 2 * HEADS * HEAD_DIM, mask=inside, other=0.0)
        slot = start + length * HEAD_DIM + d
        tl.store(keys + slot, key, mask=inside)
        tl.store(values + slot, value, mask=inside)
        largest = tl.sum(q * key.to(tl.float32), 0)
        weights = 1.0
        mixed = value.to(tl.float32)
    else:
        largest = -1e30
        weights = 0.0
        mixed = tl.zeros([PADDED_DIM], dtype=tl.float32)
    first = 0
    while first < length:
        seen = position < length
        scores = tl.where(seen, tl.sum(q[None, :] * k.to(tl.float32), 1), -1e30)
        new_largest = tl.maximum(largest, tl.max(scores, 0))
        shrink = tl.exp(largest - new_largest)
        part = tl.where(seen, tl.exp(scores - new_largest), 0.0)
        weights = weights * shrink + tl.sum(part, 0)
        mixed = mixed * shrink + tl.sum(part[:, None] * v.to(tl.float32), 0)
        largest = new_largest
        first += BLOCK
        position = first + tl.arange(0, BLOCK)
        where = start + position[:, None] * HEAD_DIM + d[None, :]
        mask = (position < length)[:, None] & inside[None, :]
        k = tl.load(keys + where, mask=mask, other=0.0)
        v = tl.load(values + where, mask=mask, other=0.0)
    result = mixed / tl.maximum(weights, 1e-30)
    tl.store(out + row * HEADS * HEAD_DIM + head * HEAD_DIM + d, result, mask=inside)

"""Triton kernel of the last part of sampling: one token of the likeliest few, a program a row."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


def draw_of_candidates(
    values: Tensor, ids: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, uniforms: Tensor
) -> Tensor:
    """What `candidates` and `draw` of `plug.generation.sampling` do with the likeliest logits.

    Args:
        values: the logits (rows, n), largest first, n not large.
        ids: theirs.
        temperature: (rows,), and so the following.
        top_k: how many to keep.
        top_p: keep the likeliest until their probabilities reach this; 1 keeps all.
        uniforms: in [0, 1).

    Returns:
        A token (rows,) each.
    """
    rows, count = values.shape
    out = ids.new_empty(rows)
    block = triton.next_power_of_2(count)
    _draw[(rows,)](
        values, ids, temperature, top_k, top_p, uniforms, out, count, BLOCK=block, num_warps=1
    )
    return out


@triton.jit
def _draw(values, ids, temperature, top_k, top_p, uniforms, out, count, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    kept = (i < count) & (i < tl.load(top_k + row))
    score = tl.load(values + row * count + i, mask=kept, other=float("-inf"))
    score = score / tl.load(temperature + row)
    weight = tl.exp(score - tl.max(score, 0))
    weight = weight / tl.sum(weight, 0)
    limit = tl.load(top_p + row)
    limit = tl.where(limit < 1, limit, 2.0)
    likelier = tl.cumsum(weight, 0) - weight
    weight = tl.where(likelier >= limit, 0.0, weight)
    weight = weight / tl.sum(weight, 0)
    cumulative = tl.cumsum(weight, 0)
    whole = tl.max(tl.where(i < count, cumulative, 0.0), 0)
    index = tl.sum(((cumulative < tl.load(uniforms + row) * whole) & (i < count)).to(tl.int32), 0)
    last = tl.sum((weight > 0).to(tl.int32), 0) - 1
    index = tl.minimum(index, last)
    tl.store(out + row, tl.load(ids + row * count + index))

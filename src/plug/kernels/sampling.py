"""Triton kernels of the end of a step: a token of the likeliest few, and what becomes of it.

PyTorch takes some thirty small kernels for it, which at batch 1 is 4% of a step of the 27B.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from plug.kernels.launch import overlap

# Logits that a program looks through, and how many of the likeliest can be kept.
_PART = 1024
MOST_CANDIDATES = 128


def draw_of_likeliest(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    most: int,
    uniforms: Tensor,
    next_draw: Tensor,
    counts: Tensor | None = None,
    *,
    min_p: Tensor,
    no_token: int,
    bias: Tensor | None = None,
    early: tuple[Tensor, Tensor, int] | None = None,
) -> Tensor:
    """Do what `candidates` and `draw` of `plug.generation.sampling` do, and count the draws.

    Args:
        logits: (rows, vocab) float32.
        temperature: (rows,), as all limits: see `candidates`.
        top_k: how many to keep.
        top_p: keep the likeliest until their probabilities reach this; 1 keeps all.
        most: not less than the largest ``top_k``, at most `MOST_CANDIDATES`.
        uniforms: (rows, n) in [0, 1).
        next_draw: int64 (rows,), which of them is a row's next; 1 is added here, up to n - 1.
        counts: bool (rows,), where to add it; None is everywhere.
        min_p: (rows,), drop what is less likely than this times the likeliest; 0 keeps all.
        no_token: the result for a row whose likeliest logit is -inf or not a number.
        bias: (rows, vocab) float32, added to the logits; None adds nothing.
        early: tokens written so far (rows,), how many there must be before the end may come
            (rows,), and the id of the end. None: it may come at once.

    Returns:
        A token (rows,) each. Of equally likely ones, the smaller id comes first.
    """
    rows, vocab = logits.shape
    kept = max(2, triton.next_power_of_2(most))
    parts = triton.cdiv(vocab, _PART)
    best = torch.empty(rows, parts * kept, dtype=torch.int64, device=logits.device)
    written, least, end = early or (None, None, 0)
    _best_of_part[(rows, parts)](
        logits,
        bias,
        written,
        least,
        end,
        best,
        vocab,
        HAS_BIAS=bias is not None,
        WAITS=early is not None,
        PART=_PART,
        KEPT=kept,
        num_warps=4,
        **overlap(logits.device),
    )
    out = next_draw.new_empty(rows)
    _draw[(rows,)](
        best,
        temperature,
        top_k,
        top_p,
        min_p,
        uniforms,
        next_draw,
        counts,
        out,
        parts * kept,
        uniforms.shape[1],
        no_token,
        HAS_COUNTS=counts is not None,
        BLOCK=triton.next_power_of_2(parts * kept),
        KEPT=kept,
        num_warps=8,
        **overlap(logits.device),
    )
    return out


def keep(
    chosen: Tensor,
    counts: Tensor | None,
    tokens: Tensor,
    positions: Tensor,
    *,
    end: int,
    num_emitted: int,
    unknown: int,
    last: int,
) -> tuple[Tensor, Tensor]:
    """Do what `ModelRunner._keep` of `plug.generation.model_runner` says, for the next step.

    Args:
        chosen: (rows,) ids; one below 0 is no token, and is not kept.
        counts: bool (rows,), whose choice counts; None is everyone's.
        tokens: (rows,), becomes what is shown where that is kept.
        positions: (rows,), of what is kept the next; ``last`` at most.
        end: an id that is not kept.
        num_emitted: ids from here on are shown as ``unknown``.
        unknown: see ``num_emitted``.
        last: position that there is.

    Returns:
        The ids shown, and bool (rows,): which are kept.
    """
    shown = torch.empty_like(chosen)
    kept = torch.empty_like(chosen, dtype=torch.bool)
    _keep[(len(chosen),)](
        chosen,
        counts,
        tokens,
        positions,
        shown,
        kept,
        end,
        num_emitted,
        unknown,
        last,
        HAS_COUNTS=counts is not None,
        num_warps=1,
        **overlap(chosen.device),
    )
    return shown, kept


@triton.jit
def _in_order(bits):
    # A float's bits as an integer that is larger where the float is; the same function undoes it.
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _best_of_part(
    logits,
    bias,
    written,
    least,
    end,
    best,
    vocab,
    HAS_BIAS: tl.constexpr,
    WAITS: tl.constexpr,
    PART: tl.constexpr,
    KEPT: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i = part * PART + tl.arange(0, PART)
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    value = tl.load(logits + row * vocab + i, mask=i < vocab, other=float("-inf"))
    if HAS_BIAS:
        value += tl.load(bias + row * vocab + i, mask=i < vocab, other=0.0)
    if WAITS:
        is_early = tl.load(written + row) < tl.load(least + row)
        value = tl.where(is_early & (i == end), float("-inf"), value)
    order = _in_order(value.to(tl.int32, bitcast=True)).to(tl.int64)
    top = tl.topk((order << 32) | (0x7FFFFFFF - i).to(tl.int64), KEPT)
    where = (row * tl.num_programs(1) + part) * KEPT + tl.arange(0, KEPT)
    tl.store(best + where, top)


@triton.jit
def _draw(
    best,
    temperature,
    top_k,
    top_p,
    min_p,
    uniforms,
    next_draw,
    counts,
    out,
    count,
    draws,
    no_token,
    HAS_COUNTS: tl.constexpr,
    BLOCK: tl.constexpr,
    KEPT: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    candidate = tl.arange(0, BLOCK)
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    lowest = -0x7FFFFFFFFFFFFFFF
    found = tl.load(best + row * count + candidate, mask=candidate < count, other=lowest)
    top = tl.topk(found, KEPT)
    score = _in_order((top >> 32).to(tl.int32)).to(tl.float32, bitcast=True)
    ids = 0x7FFFFFFF - (top & 0x7FFFFFFF)
    i = tl.arange(0, KEPT)
    highest = tl.sum(tl.where(i == 0, score, 0.0), 0)  # NaN, which is above all, stays NaN
    score = tl.where(highest > float("-inf"), score, 0.0)
    score = tl.where(i < tl.load(top_k + row), score, float("-inf")) / tl.load(temperature + row)
    weight = tl.exp(score - tl.max(score, 0))
    weight = weight / tl.sum(weight, 0)
    limit = tl.load(top_p + row)
    limit = tl.where(limit < 1, limit, 2.0)
    likelier = tl.cumsum(weight, 0) - weight
    weight = tl.where(likelier >= limit, 0.0, weight)
    weight = tl.where(weight < tl.load(min_p + row) * tl.max(weight, 0), 0.0, weight)
    weight = weight / tl.sum(weight, 0)
    cumulative = tl.cumsum(weight, 0)
    draw = tl.load(next_draw + row)
    target = tl.load(uniforms + row * draws + draw) * tl.max(cumulative, 0)
    index = tl.sum((cumulative < target).to(tl.int32), 0)
    last = tl.sum((weight > 0).to(tl.int32), 0) - 1
    chosen = tl.sum(tl.where(i == tl.minimum(index, last), ids, 0), 0)
    tl.store(out + row, tl.where(highest > float("-inf"), chosen, no_token))
    step = 1
    if HAS_COUNTS:
        step = tl.load(counts + row).to(tl.int32)
    tl.store(next_draw + row, tl.minimum(draw + step, draws - 1))


@triton.jit
def _keep(
    chosen,
    counts,
    tokens,
    positions,
    shown,
    kept,
    end,
    num_emitted,
    unknown,
    last,
    HAS_COUNTS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    row = tl.program_id(0)
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    token = tl.load(chosen + row)
    is_kept = (token != end) & (token >= 0)
    if HAS_COUNTS:
        is_kept = is_kept & (tl.load(counts + row) != 0)
    seen = tl.where(token >= num_emitted, unknown, token)
    tl.store(shown + row, seen)
    tl.store(kept + row, is_kept)
    tl.store(tokens + row, tl.where(is_kept, seen, tl.load(tokens + row)))
    position = tl.load(positions + row) + is_kept.to(tl.int64)
    tl.store(positions + row, tl.minimum(position, last))

"""Triton kernels of attention over whole sequences of a few hundred positions, both ways.

Made for pre-training: up to 512 positions, no padding. One program takes a head of a sequence
through the whole backward pass, so that its tensors are read from memory once, and writes the
gradients side by side where the projections' backward pass reads them. Where all keys are one
block, the scores are computed once; else twice: for the gradients of queries, then for those of
keys and values.

Source: Dao 2023, arXiv:2307.08691; how programs share the work is ours.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from plug.kernels.training import _kept, _signed

HEAD_DIMS = (16, 32, 64)


class _Shape(NamedTuple):
    """What a program takes at a time, by how many warps; registers a thread, loads under way."""

    queries: int
    keys: int
    warps: int
    registers: int
    stages: int


# By what the compiler says of registers: three programs a multiprocessor. Not measured yet.
_SHAPES = {
    "forward": _Shape(64, 64, 4, 128, 2),
    "backward, keys in one block": _Shape(64, 64, 4, 168, 2),
    "backward": _Shape(64, 64, 4, 168, 2),
}


@torch.library.custom_op("plug::attend", mutates_args=())
def attend(
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    head_dim: int,
    is_causal: bool,
    rate: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute attention without a mask, or causal.

    Args:
        query: (batch, tgt, hidden), contiguous along the last dimension as all inputs; or queries,
            keys and values side by side, (batch, tgt, 3 * hidden), where the next two are None.
        key: (batch, src, hidden).
        value: the same, with the same strides.
        head_dim: of `HEAD_DIMS`.
        is_causal: each position sees itself and those before; needs tgt == src.
        rate: of dropout of the weights; 0 is none.
        seed: of dropout, int64 (1,), on the device; None where ``rate`` is 0.

    Returns:
        (batch, tgt, hidden), and what the backward pass needs: the logarithms of the softmax's
        sums, float32 (batch, heads, tgt).
    """
    context, sums = _empty(query, key, head_dim)
    q, k, v = _three(query, key, value)
    (batch, tgt, hidden), src = q.shape, k.shape[1]
    heads, shape = hidden // head_dim, _SHAPES["forward"]
    _forward[(triton.cdiv(tgt, shape.queries), batch * heads)](
        *_blocks(shape.queries, head_dim, q), *_blocks(shape.keys, head_dim, k, v),
        *_blocks(shape.queries, head_dim, context), sums, tgt, src, heads, head_dim**-0.5,
        **_dropout(rate, seed), **_options(shape, src, head_dim, is_causal),
    )  # fmt: skip
    return context, sums


@attend.register_fake
def _(
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,  # noqa: ARG001
    head_dim: int,
    is_causal: bool,  # noqa: ARG001
    rate: float = 0.0,  # noqa: ARG001
    seed: Tensor | None = None,  # noqa: ARG001
) -> tuple[Tensor, Tensor]:
    return _empty(query, key, head_dim)


@torch.library.custom_op("plug::attend_backward", mutates_args=())
def _attend_backward(
    gradient: Tensor,
    context: Tensor,
    sums: Tensor,
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    head_dim: int,
    is_causal: bool,
    rate: float,
    seed: Tensor | None,
) -> list[Tensor]:
    """The gradients of those of ``query``, ``key`` and ``value`` that are given; contiguous."""
    outputs = _gradients(query, key, value)
    q, k, v = _three(query, key, value)
    of_q, of_k, of_v = _three(*outputs) if key is None else outputs
    (batch, tgt, hidden), src = q.shape, k.shape[1]
    one, more = _SHAPES["backward, keys in one block"], _SHAPES["backward"]
    heads, shape = hidden // head_dim, one if src <= one.keys else more
    _backward[(batch * heads,)](
        *_blocks(shape.queries, head_dim, q), *_blocks(shape.keys, head_dim, k, v),
        *_blocks(shape.queries, head_dim, context, gradient.contiguous(), of_q),
        *_blocks(shape.keys, head_dim, of_k, of_v),
        sums, torch.empty_like(sums), tgt, src, heads, head_dim**-0.5,
        **_dropout(rate, seed), **_options(shape, src, head_dim, is_causal),
        ONE_BLOCK=src <= one.keys,
    )  # fmt: skip
    return outputs


@_attend_backward.register_fake
def _(
    gradient: Tensor,  # noqa: ARG001
    context: Tensor,  # noqa: ARG001
    sums: Tensor,  # noqa: ARG001
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    *others: object,  # noqa: ARG001
) -> list[Tensor]:
    return _gradients(query, key, value)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, *ctx.settings, seed = inputs
    context, sums = output
    ctx.mark_non_differentiable(sums)
    ctx.save_for_backward(context, sums, query, key, value, seed)


def _differentiate(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, seed = ctx.saved_tensors
    found = _attend_backward(gradient, *tensors, *ctx.settings, seed)
    return (*found, *[None] * (7 - len(found)))


attend.register_autograd(_differentiate, setup_context=_save)


def _empty(query: Tensor, key: Tensor | None, head_dim: int) -> tuple[Tensor, Tensor]:
    batch, length, hidden = query.shape
    hidden = hidden // 3 if key is None else hidden
    sums = query.new_empty((batch, hidden // head_dim, length), dtype=torch.float32)
    return query.new_empty((batch, length, hidden)), sums


def _gradients(*inputs: Tensor | None) -> list[Tensor]:
    given = [each for each in inputs if each is not None]
    return [torch.empty(each.shape, dtype=each.dtype, device=each.device) for each in given]


def _three(
    query: Tensor, key: Tensor | None = None, value: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values, also where they lie side by side in the first."""
    if key is None or value is None:
        query, key, value = query.chunk(3, dim=-1)
    return query, key, value


def _blocks(rows: int, head_dim: int, *tensors: Tensor) -> list[TensorDescriptor]:
    """So many rows of one head at a time: Hopper's units for such blocks spare registers."""
    return [TensorDescriptor.from_tensor(each, [1, rows, head_dim]) for each in tensors]


def _options(shape: _Shape, src: int, head_dim: int, is_causal: bool) -> dict[str, Any]:
    return {
        "CAUSAL": is_causal,
        "EVEN": src % shape.keys == 0,
        "HEAD_DIM": head_dim,
        "QUERIES": shape.queries,
        "KEYS": shape.keys,
        "num_warps": shape.warps,
        "maxnreg": shape.registers,
        "num_stages": shape.stages,
    }


def _dropout(rate: float, seed: Tensor | None) -> dict[str, Any]:
    return {"seed": seed, "threshold": _signed(int(rate * 2**32)), "kept_share": 1 - rate}


@triton.jit
def _read(tensor, batch, first, column, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr):
    """(ROWS, HEAD_DIM) of a head from position ``first`` on; zeros beyond the sequence's end."""
    return tensor.load([batch, first, column]).reshape([ROWS, HEAD_DIM])


@triton.jit
def _write(tensor, batch, first, column, x, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr):
    tensor.store([batch, first, column], x.to(tensor.dtype).reshape([1, ROWS, HEAD_DIM]))


@triton.jit
def _seen(x, i, j, src, other, CAUSAL: tl.constexpr, EVEN: tl.constexpr):
    """``x`` where query i sees key j, else ``other``."""
    if CAUSAL:
        x = tl.where(i >= j, x, other)
    elif not EVEN:
        x = tl.where((i >= 0) & (j < src), x, other)
    return x


@triton.jit
def _thinned(x, pair, i, j, tgt, src, seed, threshold, kept_share):
    """Dropout of weights: whether one is kept is a hash of its place."""
    place = (pair * tgt + i) * src + j
    value = tl.load(seed)
    kept = _kept(place, value, value * 0x27D4EB2F, threshold)
    return tl.where(kept, x / kept_share, 0.0)


@triton.jit(do_not_specialize=["threshold"])
def _forward(
    query, key, value, context, sums, tgt, src, heads, scale, seed, threshold, kept_share,
    CAUSAL: tl.constexpr, EVEN: tl.constexpr, HEAD_DIM: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    first, pair = tl.program_id(0) * QUERIES, tl.program_id(1)
    batch, column = pair // heads, pair % heads * HEAD_DIM
    q = _read(query, batch, first, column, QUERIES, HEAD_DIM)
    i = first + tl.arange(0, QUERIES)
    by = scale * 1.4426950408889634  # powers of 2 are faster
    largest = tl.full([QUERIES], -1e30, tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    mixed = tl.zeros([QUERIES, HEAD_DIM], tl.float32)
    end = tl.minimum(first + QUERIES, src) if CAUSAL else src
    for start in range(0, end, KEYS):
        j = start + tl.arange(0, KEYS)
        k = _read(key, batch, start, column, KEYS, HEAD_DIM)
        v = _read(value, batch, start, column, KEYS, HEAD_DIM)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * by
        scores = _seen(scores, i[:, None], j[None, :], src, -1e30, CAUSAL, EVEN)
        new = tl.maximum(largest, tl.max(scores, 1))
        weights = tl.exp2(scores - new[:, None])
        shrink = tl.exp2(largest - new)
        total = total * shrink + tl.sum(weights, 1)
        if seed is not None:
            weights = _thinned(
                weights, pair, i[:, None], j[None, :], tgt, src, seed, threshold, kept_share
            )
        mixed *= shrink[:, None]
        mixed = tl.dot(weights.to(v.dtype), v, mixed, input_precision="ieee")
        largest = new
    _write(context, batch, first, column, mixed / total[:, None], QUERIES, HEAD_DIM)
    logarithms = (largest + tl.log2(total)) * 0.6931471805599453
    tl.store(sums + pair * tgt + i, logarithms, mask=i < tgt)


@triton.jit(do_not_specialize=["threshold"])
def _backward(
    query, key, value, context, gradient, of_query, of_key, of_value, sums, products,
    tgt, src, heads, scale, seed, threshold, kept_share,
    CAUSAL: tl.constexpr, EVEN: tl.constexpr, HEAD_DIM: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, ONE_BLOCK: tl.constexpr,
):  # fmt: skip
    """``products``: room for (batch, heads, tgt), the sums of context times gradient."""
    pair = tl.program_id(0)
    batch, column = pair // heads, pair % heads * HEAD_DIM
    sums += pair * tgt
    products += pair * tgt
    by = scale * 1.4426950408889634
    if ONE_BLOCK:
        j = tl.arange(0, KEYS)
        k = _read(key, batch, 0, column, KEYS, HEAD_DIM)
        v = _read(value, batch, 0, column, KEYS, HEAD_DIM)
        of_k = tl.zeros([KEYS, HEAD_DIM], tl.float32)
        of_v = tl.zeros([KEYS, HEAD_DIM], tl.float32)
        for first in range(0, tgt, QUERIES):
            i = first + tl.arange(0, QUERIES)
            q = _read(query, batch, first, column, QUERIES, HEAD_DIM)
            g = _read(gradient, batch, first, column, QUERIES, HEAD_DIM)
            logarithms = tl.load(sums + i, mask=i < tgt, other=0.0) * 1.4426950408889634
            scores = tl.dot(q, tl.trans(k), input_precision="ieee") * by
            weights = tl.exp2(scores - logarithms[:, None])
            weights = _seen(weights, i[:, None], j[None, :], src, 0.0, CAUSAL, EVEN)
            of_weights = tl.dot(g, tl.trans(v), input_precision="ieee")
            thinned = weights
            if seed is not None:
                thinned = _thinned(
                    weights, pair, i[:, None], j[None, :], tgt, src, seed, threshold, kept_share
                )
                of_weights = _thinned(
                    of_weights, pair, i[:, None], j[None, :], tgt, src, seed, threshold, kept_share
                )
            of_v = tl.dot(tl.trans(thinned.to(g.dtype)), g, of_v, input_precision="ieee")
            product = tl.sum(weights * of_weights, 1)
            of_scores = (weights * (of_weights - product[:, None])).to(q.dtype)
            of_k = tl.dot(tl.trans(of_scores), q, of_k, input_precision="ieee")
            of_q = tl.dot(of_scores, k, input_precision="ieee") * scale
            _write(of_query, batch, first, column, of_q, QUERIES, HEAD_DIM)
        _write(of_key, batch, 0, column, of_k * scale, KEYS, HEAD_DIM)
        _write(of_value, batch, 0, column, of_v, KEYS, HEAD_DIM)
    else:
        for first in range(0, tgt, QUERIES):
            i = first + tl.arange(0, QUERIES)
            q = _read(query, batch, first, column, QUERIES, HEAD_DIM)
            g = _read(gradient, batch, first, column, QUERIES, HEAD_DIM)
            mixed = _read(context, batch, first, column, QUERIES, HEAD_DIM)
            product = tl.sum(g.to(tl.float32) * mixed.to(tl.float32), 1)
            tl.store(products + i, product, mask=i < tgt)
            logarithms = tl.load(sums + i, mask=i < tgt, other=0.0) * 1.4426950408889634
            of_q = tl.zeros([QUERIES, HEAD_DIM], tl.float32)
            end = tl.minimum(first + QUERIES, src) if CAUSAL else src
            for start in range(0, end, KEYS):
                j = start + tl.arange(0, KEYS)
                k = _read(key, batch, start, column, KEYS, HEAD_DIM)
                v = _read(value, batch, start, column, KEYS, HEAD_DIM)
                scores = tl.dot(q, tl.trans(k), input_precision="ieee") * by
                weights = tl.exp2(scores - logarithms[:, None])
                weights = _seen(weights, i[:, None], j[None, :], src, 0.0, CAUSAL, EVEN)
                of_weights = tl.dot(g, tl.trans(v), input_precision="ieee")
                if seed is not None:
                    of_weights = _thinned(
                        of_weights, pair, i[:, None], j[None, :], tgt, src,
                        seed, threshold, kept_share,
                    )  # fmt: skip
                of_scores = (weights * (of_weights - product[:, None])).to(k.dtype)
                of_q = tl.dot(of_scores, k, of_q, input_precision="ieee")
            _write(of_query, batch, first, column, of_q * scale, QUERIES, HEAD_DIM)
        tl.debug_barrier()  # all of `products` is written before any thread reads it
        for start in range(0, src, KEYS):
            j = start + tl.arange(0, KEYS)
            k = _read(key, batch, start, column, KEYS, HEAD_DIM)
            v = _read(value, batch, start, column, KEYS, HEAD_DIM)
            of_k = tl.zeros([KEYS, HEAD_DIM], tl.float32)
            of_v = tl.zeros([KEYS, HEAD_DIM], tl.float32)
            begin = start // QUERIES * QUERIES if CAUSAL else 0
            for first in range(begin, tgt, QUERIES):
                # Keys down, queries across: the next products take these out of registers.
                i = first + tl.arange(0, QUERIES)
                q = _read(query, batch, first, column, QUERIES, HEAD_DIM)
                g = _read(gradient, batch, first, column, QUERIES, HEAD_DIM)
                logarithms = tl.load(sums + i, mask=i < tgt, other=0.0) * 1.4426950408889634
                scores = tl.dot(k, tl.trans(q), input_precision="ieee") * by
                weights = tl.exp2(scores - logarithms[None, :])
                weights = _seen(weights, i[None, :], j[:, None], src, 0.0, CAUSAL, EVEN)
                of_weights = tl.dot(v, tl.trans(g), input_precision="ieee")
                thinned = weights
                if seed is not None:
                    thinned = _thinned(
                        weights, pair, i[None, :], j[:, None], tgt, src,
                        seed, threshold, kept_share,
                    )  # fmt: skip
                    of_weights = _thinned(
                        of_weights, pair, i[None, :], j[:, None], tgt, src,
                        seed, threshold, kept_share,
                    )  # fmt: skip
                of_v = tl.dot(thinned.to(g.dtype), g, of_v, input_precision="ieee")
                product = tl.load(products + i, mask=i < tgt, other=0.0)
                of_scores = (weights * (of_weights - product[None, :])).to(q.dtype)
                of_k = tl.dot(of_scores, q, of_k, input_precision="ieee")
            _write(of_key, batch, start, column, of_k * scale, KEYS, HEAD_DIM)
            _write(of_value, batch, start, column, of_v, KEYS, HEAD_DIM)

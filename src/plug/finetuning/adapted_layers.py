"""Encoder and decoder layers with adapters, trained by a forward and a backward pass of their own.

PyTorch's autograd would keep what each operation reads, and peft's layers take five passes over
their outputs. Here a layer keeps its products alone, or nothing but its input:

    kept            x, queries, keys and values, the context, x after attention, fc1's output
    recomputed      x (`plug.finetuning.recomputation` says which layers)

Norms, GELU and dropout's masks are computed again in both cases: they cost little. The model stays
peft's, which saves it. Layers that are not plain LoRA (DoRA, several adapters), and those of ranks
above 85, run as they are.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plug.finetuning.adapted_products import MOST_RANKS, Products, functions
from plug.finetuning.recomputation import layers_of
from plug.hf.base import PlugDecoderLayer, PlugEncoderLayer
from plug.model.attention import Attention
from plug.model.layers import DecoderLayer, EncoderLayer, FeedForward

_SEEDS = 4  # of dropout, that a block uses: its own and those that follow


def adapt_layers(model: nn.Module, *, in_fp8: bool) -> int:
    """Have the layers of peft's ``model`` train by this file; return how many do.

    Args:
        model: peft's, around one of `plug.hf`.
        in_fp8: multiply quantised weights in FP8.
    """
    adapted = 0
    for layer in layers_of(model):
        linears = [part for part in layer.modules() if hasattr(part, "lora_A")]
        wanted = 6 if isinstance(layer, EncoderLayer) else 10
        if len(linears) != wanted or not all(map(_is_plain, linears)):
            continue
        adapted += 1
        any_layer: Any = layer
        any_layer.recomputed = False
        any_layer.blocks = _blocks(layer, in_fp8=in_fp8)
        if isinstance(layer, DecoderLayer):
            cross: Any = layer.cross_attention
            cross.__class__ = AdaptedCrossAttention
            cross.products = Products([cross.k_proj, cross.v_proj], in_fp8=in_fp8)
            layer.__class__ = AdaptedDecoderLayer
        else:
            layer.__class__ = AdaptedEncoderLayer
    return adapted


def _is_plain(linear: Any) -> bool:
    """Whether ``linear`` is LoRA as in its paper, on a frozen layer."""
    base = linear.get_base_layer()
    return (
        len(linear.lora_A) == 1
        and len(linear.active_adapters) == 1
        and not linear.lora_variant
        and not linear.merged
        and not linear.disable_adapters
        and 3 * linear.r[linear.active_adapters[0]] <= MOST_RANKS  # of queries, keys and values
        and base.bias is not None
        and not any(each.requires_grad for each in base.parameters())
    )


def _blocks(layer: EncoderLayer | DecoderLayer, *, in_fp8: bool) -> list[_Attention | _Feeding]:
    rate = layer.dropout.p
    if isinstance(layer, EncoderLayer):
        attentions: list[tuple[nn.LayerNorm, Attention, bool, bool]] = [
            (layer.attention_norm, layer.attention, True, False)
        ]
    else:
        attentions = [
            (layer.self_attention_norm, layer.self_attention, True, True),
            (layer.cross_attention_norm, layer.cross_attention, False, False),
        ]
    blocks: list[_Attention | _Feeding] = []
    for norm, part, is_self, is_causal in attentions:
        own = [part.q_proj, part.k_proj, part.v_proj] if is_self else [part.q_proj]
        blocks.append(
            _Attention(
                norm,
                Products(own, in_fp8=in_fp8),
                Products([part.out_proj], in_fp8=in_fp8),
                rate,
                part.dropout,
                part.head_dim,
                is_causal,
            )
        )
    feed_forward: FeedForward = layer.feed_forward
    first = Products([feed_forward.fc1], in_fp8=in_fp8)
    second = Products([feed_forward.fc2], in_fp8=in_fp8)
    blocks.append(_Feeding(layer.feed_forward_norm, first, second, rate))
    return blocks


class _Adapted:
    """What encoder and decoder layers share."""

    blocks: list[_Attention | _Feeding]
    recomputed: bool
    training: bool

    def _trains(self, *attentions: Attention) -> bool:
        """Whether this pass is one to train by, and nobody looks inside."""
        watched = any(each._forward_hooks for each in attentions)
        return self.training and torch.is_grad_enabled() and not watched

    def _run(
        self,
        hidden_states: Tensor,
        self_mask: Tensor | None,
        key: Tensor | None = None,
        value: Tensor | None = None,
        source_mask: Tensor | None = None,
    ) -> Tensor:
        dtype = self.blocks[0].norm.weight.dtype
        parameters = [each for block in self.blocks for each in block.parameters]
        seed = int(torch.randint(2**31, ()))
        return _Layer.apply(
            hidden_states.to(dtype),
            key,
            value,
            self.blocks,
            (self_mask, source_mask),
            seed,
            self.recomputed,
            *parameters,
        )


class AdaptedEncoderLayer(_Adapted, PlugEncoderLayer):
    """`EncoderLayer` with adapters."""

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None) -> Tensor:
        if not self._trains(self.attention):
            return super().forward(hidden_states, attention_mask)
        return self._run(hidden_states, _useful(attention_mask))


class AdaptedDecoderLayer(_Adapted, PlugDecoderLayer):
    """`DecoderLayer` with adapters."""

    def forward(
        self,
        hidden_states: Tensor,
        encoder_key_value: Any,
        encoder_attention_mask: Tensor | None,
        self_attention_mask: Tensor | None = None,
        past_key_values: Any = None,
    ) -> Tensor:
        if past_key_values is not None or not self._trains(
            self.self_attention, self.cross_attention
        ):
            return super().forward(
                hidden_states,
                encoder_key_value,
                encoder_attention_mask,
                self_attention_mask,
                past_key_values,
            )
        source_mask = _useful(encoder_attention_mask)
        key, value = encoder_key_value
        return self._run(hidden_states, self_attention_mask, key, value, source_mask)


class AdaptedCrossAttention(Attention):
    """`Attention` whose keys and values of the source train as the layers do."""

    products: Products

    def project_key_value(self, source: Tensor) -> tuple[Tensor, Tensor]:
        if not (self.training and torch.is_grad_enabled()):
            return super().project_key_value(source)
        seed = int(torch.randint(2**31, ()))
        source = source.to(self.products.bases[0].bias.dtype)
        key, value = _Projection.apply(source, self.products, seed, *self.products.parameters)
        return self._split_heads(key), self._split_heads(value)


_last_mask: tuple[weakref.ref[Tensor], bool] | None = None


def _useful(mask: Tensor | None) -> Tensor | None:
    """``mask``, or None where it allows all: attention is faster without.

    All layers get the same tensor, and it is looked at once. On a GPU that waits for the step
    before, which costs nothing next to a large model's step.
    """
    global _last_mask
    if mask is None:
        return None
    if _last_mask is None or _last_mask[0]() is not mask:
        _last_mask = (weakref.ref(mask), bool(mask.all()))
    return None if _last_mask[1] else mask


class _Layer(torch.autograd.Function):
    """A whole layer; see the file's head for what it keeps."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_states: Tensor,
        key: Tensor | None,
        value: Tensor | None,
        blocks: list[_Attention | _Feeding],
        masks: tuple[Tensor | None, Tensor | None],
        seed: int,
        recomputed: bool,
        *_parameters: nn.Parameter,
    ) -> Tensor:
        ctx.blocks, ctx.masks, ctx.seed = blocks, masks, seed
        ctx.save_for_backward(hidden_states, key, value)
        ctx.kept = None
        out, kept = _forward(blocks, hidden_states, (key, value), masks, seed, complete=True)
        if not recomputed:
            ctx.kept = kept
        return out.view(hidden_states.shape)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        hidden_states, key, value = ctx.saved_tensors
        kept, ctx.kept = ctx.kept, None
        if kept is None:
            _, kept = _forward(
                ctx.blocks, hidden_states, (key, value), ctx.masks, ctx.seed, complete=False
            )
        of_source: tuple[Tensor | None, Tensor | None] = (None, None)
        found: list[Tensor] = []
        flat: Tensor | None = gradient.reshape(-1, gradient.shape[-1]).contiguous()
        del gradient
        wants_input = ctx.needs_input_grad[0]
        for index in reversed(range(len(ctx.blocks))):
            block = ctx.blocks[index]
            assert flat is not None
            if isinstance(block, _Feeding):
                flat, own = block.backward(flat, kept.pop())
            else:
                needed = wants_input or index > 0
                flat, own, of_key_value = block.backward(flat, kept.pop(), wants_input=needed)
                of_source = of_key_value or of_source
            found = own + found
        of_input = None if flat is None or not wants_input else flat.view(hidden_states.shape)
        return of_input, *of_source, None, None, None, None, *found


def _forward(
    blocks: Sequence[_Attention | _Feeding],
    hidden_states: Tensor,
    key_value: tuple[Tensor | None, Tensor | None],
    masks: tuple[Tensor | None, Tensor | None],
    seed: int,
    *,
    complete: bool,
) -> tuple[Tensor, list[Any]]:
    """Run the blocks of a layer; the last one's output is wanted only where ``complete``."""
    x = hidden_states.reshape(-1, hidden_states.shape[-1]).contiguous()
    kept: list[Any] = []
    one: Any
    for index, block in enumerate(blocks):
        first_seed = seed + index * _SEEDS
        if isinstance(block, _Feeding):
            x, one = block.forward(x, first_seed, complete=complete)
        else:
            given = None if index == 0 else key_value
            x, one = block.forward(x, hidden_states.shape[:2], masks[index], first_seed, given)
        kept.append(one)
    return x, kept


@dataclass(slots=True)
class _KeptAttention:
    x: Tensor
    leaves: list[Tensor]  # queries, keys, values (batch, heads, positions, head_dim)
    context: Tensor  # (batch, heads, positions, head_dim), with its graph
    thin: Tensor
    thin_out: Tensor
    seed: int


@dataclass(frozen=True, slots=True)
class _Attention:
    """x + dropout(attention(norm(x))), with keys and values of its own or of the source."""

    norm: nn.LayerNorm
    own: Products
    out: Products
    rate: float
    attention_rate: float
    head_dim: int
    is_causal: bool

    @property
    def parameters(self) -> list[nn.Parameter]:
        return self.own.parameters + self.out.parameters

    def forward(
        self,
        x: Tensor,
        shape: Sequence[int],
        mask: Tensor | None,
        seed: int,
        key_value: tuple[Tensor | None, Tensor | None] | None,
    ) -> tuple[Tensor, _KeptAttention]:
        run = functions(x)
        products, thin = self.own.forward(run.norm(x, self.norm), seed)
        leaves = [each.unflatten(0, shape) for each in products]
        leaves = [each.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for each in leaves]
        leaves += [each for each in key_value or () if each is not None]
        leaves = [each.detach().requires_grad_() for each in leaves]
        del products
        with _seeded(x.device, seed + 1), torch.enable_grad():
            query, key, value = leaves
            context = F.scaled_dot_product_attention(
                query,
                key,
                value,
                attn_mask=mask,
                dropout_p=self.attention_rate,
                is_causal=self.is_causal and mask is None,
            )
        flat = _flat(context.detach())
        thin_out = self.out.thin(flat, seed + 2)
        (y,) = self.out.base(flat)
        y = self.out.finish(y, thin_out, x, rate=self.rate, seed=seed + 3)
        return y, _KeptAttention(x, leaves, context, thin, thin_out, seed)

    def backward(
        self, gradient: Tensor, kept: _KeptAttention, *, wants_input: bool
    ) -> tuple[Tensor | None, list[Tensor], tuple[Tensor, Tensor] | None]:
        run = functions(gradient)
        seed = kept.seed
        dropped = run.dropped(gradient, rate=self.rate, seed=seed + 3)
        context = kept.context
        of_context, of_out = self.out.backward(
            [dropped], _flat(context.detach()), kept.thin_out, seed + 2
        )
        del dropped
        assert of_context is not None
        batch, heads, length, head_dim = context.shape
        of_context = of_context.view(batch, length, heads, head_dim).transpose(1, 2)
        gradients = list(torch.autograd.grad(context, kept.leaves, of_context))
        kept.leaves, kept.context = [], gradient  # their memory is free
        del of_context, context
        source = None
        if len(self.own.bases) == 1:
            source = (gradients[1], gradients[2])
            del gradients[1:]
        flat = [_flat(each) for each in gradients]
        del gradients
        normalized = run.norm(kept.x, self.norm)
        of_norm, of_own = self.own.backward(
            flat, normalized, kept.thin, seed, wants_input=wants_input
        )
        del flat, normalized
        if of_norm is None:
            return None, of_own + of_out, source
        found = run.norm_backward_(of_norm, kept.x, self.norm, gradient)
        return found, of_own + of_out, source


@dataclass(slots=True)
class _KeptFeeding:
    x: Tensor
    inside: Tensor  # fc1's output
    thin: Tensor
    thin_out: Tensor
    seed: int


@dataclass(frozen=True, slots=True)
class _Feeding:
    """x + dropout(fc2(gelu(fc1(norm(x)))))."""

    norm: nn.LayerNorm
    first: Products
    second: Products
    rate: float

    @property
    def parameters(self) -> list[nn.Parameter]:
        return self.first.parameters + self.second.parameters

    def forward(self, x: Tensor, seed: int, *, complete: bool) -> tuple[Tensor, _KeptFeeding]:
        """Return the output, or ``x`` unless ``complete``, and what `backward` needs."""
        run = functions(x)
        normalized = run.norm(x, self.norm)
        thin = self.first.thin(normalized, seed)
        (inside,) = self.first.base(normalized)
        del normalized
        thin_out, activated = run.through_gelu_(
            inside,
            thin,
            self.first.b,
            self.second.stacked_a(),
            alpha=self.first.scale,
            rate=self.second.rate,
            seed=seed + 1,
            wants_gelu=complete and not self.second.in_fp8,
        )
        kept = _KeptFeeding(x, inside, thin, thin_out, seed)
        if not complete:
            return x, kept
        if activated is None:
            (y,) = self.second.base(inside, gelu=True)
        else:
            (y,) = self.second.base(activated)
        return self.second.finish(y, thin_out, x, rate=self.rate, seed=seed + 2), kept

    def backward(self, gradient: Tensor, kept: _KeptFeeding) -> tuple[Tensor, list[Tensor]]:
        run = functions(gradient)
        seed = kept.seed
        dropped = run.dropped(gradient, rate=self.rate, seed=seed + 2)
        u = self.second.thin_backward([dropped])
        of_b = self.second.of_b([dropped], kept.thin_out)
        of_inside = self.second.base_backward([dropped])
        del dropped
        of_a, of_first_b = run.back_through_gelu_(
            of_inside,
            kept.inside,
            u,
            self.second.stacked_a(),
            kept.thin,
            alpha=self.first.scale,
            rate=self.second.rate,
            seed=seed + 1,
        )
        kept.inside = gradient  # its memory is free
        normalized = run.norm(kept.x, self.norm)
        of_norm, of_first = self.first.backward(
            [of_inside], normalized, kept.thin, seed, of_b=[of_first_b]
        )
        del of_inside, normalized
        assert of_norm is not None
        found = run.norm_backward_(of_norm, kept.x, self.norm, gradient)
        return found, [*of_first, of_a, *of_b]


class _Projection(torch.autograd.Function):
    """Keys and values of the source, (batch, src, hidden) each."""

    @staticmethod
    def forward(
        ctx: Any, source: Tensor, products: Products, seed: int, *_parameters: nn.Parameter
    ) -> tuple[Tensor, ...]:
        flat = source.reshape(-1, source.shape[-1]).contiguous()
        outputs, thin = products.forward(flat, seed)
        ctx.products, ctx.seed, ctx.thin = products, seed, thin
        ctx.save_for_backward(source)
        return tuple(each.unflatten(0, source.shape[:2]) for each in outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        (source,) = ctx.saved_tensors
        flat = [each.reshape(-1, each.shape[-1]) for each in gradients]
        of_source, found = ctx.products.backward(
            flat,
            source.reshape(-1, source.shape[-1]).contiguous(),
            ctx.thin,
            ctx.seed,
            wants_input=ctx.needs_input_grad[0],
        )
        of_source = None if of_source is None else of_source.view(source.shape)
        return of_source, None, None, *found


def _flat(x: Tensor) -> Tensor:
    """(batch, heads, positions, head_dim) to (batch * positions, hidden), a view where it can."""
    return x.transpose(1, 2).reshape(-1, x.shape[1] * x.shape[3])


@contextmanager
def _seeded(device: torch.device, seed: int) -> Iterator[None]:
    """Draw the random numbers of ``seed`` in the block, and go on as before after it."""
    generator = torch.default_generator
    if device.type == "cuda":
        generator = torch.cuda.default_generators[device.index or 0]
    before = generator.get_state()
    generator.manual_seed(seed)
    try:
        yield
    finally:
        generator.set_state(before)

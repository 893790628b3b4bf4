"""What makes a training step fast on a GPU, applied to a model from outside.

The parameters keep their names and shapes, so that checkpoints know nothing of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from plug.model.attention import Attention
from plug.model.layers import DecoderLayer, Embeddings, EncoderLayer, KeyValue, KeyValueCache
from plug.model.plug import Decoder, Plug
from plug.pretraining import losses


def keep_bf16(model: Plug) -> None:
    """Have the residual stream in bf16 from the embeddings on; norms still compute in float32.

    Autocast alone leaves it in float32, the dtype of the embeddings' norm: twice the bytes at every
    residual connection, forward and backward.
    """
    model.embeddings.__class__ = _Bf16Embeddings


def compile_model(model: Plug, *, is_sharded: bool = False) -> None:
    """Compile a model's parts in place, with projections of the same states in one product.

    Each layer is compiled alone: all of a kind share one graph, for all lengths, so that this takes
    seconds and not minutes.

    Args:
        model: that is to be trained.
        is_sharded: FSDP2 will shard it. It gathers a layer's weights in hooks, which stay outside
            of what is compiled; those of the projections of the encoder's output it gathers layer
            by layer, so these are not put into one product.
    """
    for layer in model.encoder.layers:
        layer.__class__ = _PackedEncoderLayer
    parts: list[nn.Module] = [model.embeddings, *model.encoder.layers, model.encoder.final_norm]
    if model.decoder is not None:
        for layer in model.decoder.layers:
            layer.__class__ = _PackedDecoderLayer
        if not is_sharded:
            model.decoder.__class__ = _PackedDecoder
            cast(_PackedDecoder, model.decoder).project = torch.compile(_project, dynamic=True)
        parts += [*model.decoder.layers, model.decoder.final_norm]
    for part in parts:
        if is_sharded:
            part.forward = torch.compile(part.forward, dynamic=True)
        else:
            part.compile(dynamic=True)
    for name in ("lm_loss", "mlm_loss"):
        plain = getattr(losses, name)
        plain = getattr(plain, "_torchdynamo_orig_callable", plain)  # of an earlier run
        setattr(losses, name, torch.compile(plain, dynamic=True))


class _Bf16Embeddings(Embeddings):
    def forward(self, *arguments: Any, **options: Any) -> Tensor:
        return super().forward(*arguments, **options).to(torch.bfloat16)


class _PackedEncoderLayer(EncoderLayer):
    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None) -> Tensor:
        assert attention_mask is None, "passages fill their length"
        normalized = self.attention_norm(hidden_states)
        context = _attend_to_itself(self.attention, normalized, is_causal=False)
        hidden_states = hidden_states + self.dropout(context)
        normalized = self.feed_forward_norm(hidden_states)
        return hidden_states + self.dropout(self.feed_forward(normalized))


class _PackedDecoderLayer(DecoderLayer):
    def forward(
        self,
        hidden_states: Tensor,
        encoder_key_value: KeyValue,
        encoder_attention_mask: Tensor | None,
        self_attention_mask: Tensor | None = None,
        past_key_values: KeyValueCache | None = None,
    ) -> Tensor:
        masks = (encoder_attention_mask, self_attention_mask, past_key_values)
        assert masks == (None, None, None), "passages fill their length"
        normalized = self.self_attention_norm(hidden_states)
        context = _attend_to_itself(self.self_attention, normalized, is_causal=True)
        hidden_states = hidden_states + self.dropout(context)
        normalized = self.cross_attention_norm(hidden_states)
        context = self.cross_attention(normalized, *encoder_key_value)
        hidden_states = hidden_states + self.dropout(context)
        normalized = self.feed_forward_norm(hidden_states)
        return hidden_states + self.dropout(self.feed_forward(normalized))


class _PackedDecoder(Decoder):
    project: Callable[[list[nn.Linear], Tensor, int], list[Tensor]]  # compiled

    def project_encoder(self, encoder_hidden_states: Tensor) -> list[KeyValue]:
        attentions = [cast(DecoderLayer, layer).cross_attention for layer in self.layers]
        linears = [linear for each in attentions for linear in (each.k_proj, each.v_proj)]
        heads = self.project(linears, encoder_hidden_states, attentions[0].head_dim)
        return list(zip(heads[::2], heads[1::2], strict=True))


def _attend_to_itself(attention: Attention, states: Tensor, *, is_causal: bool) -> Tensor:
    linears = [attention.q_proj, attention.k_proj, attention.v_proj]
    dropout = attention.dropout if attention.training else 0.0
    query, key, value = _project(linears, states, attention.head_dim)
    context = F.scaled_dot_product_attention(
        query, key, value, dropout_p=dropout, is_causal=is_causal
    )
    return cast(Tensor, attention.out_proj(context.transpose(1, 2).flatten(2)))


def _project(linears: list[nn.Linear], states: Tensor, head_dim: int) -> list[Tensor]:
    """Return what each linear layer makes of the same states, (batch, heads, length, head_dim)."""
    weight = torch.cat([linear.weight for linear in linears])
    bias = torch.cat([linear.bias for linear in linears])
    projected = F.linear(states, weight, bias).chunk(len(linears), dim=-1)
    return [each.unflatten(-1, (-1, head_dim)).transpose(1, 2) for each in projected]

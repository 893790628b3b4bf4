"""What makes a training step fast on a GPU, applied to a model from outside.

The parameters keep their names and shapes, so that checkpoints know nothing of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from plug.errors import UsageError
from plug.model.attention import Attention
from plug.model.configuration import PlugConfig
from plug.model.layers import (
    DecoderLayer,
    Embeddings,
    EncoderLayer,
    FeedForward,
    KeyValue,
    KeyValueCache,
)
from plug.model.plug import Decoder, Plug
from plug.pretraining import losses

Attend = Callable[..., tuple[Tensor, Tensor]]  # `plug.kernels.training_attention.attend`
Gelu = Callable[[Tensor, Tensor], Tensor]  # `plug.kernels.gelu.BiasedGelu.apply`
LONGEST = 512  # positions that our own kernels of attention are made for


def keep_bf16(model: Plug) -> None:
    """Have the residual stream in bf16 from the embeddings on; norms still compute in float32.

    Autocast alone leaves it in float32, the dtype of the embeddings' norm: twice the bytes at every
    residual connection, forward and backward.
    """
    model.embeddings.__class__ = _Bf16Embeddings


def compile_model(model: Plug, *, own_kernels: bool = False, is_sharded: bool = False) -> None:
    """Compile a model's parts in place, with projections of the same states in one product.

    Each layer is compiled alone: all of a kind share one graph, for all lengths, so that this takes
    seconds and not minutes.

    Args:
        model: that is to be trained.
        own_kernels: attention, and GELU with its bias, by `kernels/`; under autocast in bf16 on a
            device that `check_kernels` admits.
        is_sharded: FSDP2 will shard it. It gathers a layer's weights in hooks, which stay outside
            of what is compiled; those of the projections of the encoder's output it gathers layer
            by layer, so these are not put into one product.
    """
    attend = _attention_kernel() if own_kernels else None
    gelu = _gelu_kernel() if own_kernels else None
    for layer in model.encoder.layers:
        layer.__class__ = _PackedEncoderLayer
        cast(_PackedEncoderLayer, layer).attend = attend
        cast(_PackedEncoderLayer, layer).gelu = gelu
    parts: list[nn.Module] = [model.embeddings, *model.encoder.layers, model.encoder.final_norm]
    if model.decoder is not None:
        for layer in model.decoder.layers:
            layer.__class__ = _PackedDecoderLayer
            cast(_PackedDecoderLayer, layer).attend = attend
            cast(_PackedDecoderLayer, layer).gelu = gelu
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


def check_kernels(config: PlugConfig, device: torch.device) -> None:
    """Raise a `UsageError` unless our own kernels serve heads of this width on this device."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] != 9:
        found = "CPU" if device.type != "cuda" else torch.cuda.get_device_name(device)
        raise UsageError(
            f"own_kernels 要计算能力 9.x 的显卡（如 H100），现在用的是 {found}。请去掉这项设置。"
        )
    from plug.kernels.training_attention import HEAD_DIMS  # needs triton, which comes with CUDA

    if config.head_dim not in HEAD_DIMS:
        raise UsageError(
            f"own_kernels 要求每个注意力头的宽度是 {' 或 '.join(map(str, HEAD_DIMS))}，"
            f"现在是 {config.head_dim}。请改 num_attention_heads，或去掉这项设置。"
        )


def _attention_kernel() -> Attend:
    from plug.kernels.training_attention import attend

    return attend


def _gelu_kernel() -> Gelu:
    from plug.kernels.gelu import BiasedGelu

    return cast(Gelu, BiasedGelu.apply)


class _Bf16Embeddings(Embeddings):
    def forward(self, *arguments: Any, **options: Any) -> Tensor:
        return super().forward(*arguments, **options).to(torch.bfloat16)


class _PackedEncoderLayer(EncoderLayer):
    attend: Attend | None
    gelu: Gelu | None

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None) -> Tensor:
        assert attention_mask is None, "passages fill their length"
        normalized = self.attention_norm(hidden_states)
        context = _attend_to_itself(self.attention, normalized, False, self.attend)
        hidden_states = hidden_states + self.dropout(context)
        normalized = self.feed_forward_norm(hidden_states)
        transformed = _feed_forward(self.feed_forward, normalized, self.gelu)
        return hidden_states + self.dropout(transformed)


class _PackedDecoderLayer(DecoderLayer):
    attend: Attend | None
    gelu: Gelu | None

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
        context = _attend_to_itself(self.self_attention, normalized, True, self.attend)
        hidden_states = hidden_states + self.dropout(context)
        normalized = self.cross_attention_norm(hidden_states)
        context = _attend_to(self.cross_attention, normalized, encoder_key_value, self.attend)
        hidden_states = hidden_states + self.dropout(context)
        normalized = self.feed_forward_norm(hidden_states)
        transformed = _feed_forward(self.feed_forward, normalized, self.gelu)
        return hidden_states + self.dropout(transformed)


class _PackedDecoder(Decoder):
    project: Callable[[list[nn.Linear], Tensor, int], list[Tensor]]  # compiled

    def project_encoder(self, encoder_hidden_states: Tensor) -> list[KeyValue]:
        attentions = [cast(DecoderLayer, layer).cross_attention for layer in self.layers]
        linears = [linear for each in attentions for linear in (each.k_proj, each.v_proj)]
        heads = self.project(linears, encoder_hidden_states, attentions[0].head_dim)
        return list(zip(heads[::2], heads[1::2], strict=True))


def _attend_to_itself(
    attention: Attention, states: Tensor, is_causal: bool, attend: Attend | None
) -> Tensor:
    linears = [attention.q_proj, attention.k_proj, attention.v_proj]
    dropout = attention.dropout if attention.training else 0.0
    if attend is not None and states.shape[1] <= LONGEST:
        side_by_side = _joined(linears, states)
        seed = _seed(states, dropout)
        context, _ = attend(side_by_side, None, None, attention.head_dim, is_causal, dropout, seed)
        return cast(Tensor, attention.out_proj(context))
    query, key, value = _project(linears, states, attention.head_dim)
    context = F.scaled_dot_product_attention(
        query, key, value, dropout_p=dropout, is_causal=is_causal
    )
    return cast(Tensor, attention.out_proj(context.transpose(1, 2).flatten(2)))


def _attend_to(
    attention: Attention, states: Tensor, key_value: KeyValue, attend: Attend | None
) -> Tensor:
    if attend is None or max(states.shape[1], key_value[0].shape[2]) > LONGEST:
        return cast(Tensor, attention(states, *key_value))
    dropout = attention.dropout if attention.training else 0.0
    key, value = (each.transpose(1, 2).flatten(2) for each in key_value)
    query, seed = attention.q_proj(states), _seed(states, dropout)
    context, _ = attend(query, key, value, attention.head_dim, False, dropout, seed)
    return cast(Tensor, attention.out_proj(context))


def _feed_forward(part: FeedForward, states: Tensor, gelu: Gelu | None) -> Tensor:
    if gelu is None or type(part.fc1) is not nn.Linear:  # in FP8 it multiplies by itself
        return cast(Tensor, part(states))
    return cast(Tensor, part.fc2(gelu(F.linear(states, part.fc1.weight), part.fc1.bias)))


def _seed(states: Tensor, dropout: float) -> Tensor | None:
    return torch.randint(2**31, (1,), device=states.device) if dropout else None


def _project(linears: list[nn.Linear], states: Tensor, head_dim: int) -> list[Tensor]:
    """Return what each linear layer makes of the same states, (batch, heads, length, head_dim)."""
    projected = _joined(linears, states).chunk(len(linears), dim=-1)
    return [each.unflatten(-1, (-1, head_dim)).transpose(1, 2) for each in projected]


def _joined(linears: list[nn.Linear], states: Tensor) -> Tensor:
    """Return what linear layers make of the same states, side by side, in one product."""
    weight = torch.cat([linear.weight for linear in linears])
    bias = torch.cat([linear.bias for linear in linears])
    return F.linear(states, weight, bias)

"""The pre-LN building blocks: embeddings, feed-forward, encoder layer, decoder layer."""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plug.model.attention import Attention
from plug.model.configuration import PlugConfig

KeyValue = tuple[Tensor, Tensor]  # each (batch, heads, positions, head_dim)


class KeyValueCache(Protocol):
    """What a decoder layer needs of a cache; `plug.generation.kv_cache` has ours."""

    def update(self, key: Tensor, value: Tensor, layer_index: int) -> KeyValue:
        """Add new positions of one layer's self-attention; all of its keys and values so far."""
        ...


class LayerNorm(nn.LayerNorm):
    """LayerNorm computed in fp32 whatever the input and weights are; returns the input's dtype.

    The reference's half mode does the same by hand at every norm.
    """

    def __init__(self, config: PlugConfig) -> None:
        super().__init__(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == self.weight.dtype:  # PyTorch's kernels then compute in fp32 by themselves
            normalized = F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
            return normalized.to(x.dtype)
        normalized = F.layer_norm(
            x.float(), self.normalized_shape, self.weight.float(), self.bias.float(), self.eps
        )
        return normalized.to(x.dtype)


class Embeddings(nn.Module):
    """Word + position + token type, then LayerNorm and dropout; encoder and decoder share it."""

    def __init__(self, config: PlugConfig) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.layer_norm = LayerNorm(config)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(
        self,
        input_ids: Tensor | None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """(batch, seq) ids to (batch, seq, hidden); token type 0 and positions from 0 if None.

        ``inputs_embeds`` (batch, seq, hidden) takes the place of the words' embeddings.
        """
        words = self.word_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        if position_ids is None:
            position_ids = torch.arange(words.shape[1], device=words.device)
        if token_type_ids is None:
            token_type = self.token_type_embeddings.weight[0]
        else:
            token_type = self.token_type_embeddings(token_type_ids)
        position = self.position_embeddings(position_ids)
        summed = words + position + token_type
        return self.dropout(self.layer_norm(summed))


class FeedForward(nn.Module):
    """Two linear layers around an exact (erf) GELU."""

    def __init__(self, config: PlugConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.gelu = nn.GELU()
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.fc2(self.gelu(self.fc1(hidden_states)))


class EncoderLayer(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, config: PlugConfig) -> None:
        super().__init__()
        self.attention_norm = LayerNorm(config)
        self.attention = Attention(config)
        self.feed_forward_norm = LayerNorm(config)
        self.feed_forward = FeedForward(config)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None) -> Tensor:
        """(batch, src, hidden) to the same; ``attention_mask`` as in `Attention.forward`."""
        normalized = self.attention_norm(hidden_states)
        key, value = self.attention.project_key_value(normalized)
        context = self.attention(normalized, key, value, attention_mask)
        hidden_states = hidden_states + self.dropout(context)
        transformed = self.feed_forward(self.feed_forward_norm(hidden_states))
        return hidden_states + self.dropout(transformed)


class DecoderLayer(nn.Module):
    """Causal self-attention, cross-attention over the encoder's output, feed-forward."""

    def __init__(self, config: PlugConfig, index: int) -> None:
        super().__init__()
        self.index = index
        self.self_attention_norm = LayerNorm(config)
        self.self_attention = Attention(config)
        self.cross_attention_norm = LayerNorm(config)
        self.cross_attention = Attention(config)
        self.feed_forward_norm = LayerNorm(config)
        self.feed_forward = FeedForward(config)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_key_value: KeyValue,
        encoder_attention_mask: Tensor | None,
        self_attention_mask: Tensor | None = None,
        past_key_values: KeyValueCache | None = None,
    ) -> Tensor:
        """(batch, tgt, hidden) to the same.

        Args:
            hidden_states: the new positions.
            encoder_key_value: `Attention.project_key_value` of the encoder's output.
            encoder_attention_mask: bool, broadcastable to (batch, heads, tgt, src), or None.
            self_attention_mask: bool, broadcastable to (batch, heads, tgt, past + tgt); None is
                plain causal over the new positions alone.
            past_key_values: where self-attention keys and values of earlier positions are kept.
        """
        normalized = self.self_attention_norm(hidden_states)
        key, value = self.self_attention.project_key_value(normalized)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.index)
        is_causal = self_attention_mask is None
        context = self.self_attention(normalized, key, value, self_attention_mask, is_causal)
        hidden_states = hidden_states + self.dropout(context)
        normalized = self.cross_attention_norm(hidden_states)
        context = self.cross_attention(normalized, *encoder_key_value, encoder_attention_mask)
        hidden_states = hidden_states + self.dropout(context)
        transformed = self.feed_forward(self.feed_forward_norm(hidden_states))
        return hidden_states + self.dropout(transformed)

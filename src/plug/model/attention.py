"""Multi-head attention, and the masks that go with it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plug.model.configuration import PlugConfig


class Attention(nn.Module):
    """Multi-head attention for encoder, decoder and cross-attention alike.

    They differ in where keys come from and in the mask; the caller passes both, so there is no
    mode flag here and no second copy of this class.
    """

    def __init__(self, config: PlugConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.dropout = config.attention_probs_dropout_prob
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def project_key_value(self, source: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of ``source`` (batch, src, hidden), each (batch, heads, src, head_dim).

        Run once per input on ``encoder_hidden_states`` for cross-attention, once per step for
        decoder self-attention; ``past_key_values`` keeps the results.
        """
        return self._split_heads(self.k_proj(source)), self._split_heads(self.v_proj(source))

    def forward(
        self,
        hidden_states: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """Mix ``value`` by the match of each position's query with ``key``.

        Args:
            hidden_states: (batch, tgt, hidden), what asks.
            key: (batch, heads, src, head_dim) from `project_key_value`.
            value: the same shape as ``key``.
            attention_mask: bool, True where attention is allowed, broadcastable to
                (batch, heads, tgt, src); None allows all.
            is_causal: each position sees itself and those before; needs tgt == src and no mask.

        Returns:
            (batch, tgt, hidden).
        """
        query = self._split_heads(self.q_proj(hidden_states))  # (batch, heads, tgt, head_dim)
        context = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=attention_mask,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=is_causal,
        )
        return self.out_proj(context.transpose(1, 2).flatten(2))

    def probabilities(
        self,
        hidden_states: Tensor,
        key: Tensor,
        attention_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """Return the weights by which `forward` mixes the values, before dropout.

        For looking inside: `forward` never holds them. Arguments as in `forward`.

        Returns:
            (batch, heads, tgt, src); a position that may look nowhere has zeros.
        """
        query = self._split_heads(self.q_proj(hidden_states))
        scores = (query @ key.transpose(-1, -2)).float() * self.head_dim**-0.5
        if is_causal:
            attention_mask = causal_mask(scores.shape[-2], scores.shape[-1], scores.device)
        if attention_mask is not None:
            scores = scores.masked_fill(~attention_mask, -torch.inf)
        return scores.softmax(-1).nan_to_num(0.0).to(hidden_states.dtype)

    def _split_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


def padding_mask(attention_mask: Tensor | None) -> Tensor | None:
    """(batch, src) of 0/1 or bool, 1 on real tokens, to a bool mask (batch, 1, 1, src)."""
    return None if attention_mask is None else attention_mask.bool()[:, None, None, :]


def causal_mask(query_length: int, key_length: int, device: torch.device | None = None) -> Tensor:
    """Which keys each query may see, when the queries are the last ``query_length`` positions.

    Args:
        query_length: positions computed now, in tokens (1 while decoding with a cache).
        key_length: those plus the positions held in ``past_key_values``, in tokens.
        device: where the mask is made.

    Returns:
        Bool (query_length, key_length), True where attention is allowed; broadcasts over
        (batch, heads) and combines with a padding mask by ``&``.

    Raises:
        ValueError: more queries than keys.

    Source: Vaswani et al. 2017, arXiv:1706.03762, section 3.2.3; the cache offset is ours.
    """
    if query_length > key_length:
        raise ValueError(
            f"{query_length} queries, {key_length} keys. Pass key_length = cached + query_length."
        )
    ones = torch.ones(query_length, key_length, dtype=torch.bool, device=device)
    return ones.tril(key_length - query_length)

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor, nn

from plug.model.attention import Attention, causal_mask, padding_mask
from plug.model.configuration import PRESETS

HIDDEN = PRESETS["test"].hidden_size
HEADS = PRESETS["test"].num_attention_heads


@pytest.fixture
def attention() -> Attention:
    torch.manual_seed(0)
    return Attention(PRESETS["test"]).eval()


def torch_attention(attention: Attention) -> nn.MultiheadAttention:
    """torch's own class with the same weights."""
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    peer = nn.MultiheadAttention(HIDDEN, HEADS, batch_first=True).eval()
    with torch.no_grad():
        peer.in_proj_weight.copy_(torch.cat([each.weight for each in projections]))
        peer.in_proj_bias.copy_(torch.cat([each.bias for each in projections]))
    peer.out_proj = attention.out_proj
    return peer


def looped_attention(attention: Attention, asking: Tensor, source: Tensor, mask: Tensor) -> Tensor:
    """Softmax written out, one query of one head of one sequence at a time."""
    batch, query_length, _ = asking.shape
    size = HIDDEN // HEADS
    context = torch.zeros(batch, query_length, HIDDEN)
    for b in range(batch):
        for head in range(HEADS):
            rows = slice(head * size, (head + 1) * size)
            query = attention.q_proj(asking[b])[:, rows]
            key = attention.k_proj(source[b])[:, rows]
            value = attention.v_proj(source[b])[:, rows]
            for i in range(query_length):
                allowed = mask[b, i].nonzero().flatten().tolist()
                weights = [math.exp(float(query[i] @ key[j]) / math.sqrt(size)) for j in allowed]
                for weight, j in zip(weights, allowed, strict=True):
                    context[b, i, rows] += weight / sum(weights) * value[j]
    return attention.out_proj(context)


@torch.inference_mode()
def test_self_attention_equals_torch_multihead_attention(attention: Attention) -> None:
    hidden_states = torch.randn(3, 7, HIDDEN)
    real = torch.ones(3, 7, dtype=torch.bool)
    real[1, 4:] = False
    real[2, 1:] = False
    expected, _ = torch_attention(attention)(
        hidden_states, hidden_states, hidden_states, key_padding_mask=~real, need_weights=False
    )

    key, value = attention.project_key_value(hidden_states)
    actual = attention(hidden_states, key, value, padding_mask(real))

    torch.testing.assert_close(actual, expected)


@torch.inference_mode()
def test_cross_attention_equals_a_softmax_written_out(attention: Attention) -> None:
    asking, source = torch.randn(2, 5, HIDDEN), torch.randn(2, 9, HIDDEN)
    real = torch.ones(2, 9, dtype=torch.int64)
    real[1, 6:] = 0
    mask = real.bool()[:, None, :].expand(2, 5, 9)
    expected = looped_attention(attention, asking, source, mask)

    actual = attention(asking, *attention.project_key_value(source), padding_mask(real))

    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4)


@torch.inference_mode()
def test_causal_attention_equals_a_softmax_written_out(attention: Attention) -> None:
    hidden_states = torch.randn(2, 6, HIDDEN)
    allowed = torch.tensor([[j <= i for j in range(6)] for i in range(6)]).expand(2, 6, 6)
    expected = looped_attention(attention, hidden_states, hidden_states, allowed)

    key, value = attention.project_key_value(hidden_states)
    by_flag = attention(hidden_states, key, value, is_causal=True)
    by_mask = attention(hidden_states, key, value, causal_mask(6, 6))

    torch.testing.assert_close(by_flag, expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(by_mask, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("cached_length", [1, 3, 6])
@torch.inference_mode()
def test_new_positions_over_kept_keys_equal_the_full_pass(
    attention: Attention, cached_length: int
) -> None:
    hidden_states = torch.randn(2, 7, HIDDEN)
    key, value = attention.project_key_value(hidden_states)
    expected = attention(hidden_states, key, value, causal_mask(7, 7))[:, cached_length:]

    new_states = hidden_states[:, cached_length:]
    actual = attention(new_states, key, value, causal_mask(7 - cached_length, 7))

    torch.testing.assert_close(actual, expected)


def test_causal_mask_lets_the_last_queries_see_all_before_them() -> None:
    expected = [[key <= 4 + query for key in range(7)] for query in range(3)]
    assert causal_mask(3, 7).tolist() == expected


def test_causal_mask_refuses_more_queries_than_keys() -> None:
    with pytest.raises(ValueError, match="4 queries, 3 keys"):
        causal_mask(4, 3)


def test_padding_mask_broadcasts_over_heads_and_queries() -> None:
    mask = padding_mask(torch.tensor([[1, 1, 0], [1, 0, 0]]))
    assert mask is not None
    assert mask.shape == (2, 1, 1, 3)
    assert mask.dtype == torch.bool
    assert mask[:, 0, 0].tolist() == [[True, True, False], [True, False, False]]
    assert padding_mask(None) is None


def test_dropout_of_attention_acts_in_training_only() -> None:
    config = dataclasses.replace(PRESETS["test"], attention_probs_dropout_prob=0.5)
    torch.manual_seed(0)
    attention = Attention(config)
    hidden_states = torch.randn(2, 7, HIDDEN)
    key, value = attention.project_key_value(hidden_states)

    first, second = (attention(hidden_states, key, value) for _ in range(2))
    assert not torch.equal(first, second)
    attention.eval()
    first, second = (attention(hidden_states, key, value) for _ in range(2))
    assert torch.equal(first, second)

from __future__ import annotations

import dataclasses

import pytest
import torch

from plug.model.configuration import PRESETS
from plug.model.layers import Embeddings, FeedForward, LayerNorm

CONFIG = PRESETS["test"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@torch.inference_mode()
def test_layer_norm_computes_in_fp32_and_returns_the_input_s_dtype(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    norm = LayerNorm(CONFIG).to(dtype)
    norm.weight.normal_(1, 0.3)
    norm.bias.normal_(0, 0.3)
    x = (100 + torch.randn(2, 5, CONFIG.hidden_size)).to(dtype)  # 16 bits lose this variance
    wide = x.double()
    variance = wide.var(-1, correction=0, keepdim=True)
    normal = (wide - wide.mean(-1, keepdim=True)) / (variance + CONFIG.layer_norm_eps).sqrt()
    expected = normal * norm.weight.double() + norm.bias.double()

    actual = norm(x)

    assert actual.dtype == dtype
    one_rounding = {torch.float32: 1e-4, torch.float16: 2**-11, torch.bfloat16: 2**-8}[dtype]
    torch.testing.assert_close(actual.double(), expected, atol=one_rounding, rtol=one_rounding)


@torch.inference_mode()
def test_layer_norm_uses_the_config_s_epsilon() -> None:
    x = torch.randn(1, CONFIG.hidden_size) * 1e-3
    norms = [LayerNorm(dataclasses.replace(CONFIG, layer_norm_eps=eps)) for eps in (1e-5, 1e-12)]
    low, high = (norm(x).std() for norm in norms)
    assert low < 0.5 < high


@torch.inference_mode()
def test_embeddings_add_word_position_and_type_then_normalise() -> None:
    torch.manual_seed(0)
    embeddings = Embeddings(CONFIG).eval()
    input_ids = torch.tensor([[5, 7, 7], [9, 0, 2]])
    token_type_ids = torch.tensor([[0, 1, 2], [2, 1, 0]])
    for b, row in enumerate(embeddings(input_ids, token_type_ids)):
        for i, vector in enumerate(row):
            summed = (
                embeddings.word_embeddings.weight[input_ids[b, i]]
                + embeddings.position_embeddings.weight[i]
                + embeddings.token_type_embeddings.weight[token_type_ids[b, i]]
            )
            torch.testing.assert_close(vector, embeddings.layer_norm(summed))


@torch.inference_mode()
def test_embeddings_take_token_type_0_and_positions_from_0_when_none_are_given() -> None:
    embeddings = Embeddings(CONFIG).eval()
    input_ids = torch.tensor([[5, 7, 7], [9, 0, 2]])
    zeros, positions = torch.zeros_like(input_ids), torch.tensor([[0, 1, 2]])
    expected = embeddings(input_ids, zeros, positions)
    torch.testing.assert_close(embeddings(input_ids), expected)
    assert not torch.allclose(embeddings(input_ids, zeros, positions + 1), expected)


@torch.inference_mode()
def test_feed_forward_uses_the_erf_gelu() -> None:
    feed_forward = FeedForward(CONFIG)
    x = torch.randn(3, CONFIG.hidden_size)
    inner = feed_forward.fc1(x)
    gelu = inner * 0.5 * (1 + torch.erf(inner / 2**0.5))
    torch.testing.assert_close(feed_forward(x), feed_forward.fc2(gelu))

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from plug.model.attention import Attention, causal_mask
from plug.model.configuration import PRESETS, PlugConfig
from plug.model.layers import DecoderLayer, EncoderLayer, FeedForward
from plug.model.plug import Plug

SOURCE = torch.tensor([[2, 17, 5, 99, 40, 41, 3], [2, 8, 300, 3, 0, 0, 0]])
MASK = (SOURCE != 0).long()
WRITTEN = torch.tensor([[2, 9, 10, 11, 12], [2, 44, 45, 46, 47]])


def put_attention(source: Attention, target: nn.MultiheadAttention) -> None:
    projections = (source.q_proj, source.k_proj, source.v_proj)
    target.in_proj_weight = nn.Parameter(torch.cat([each.weight for each in projections]))
    target.in_proj_bias = nn.Parameter(torch.cat([each.bias for each in projections]))
    target.out_proj = source.out_proj  # type: ignore[assignment]


def put_feed_forward(source: FeedForward, target: nn.Module) -> None:
    target.linear1, target.linear2 = source.fc1, source.fc2


def torch_encoder_layer(layer: EncoderLayer, config: PlugConfig) -> nn.Module:
    """torch's own pre-LN layer with the same weights."""
    peer = nn.TransformerEncoderLayer(
        config.hidden_size,
        config.num_attention_heads,
        config.intermediate_size,
        activation="gelu",
        batch_first=True,
        norm_first=True,
    ).eval()
    put_attention(layer.attention, peer.self_attn)
    put_feed_forward(layer.feed_forward, peer)
    peer.norm1, peer.norm2 = layer.attention_norm, layer.feed_forward_norm
    return peer


def torch_decoder_layer(layer: DecoderLayer, config: PlugConfig) -> nn.Module:
    peer = nn.TransformerDecoderLayer(
        config.hidden_size,
        config.num_attention_heads,
        config.intermediate_size,
        activation="gelu",
        batch_first=True,
        norm_first=True,
    ).eval()
    put_attention(layer.self_attention, peer.self_attn)
    put_attention(layer.cross_attention, peer.multihead_attn)
    put_feed_forward(layer.feed_forward, peer)
    peer.norm1, peer.norm2 = layer.self_attention_norm, layer.cross_attention_norm
    peer.norm3 = layer.feed_forward_norm
    return peer


def test_encoder_equals_torch_transformer_layers(tiny_model: Plug) -> None:
    hidden_states = tiny_model.embeddings(SOURCE)
    for layer in tiny_model.encoder.layers:
        peer = torch_encoder_layer(layer, tiny_model.config)
        hidden_states = peer(hidden_states, src_key_padding_mask=MASK == 0)
    expected = tiny_model.encoder.final_norm(hidden_states)

    actual = tiny_model.encode(SOURCE, MASK)

    torch.testing.assert_close(actual[MASK == 1], expected[MASK == 1], atol=1e-4, rtol=1e-4)


def test_decoder_equals_torch_transformer_layers(tiny_model: Plug) -> None:
    assert tiny_model.decoder is not None
    encoded = tiny_model.encode(SOURCE, MASK)
    hidden_states = tiny_model.embeddings(WRITTEN)
    future = ~causal_mask(5, 5)
    for layer in tiny_model.decoder.layers:
        peer = torch_decoder_layer(layer, tiny_model.config)
        hidden_states = peer(
            hidden_states, encoded, tgt_mask=future, memory_key_padding_mask=MASK == 0
        )
    expected = tiny_model.decoder.final_norm(hidden_states)

    actual = tiny_model.decode(WRITTEN, encoded, MASK)

    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


@torch.inference_mode()
def test_padding_changes_nothing_for_the_real_tokens(tiny_model: Plug) -> None:
    alone = SOURCE[1:, :4]
    padded, short = tiny_model.encode(SOURCE, MASK), tiny_model.encode(alone)
    torch.testing.assert_close(padded[1:, :4], short, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        tiny_model.decode(WRITTEN, padded, MASK)[1:],
        tiny_model.decode(WRITTEN[1:], short),
        atol=1e-5,
        rtol=1e-5,
    )


@torch.inference_mode()
def test_what_is_written_later_changes_nothing_before_it(tiny_model: Plug) -> None:
    encoded = tiny_model.encode(SOURCE, MASK)
    changed = WRITTEN.clone()
    changed[:, 3] = 200
    before, after = (tiny_model.decode(ids, encoded, MASK) for ids in (WRITTEN, changed))
    torch.testing.assert_close(before[:, :3], after[:, :3])
    assert not torch.allclose(before[:, 3:], after[:, 3:])


@torch.inference_mode()
def test_two_final_norm_passes_are_one_more_norm_of_one_pass(
    config: PlugConfig, make_model: Callable[[PlugConfig], Plug]
) -> None:
    once = make_model(config)
    twice = make_model(dataclasses.replace(config, encoder_final_norm_passes=2))
    encoded_once, encoded_twice = (model.encode(SOURCE, MASK) for model in (once, twice))
    torch.testing.assert_close(encoded_twice, once.encoder.final_norm(encoded_once))
    assert not torch.allclose(encoded_twice, encoded_once, atol=1e-2)


class GrowingCache:
    """The plainest cache there is: concatenate."""

    def __init__(self) -> None:
        self.kept: dict[int, tuple[Tensor, Tensor]] = {}

    def update(self, key: Tensor, value: Tensor, layer_index: int) -> tuple[Tensor, Tensor]:
        if layer_index in self.kept:
            old_key, old_value = self.kept[layer_index]
            key, value = torch.cat([old_key, key], dim=2), torch.cat([old_value, value], dim=2)
        self.kept[layer_index] = key, value
        return key, value


@pytest.mark.parametrize("steps", [[1, 1, 1, 1, 1], [3, 1, 1], [2, 3]])
@torch.inference_mode()
def test_decoding_with_a_cache_equals_the_full_pass(tiny_model: Plug, steps: list[int]) -> None:
    assert tiny_model.decoder is not None
    encoded = tiny_model.encode(SOURCE, MASK)
    expected = tiny_model.decode(WRITTEN, encoded, MASK)

    projected = tiny_model.decoder.project_encoder(encoded)
    cache, done, pieces = GrowingCache(), 0, []
    for count in steps:
        positions = torch.arange(done, done + count)
        embedded = tiny_model.embeddings(WRITTEN[:, positions], position_ids=positions)
        mask = causal_mask(count, done + count)
        pieces.append(tiny_model.decoder(embedded, projected, MASK, mask, cache))
        done += count

    torch.testing.assert_close(torch.cat(pieces, dim=1), expected, atol=1e-5, rtol=1e-5)


def test_an_encoder_alone_has_no_decoder_and_still_has_its_heads(config: PlugConfig) -> None:
    model = Plug(dataclasses.replace(config, num_decoder_layers=0)).eval()
    assert model.decoder is None
    encoded = model.encode(SOURCE, MASK)
    assert model.mlm_logits(encoded).shape == (2, 7, config.vocab_size)
    assert model.sentence_logits(encoded).shape == (2, 3)


@torch.no_grad()
def test_fresh_weights_have_the_config_s_spread_and_the_decoder_s_outputs_less(
    config: PlugConfig,
) -> None:
    """Reference: residual outputs of the decoder are scaled by 1 / sqrt(2 * layers), here 1/2."""
    torch.manual_seed(0)
    model = Plug(dataclasses.replace(config, hidden_size=128, initializer_range=0.02))
    assert model.decoder is not None
    layer = model.decoder.layers[0]
    plain = (model.embeddings.word_embeddings, model.encoder.layers[0].attention.out_proj)
    for part in (*plain, layer.self_attention.q_proj, layer.feed_forward.fc1):
        assert float(part.weight.std()) == pytest.approx(0.02, rel=0.05)
    residual = (layer.self_attention, layer.cross_attention)
    for part in (*(each.out_proj for each in residual), layer.feed_forward.fc2):
        assert float(part.weight.std()) == pytest.approx(0.01, rel=0.05)
    assert not any(part.bias.any() for part in model.modules() if isinstance(part, nn.Linear))


@torch.inference_mode()
def test_hidden_dropout_acts_in_training_only(config: PlugConfig) -> None:
    config = dataclasses.replace(config, attention_probs_dropout_prob=0.0)
    model = Plug(config)
    assert not torch.equal(model.encode(SOURCE), model.encode(SOURCE))
    model.eval()
    assert torch.equal(model.encode(SOURCE), model.encode(SOURCE))


def test_presets_have_the_parameters_their_names_promise() -> None:
    """Counted over the modules; the 27B's figures are the spec's: 19.3B + 6.4B + 0.2B."""
    with torch.device("meta"):
        models = {name: Plug(PRESETS[name]) for name in ("mini", "27b")}

    def count(part: nn.Module | None) -> int:
        assert part is not None
        return sum(each.numel() for each in part.parameters())

    original = models["27b"]
    assert round(count(original.encoder) / 1e9, 1) == 19.3
    assert round(count(original.decoder) / 1e9, 1) == 6.4
    assert round(count(original.embeddings) / 1e9, 1) == 0.2
    assert count(models["mini"]) <= 60_000_000

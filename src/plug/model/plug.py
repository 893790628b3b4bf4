"""PLUG: a StructBERT encoder, a PALM decoder on top of it, and the heads. Plain PyTorch.

`Plug` is single-device mathematics. Caches, compiled decoding, shards and training loops are
applied from outside; `plug.load` (in `plug.checkpoints.directory`) makes one from a directory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from torch import Tensor, nn
from torch.nn import functional as F

from plug.model.attention import padding_mask
from plug.model.configuration import PlugConfig
from plug.model.heads import MaskedLMHead, SentenceHead
from plug.model.layers import (
    DecoderLayer,
    Embeddings,
    EncoderLayer,
    KeyValue,
    KeyValueCache,
    LayerNorm,
)


class Encoder(nn.Module):
    """Pre-LN layers and a final LayerNorm, applied `encoder_final_norm_passes` times."""

    def __init__(self, config: PlugConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.num_hidden_layers))
        self.final_norm = LayerNorm(config)
        self.final_norm_passes = config.encoder_final_norm_passes

    def forward(self, embedded: Tensor, attention_mask: Tensor | None) -> Tensor:
        """(batch, src, hidden) to the same; mask (batch, src), 1 on real tokens, or None."""
        mask = padding_mask(attention_mask)
        hidden_states = embedded
        for layer in self.layers:
            hidden_states = layer(hidden_states, mask)
        for _ in range(self.final_norm_passes):
            hidden_states = self.final_norm(hidden_states)
        return hidden_states


class Decoder(nn.Module):
    """Causal layers over the encoder's output and a final LayerNorm."""

    def __init__(self, config: PlugConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            DecoderLayer(config, index) for index in range(config.num_decoder_layers)
        )
        self.final_norm = LayerNorm(config)

    def project_encoder(self, encoder_hidden_states: Tensor) -> list[KeyValue]:
        """Cross-attention keys and values of every layer; once per input, then kept."""
        attentions = [cast(DecoderLayer, layer).cross_attention for layer in self.layers]
        return [each.project_key_value(encoder_hidden_states) for each in attentions]

    def forward(
        self,
        embedded: Tensor,
        encoder_key_values: Sequence[KeyValue],
        encoder_attention_mask: Tensor | None,
        self_attention_mask: Tensor | None = None,
        past_key_values: KeyValueCache | None = None,
    ) -> Tensor:
        """(batch, tgt, hidden) to the same; arguments as in `DecoderLayer.forward`.

        Args:
            embedded: the new positions, after `Embeddings`.
            encoder_key_values: from `project_encoder`, one pair a layer.
            encoder_attention_mask: (batch, src), 1 on real tokens, or None.
            self_attention_mask: as in `DecoderLayer.forward`.
            past_key_values: as in `DecoderLayer.forward`.
        """
        mask = padding_mask(encoder_attention_mask)
        hidden_states = embedded
        for layer, key_value in zip(self.layers, encoder_key_values, strict=True):
            hidden_states = layer(
                hidden_states, key_value, mask, self_attention_mask, past_key_values
            )
        return self.final_norm(hidden_states)


class PlugParts(nn.Module):
    """The parts of a model by name, and what can be asked of them.

    `Plug` holds them; so do the classes of `plug.hf`, under the same parameter names.
    """

    embeddings: Embeddings
    encoder: Encoder
    decoder: Decoder | None
    mlm_head: MaskedLMHead
    sentence_head: SentenceHead

    def build_parts(self, config: PlugConfig) -> None:
        """Make every part; weights are still PyTorch's until `initialize_weights`."""
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config)
        self.decoder = Decoder(config) if config.num_decoder_layers else None
        self.mlm_head = MaskedLMHead(config)
        self.sentence_head = SentenceHead(config)

    def encode(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """(batch, src) ids, or (batch, src, hidden) words' embeddings, to the encoder's output.

        Without ``attention_mask`` every position is read, [PAD] too.
        """
        embedded = self.embeddings(input_ids, token_type_ids, inputs_embeds=inputs_embeds)
        return self.encoder(embedded, attention_mask)

    def decode(
        self,
        decoder_input_ids: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Teacher-forced pass without a cache: (batch, tgt) ids to (batch, tgt, hidden)."""
        assert self.decoder is not None, "an encoder alone cannot decode"
        encoder_key_values = self.decoder.project_encoder(encoder_hidden_states)
        return self.decoder(self.embeddings(decoder_input_ids), encoder_key_values, attention_mask)

    def word_table(self) -> Tensor:
        """The (vocab, hidden) matrix that both output layers share with both inputs."""
        return self.embeddings.word_embeddings.weight

    def lm_logits(self, decoder_hidden_states: Tensor) -> Tensor:
        """Decoder logits (…, vocab): the tied word table, no bias, no transform."""
        return F.linear(decoder_hidden_states, self.word_table())

    def mlm_logits(self, encoder_hidden_states: Tensor) -> Tensor:
        """Masked-LM logits (…, vocab) at any selection of encoder positions (…, hidden)."""
        return self.mlm_head(encoder_hidden_states, self.word_table())

    def sentence_logits(self, encoder_hidden_states: Tensor) -> Tensor:
        """(batch, src, hidden) to (batch, 3), read at the first position."""
        return self.sentence_head(encoder_hidden_states[:, 0])


class Plug(PlugParts):
    """The whole model. With `num_decoder_layers=0` it is an encoder alone (`decoder` is None)."""

    def __init__(self, config: PlugConfig) -> None:
        super().__init__()
        self.config = config
        self.build_parts(config)
        initialize_weights(self, config)


def initialize_weights(module: nn.Module, config: PlugConfig) -> None:
    """Normal weights of `initializer_range`, zero biases; the decoder's residual outputs smaller.

    Sets every parameter, so that it also serves weights that memory was just reserved for.

    Source: the reference's `scaled_init_method`: std / sqrt(2 * layers) on the decoder's
    output projections, here `out_proj` and `fc2`.
    """
    scale = (2 * max(config.num_decoder_layers, 1)) ** -0.5
    for name, part in module.named_modules():
        if isinstance(part, (nn.Linear, nn.Embedding)):
            residual = "decoder." in name and name.endswith(("out_proj", "fc2"))
            std = config.initializer_range * (scale if residual else 1.0)
            nn.init.normal_(part.weight, std=std)
        if isinstance(part, nn.LayerNorm):
            nn.init.ones_(part.weight)
        if isinstance(part, (nn.Linear, nn.LayerNorm, MaskedLMHead)):
            nn.init.zeros_(part.bias)

"""The whole of `Plug`: hidden states, pre-training, writing."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    DynamicCache,
    EncoderDecoderCache,
    GenerationMixin,
    LogitsProcessor,
    LogitsProcessorList,
)
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput, Seq2SeqModelOutput
from transformers.utils.generic import ModelOutput

from plug.errors import UsageError
from plug.hf.base import (
    IGNORE_INDEX,
    PlugPreTrainedModel,
    cross_entropy,
    returns_output,
)
from plug.hf.config import PlugTransformersConfig
from plug.model.attention import causal_mask, padding_mask
from plug.model.layers import KeyValue
from plug.model.plug import PlugParts

# Newer versions of transformers say `cache`, older ones `past_key_values`.
_CACHE_NAME = next(
    field.name
    for field in dataclasses.fields(Seq2SeqLMOutput)
    if field.name in ("cache", "past_key_values")
)


class _Seq2Seq(PlugPreTrainedModel):
    """The whole of `Plug`, and decoding from a cache of `transformers`."""

    def __init__(self, config: PlugTransformersConfig) -> None:
        super().__init__(config)
        self.build_parts(config.to_plug_config())
        self.post_init()

    def prepare_decoder_input_ids_from_labels(self, labels: Tensor) -> Tensor:
        """(batch, tgt) labels, shifted right from `decoder_start_token_id`; -100 becomes a pad."""
        shifted = labels.roll(1, dims=-1)
        shifted[..., 0] = self.config.decoder_start_token_id
        return shifted.masked_fill(shifted == IGNORE_INDEX, self.config.pad_token_id)

    def decode_from_cache(
        self,
        decoder_input_ids: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None,
        decoder_attention_mask: Tensor | None = None,
        cache: EncoderDecoderCache | None = None,
    ) -> Tensor:
        """`Plug.decode` of the positions after those in ``cache``, which takes the new ones in.

        Args:
            decoder_input_ids: (batch, tgt) new ids.
            encoder_hidden_states: (batch, src, hidden).
            attention_mask: (batch, src), 1 on real tokens, or None.
            decoder_attention_mask: (batch, past + tgt), 1 on real tokens, or None.
            cache: kept keys and values; those of the encoder's output are projected once.

        Returns:
            (batch, tgt, hidden).
        """
        if self.decoder is None:
            raise UsageError("这个模型只有编码器（num_decoder_layers=0），不能解码。")
        if cache is None and decoder_attention_mask is None:
            return self.decode(decoder_input_ids, encoder_hidden_states, attention_mask)
        new, device = decoder_input_ids.shape[1], decoder_input_ids.device
        past = 0 if cache is None else int(cache.get_seq_length())
        mask = causal_mask(new, past + new, device)
        if (padding := padding_mask(decoder_attention_mask)) is not None:
            mask = mask & padding
        if cache is not None:  # a static cache returns room that is not yet written
            room = int(cache.get_mask_sizes(new, 0)[0]) - past - new
            mask = F.pad(mask, (0, room))
        position_ids = torch.arange(past, past + new, device=device)
        return self.decoder(
            self.embeddings(decoder_input_ids, position_ids=position_ids),
            self._encoder_key_values(encoder_hidden_states, cache),
            attention_mask,
            mask,
            None if cache is None else cache.self_attention_cache,
        )

    def _encoder_key_values(
        self, encoder_hidden_states: Tensor, cache: EncoderDecoderCache | None
    ) -> list[KeyValue]:
        assert self.decoder is not None
        if cache is None:
            return self.decoder.project_encoder(encoder_hidden_states)
        kept = cache.cross_attention_cache
        if not cache.is_updated.get(0):
            projected = self.decoder.project_encoder(encoder_hidden_states)
            for index, (key, value) in enumerate(projected):
                kept.update(key, value, index)
                cache.is_updated[index] = True
        layers: list[Any] = kept.layers[: len(self.decoder.layers)]
        return [(layer.keys, layer.values) for layer in layers]

    @staticmethod
    def create_masks_for_generate(
        attention_mask: Tensor | None = None, **_others: Any
    ) -> Tensor | None:
        """`generate` hands on the padding mask as it is; `decode_from_cache` makes the rest."""
        return attention_mask


class PlugModel(_Seq2Seq):
    """Hidden states alone: the encoder's, and the decoder's when it is given ids."""

    @returns_output
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        encoder_outputs: tuple[Tensor, ...] | BaseModelOutput | None = None,
    ) -> Seq2SeqModelOutput:
        encoded = _encoded(self, input_ids, attention_mask, token_type_ids, encoder_outputs)
        hidden_states = None
        if decoder_input_ids is not None:
            hidden_states = self.decode_from_cache(decoder_input_ids, encoded, attention_mask)
        return Seq2SeqModelOutput(
            last_hidden_state=hidden_states, encoder_last_hidden_state=encoded
        )


@dataclass
class PlugForPreTrainingOutput(ModelOutput):
    """What pre-training looks at.

    Attributes:
        loss: the sum of ``losses``; None without labels.
        losses: by name, of "lm", "mlm", "word", "sentence" those whose labels were given.
        logits: the decoder's, (batch, tgt, vocab); None without decoder ids.
        mlm_logits: (batch, src, vocab).
        sentence_logits: (batch, 3).
        encoder_last_hidden_state: (batch, src, hidden).
    """

    loss: Tensor | None = None
    losses: dict[str, Tensor] | None = None
    logits: Tensor | None = None
    mlm_logits: Tensor | None = None
    sentence_logits: Tensor | None = None
    encoder_last_hidden_state: Tensor | None = None


class PlugForPreTraining(_Seq2Seq):
    """All heads at once, with the losses of both pre-training stages by name."""

    @returns_output
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        labels: Tensor | None = None,
        mlm_labels: Tensor | None = None,
        word_labels: Tensor | None = None,
        sentence_labels: Tensor | None = None,
    ) -> PlugForPreTrainingOutput:
        """Logits of every head, and the losses whose labels are given; -100 is ignored.

        Args:
            input_ids: (batch, src).
            attention_mask: (batch, src), 1 on real tokens; None is all.
            token_type_ids: (batch, src); None is type 0.
            decoder_input_ids: (batch, tgt); None is ``labels`` shifted right.
            labels: (batch, tgt), what the decoder is to write.
            mlm_labels: (batch, src), the original tokens under the masks.
            word_labels: (batch, src), the original tokens at shuffled positions; the same head.
            sentence_labels: (batch,), 0 another document, 1 the next segment, 2 the previous one.
        """
        encoded = self.encode(input_ids, attention_mask, token_type_ids)
        mlm_logits = self.mlm_logits(encoded)
        sentence_logits = self.sentence_logits(encoded)
        logits = None
        if decoder_input_ids is None and labels is not None:
            decoder_input_ids = self.prepare_decoder_input_ids_from_labels(labels)
        if decoder_input_ids is not None:
            decoded = self.decode_from_cache(decoder_input_ids, encoded, attention_mask)
            logits = self.lm_logits(decoded)
        losses = {
            name: cross_entropy(some_logits, some_labels)
            for name, some_logits, some_labels in (
                ("lm", logits, labels),
                ("mlm", mlm_logits, mlm_labels),
                ("word", mlm_logits, word_labels),
                ("sentence", sentence_logits, sentence_labels),
            )
            if some_logits is not None and some_labels is not None
        }
        return PlugForPreTrainingOutput(
            loss=torch.stack(list(losses.values())).sum() if losses else None,
            losses=losses or None,
            logits=logits,
            mlm_logits=mlm_logits,
            sentence_logits=sentence_logits,
            encoder_last_hidden_state=encoded,
        )


class EmittedTokensOnly(LogitsProcessor):
    """Never choose an id from ``num_emitted_tokens`` on: those rows only pad the word table."""

    def __init__(self, num_emitted_tokens: int) -> None:
        self.num_emitted_tokens = num_emitted_tokens

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # noqa: ARG002
        ids = torch.arange(scores.shape[-1], device=scores.device)
        return scores.masked_fill(ids >= self.num_emitted_tokens, -torch.inf)


class PlugForConditionalGeneration(_Seq2Seq, GenerationMixin):
    """Reads with the encoder, writes with the decoder.

    The other heads are kept, frozen, so that a directory saved after fine-tuning is whole and
    `plug generate` reads it.
    """

    accepts_loss_kwargs = True

    def __init__(self, config: PlugTransformersConfig) -> None:
        if not config.num_decoder_layers:
            raise UsageError(
                "num_decoder_layers=0：这个模型只有编码器，不能生成。请用第二阶段预训练后的模型。"
            )
        super().__init__(config)
        self._freeze_other_heads()

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As `PreTrainedModel.from_pretrained`, which makes every loaded weight trainable."""
        loaded = super().from_pretrained(*args, **kwargs)
        (loaded[0] if isinstance(loaded, tuple) else loaded)._freeze_other_heads()
        return loaded

    def _freeze_other_heads(self) -> None:
        self.mlm_head.requires_grad_(False)
        self.sentence_head.requires_grad_(False)

    @returns_output
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        encoder_outputs: tuple[Tensor, ...] | BaseModelOutput | None = None,
        past_key_values: EncoderDecoderCache | None = None,
        cache: EncoderDecoderCache | None = None,
        use_cache: bool | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Seq2SeqLMOutput:
        """Decoder logits, and the loss when ``labels`` are given.

        Args:
            input_ids: (batch, src); not needed with ``encoder_outputs``.
            attention_mask: (batch, src), 1 on real tokens; None is all.
            token_type_ids: (batch, src); None is type 0.
            decoder_input_ids: (batch, tgt); None is ``labels`` shifted right.
            decoder_attention_mask: (batch, past + tgt), 1 on real tokens; None is all.
            encoder_outputs: the encoder's output, (batch, src, hidden) first.
            past_key_values: keys and values of earlier positions.
            cache: what newer versions of transformers call ``past_key_values``.
            use_cache: make a cache when none is given.
            labels: (batch, tgt), -100 ignored.
            num_items_in_batch: what the loss is divided by, when not the labels of this batch.
        """
        if decoder_input_ids is None:
            if labels is None:
                raise UsageError("需要 decoder_input_ids 或 labels；要续写文本请用 generate()。")
            decoder_input_ids = self.prepare_decoder_input_ids_from_labels(labels)
        cache = cache if cache is not None else past_key_values
        if cache is None and use_cache:
            cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        encoded = _encoded(self, input_ids, attention_mask, token_type_ids, encoder_outputs)
        logits = self.lm_logits(
            self.decode_from_cache(
                decoder_input_ids, encoded, attention_mask, decoder_attention_mask, cache
            )
        )
        kept: dict[str, Any] = {_CACHE_NAME: cache}
        return Seq2SeqLMOutput(
            loss=None if labels is None else cross_entropy(logits, labels, num_items_in_batch),
            logits=logits,
            encoder_last_hidden_state=encoded,
            **kept,
        )

    def generate(
        self,
        inputs: Tensor | None = None,
        generation_config: Any = None,
        logits_processor: LogitsProcessorList | None = None,
        **kwargs: Any,
    ) -> Any:
        """`GenerationMixin.generate`, which never writes ids from `num_emitted_tokens` on."""
        processors = LogitsProcessorList(logits_processor or [])
        if self.config.num_emitted_tokens < self.config.vocab_size:
            processors.append(EmittedTokensOnly(self.config.num_emitted_tokens))
        return super().generate(inputs, generation_config, processors, **kwargs)


def _encoded(
    model: PlugParts,
    input_ids: Tensor | None,
    attention_mask: Tensor | None,
    token_type_ids: Tensor | None,
    encoder_outputs: tuple[Tensor, ...] | BaseModelOutput | None,
) -> Tensor:
    """(batch, src, hidden): what the encoder gave already, or gives now."""
    if encoder_outputs is not None:
        return cast(Tensor, encoder_outputs[0])
    if input_ids is None:
        raise UsageError("需要 input_ids 或 encoder_outputs。")
    return model.encode(input_ids, attention_mask, token_type_ids)

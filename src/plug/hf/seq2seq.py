"""The whole of `Plug`: hidden states, pre-training, writing."""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    DynamicCache,
    EncoderDecoderCache,
    GenerationMixin,
    LogitsProcessor,
    LogitsProcessorList,
)
from transformers.modeling_outputs import (
    BaseModelOutput,
    BaseModelOutputWithPastAndCrossAttentions,
    Seq2SeqLMOutput,
    Seq2SeqModelOutput,
)
from transformers.utils.generic import ModelOutput

from plug.errors import UsageError
from plug.hf.base import (
    PlugPreTrainedModel,
    cross_entropy,
    returns_output,
    with_last,
)
from plug.hf.config import PlugTransformersConfig
from plug.hf.recording import Wanted, recording
from plug.model.attention import causal_mask, padding_mask
from plug.model.heads import IGNORE_INDEX
from plug.model.layers import KeyValue

logger = logging.getLogger(__name__)

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

    def get_output_embeddings(self) -> nn.Module:
        """The word table, which is the output layer too (peft asks for it)."""
        return self.embeddings.word_embeddings

    def encoder_outputs(
        self,
        given: tuple[Any, ...] | BaseModelOutput | None,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        token_type_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        wanted: Wanted,
    ) -> BaseModelOutput:
        """What the encoder gave already, else what it gives now."""
        if given is None:
            return self.run_encoder(
                input_ids, attention_mask, token_type_ids, inputs_embeds, wanted
            )
        if isinstance(given, BaseModelOutput):
            return given
        return BaseModelOutput(*given[:3])

    def chosen_cache(
        self,
        cache: EncoderDecoderCache | None,
        past_key_values: EncoderDecoderCache | None,
        use_cache: bool | None,
    ) -> EncoderDecoderCache | None:
        """The one that is given, under either name; else a new one, if one is wanted.

        peft hands a tuned prefix over as ``past_key_values`` at each step, beside the ``cache`` of
        `generate`; it counts as long as that one is empty.
        As with BART, one is wanted unless ``use_cache`` or the config says no; but not in training.
        """
        given = cache
        if cache is None or (past_key_values is not None and not cache.get_seq_length()):
            given = past_key_values
        if given is not None:
            return given
        if use_cache is None:
            use_cache = not self.training and getattr(self.config, "use_cache", True)
        return EncoderDecoderCache(DynamicCache(), DynamicCache()) if use_cache else None

    def run_decoder(
        self,
        decoder_input_ids: Tensor | None,
        encoded: Tensor,
        attention_mask: Tensor | None,
        wanted: Wanted,
        decoder_attention_mask: Tensor | None = None,
        cache: EncoderDecoderCache | None = None,
        decoder_inputs_embeds: Tensor | None = None,
    ) -> BaseModelOutputWithPastAndCrossAttentions:
        """`Plug.decode` of the positions after those in ``cache``, which takes the new ones in.

        Args:
            decoder_input_ids: (batch, tgt) new ids; or ``decoder_inputs_embeds``, not both.
            encoded: (batch, src, hidden), the encoder's output.
            attention_mask: (batch, src), 1 on real tokens, or None.
            wanted: of the layers.
            decoder_attention_mask: (batch, past + tgt), 1 on real tokens, or None.
            cache: kept keys and values; those of the encoder's output are projected once.
            decoder_inputs_embeds: (batch, tgt, hidden), in place of the words' embeddings.

        Raises:
            UsageError: a wrong shape, too many positions, (on a CPU) an unknown id, or no decoder.
        """
        if self.decoder is None:
            raise UsageError("这个模型只有编码器（num_decoder_layers=0），不能解码。")
        if (decoder_input_ids is None) == (decoder_inputs_embeds is None):
            raise UsageError(
                "decoder_input_ids 和 decoder_inputs_embeds 要给其中一个，且只给一个。"
            )
        past = 0 if cache is None else int(cache.get_seq_length())
        self.check_inputs(
            "decoder_input_ids",
            decoder_input_ids,
            decoder_inputs_embeds,
            decoder_attention_mask,
            past,
        )
        if attention_mask is not None and attention_mask.shape != encoded.shape[:2]:
            raise UsageError(
                f"attention_mask 的形状是 {tuple(attention_mask.shape)}，"
                f"应与编码器的输出一致：{tuple(encoded.shape[:2])}。"
            )
        new = cast(
            Tensor, decoder_input_ids if decoder_inputs_embeds is None else decoder_inputs_embeds
        ).shape[1]
        # A static cache has room that is not yet written.
        room = 0 if cache is None else int(cache.get_mask_sizes(new, 0)[0]) - past - new
        mask = None
        if past or room or decoder_attention_mask is not None:
            mask = causal_mask(new, past + new, encoded.device)
            if (padding := padding_mask(decoder_attention_mask)) is not None:
                mask = mask & padding
            mask = F.pad(mask, (0, room))
        with recording(self.decoder, wanted) as recorded:
            decoded = self.decoder(
                self.embeddings(
                    decoder_input_ids,
                    position_ids=torch.arange(past, past + new, device=encoded.device),
                    inputs_embeds=decoder_inputs_embeds,
                ),
                self._encoder_key_values(encoded, cache),
                attention_mask,
                mask,
                None if cache is None else cache.self_attention_cache,
            )
        return BaseModelOutputWithPastAndCrossAttentions(
            last_hidden_state=decoded,
            hidden_states=with_last(recorded.hidden_states, decoded, wanted),
            attentions=tuple(recorded.attentions) if wanted.attentions else None,
            cross_attentions=tuple(recorded.cross_attentions) if wanted.attentions else None,
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
        """`generate` hands on the padding mask as it is; `run_decoder` makes the rest."""
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
        encoder_outputs: tuple[Any, ...] | BaseModelOutput | None = None,
        decoder_attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        decoder_inputs_embeds: Tensor | None = None,
        past_key_values: EncoderDecoderCache | None = None,
        cache: EncoderDecoderCache | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
    ) -> Seq2SeqModelOutput:
        """Hidden states of the encoder, and of the decoder where it is given ids.

        Arguments as in `PlugForConditionalGeneration.forward`.
        """
        wanted = self.wanted(output_hidden_states, output_attentions)
        attention_mask = self.known_mask(input_ids, attention_mask)
        encoder = self.encoder_outputs(
            encoder_outputs, input_ids, attention_mask, token_type_ids, inputs_embeds, wanted
        )
        decoder = BaseModelOutputWithPastAndCrossAttentions()
        if decoder_input_ids is not None or decoder_inputs_embeds is not None:
            cache = self.chosen_cache(cache, past_key_values, use_cache)
            decoder = self.run_decoder(
                decoder_input_ids,
                encoder[0],
                attention_mask,
                wanted,
                decoder_attention_mask,
                cache,
                decoder_inputs_embeds,
            )
        return Seq2SeqModelOutput(
            last_hidden_state=decoder.last_hidden_state, **_inside(encoder, decoder, cache)
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
        decoder_hidden_states, decoder_attentions, cross_attentions, encoder_hidden_states,
        encoder_attentions: as in `Seq2SeqLMOutput`, where asked for.
    """

    loss: Tensor | None = None
    losses: dict[str, Tensor] | None = None
    logits: Tensor | None = None
    mlm_logits: Tensor | None = None
    sentence_logits: Tensor | None = None
    decoder_hidden_states: tuple[Tensor, ...] | None = None
    decoder_attentions: tuple[Tensor, ...] | None = None
    cross_attentions: tuple[Tensor, ...] | None = None
    encoder_last_hidden_state: Tensor | None = None
    encoder_hidden_states: tuple[Tensor, ...] | None = None
    encoder_attentions: tuple[Tensor, ...] | None = None


class PlugForPreTraining(_Seq2Seq):
    """All heads at once, with the losses of both pre-training stages by name."""

    @returns_output
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        labels: Tensor | None = None,
        mlm_labels: Tensor | None = None,
        word_labels: Tensor | None = None,
        sentence_labels: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
    ) -> PlugForPreTrainingOutput:
        """Logits of every head, and the losses whose labels are given; -100 is ignored.

        Args:
            input_ids: (batch, src); or ``inputs_embeds``.
            attention_mask: (batch, src), 1 on real tokens; None is all but [PAD].
            token_type_ids: (batch, src); None is type 0.
            decoder_input_ids: (batch, tgt); None is ``labels`` shifted right.
            labels: (batch, tgt), what the decoder is to write.
            mlm_labels: (batch, src), the original tokens under the masks.
            word_labels: (batch, src), the original tokens at shuffled positions; the same head.
            sentence_labels: (batch,), 0 another document, 1 the next segment, 2 the previous one.
            inputs_embeds: (batch, src, hidden), in place of the words' embeddings.
            decoder_attention_mask: (batch, tgt), 1 on real tokens; None is all.
            output_attentions: return the attention probabilities of every layer.
            output_hidden_states: return the input of every layer and the last output.
        """
        wanted = self.wanted(output_hidden_states, output_attentions)
        attention_mask = self.known_mask(input_ids, attention_mask)
        encoder = self.run_encoder(input_ids, attention_mask, token_type_ids, inputs_embeds, wanted)
        mlm_logits = self.mlm_logits(encoder[0])
        sentence_logits = self.sentence_logits(encoder[0])
        logits = None
        decoder = BaseModelOutputWithPastAndCrossAttentions()
        if decoder_input_ids is None and labels is not None:
            decoder_input_ids = self.prepare_decoder_input_ids_from_labels(labels)
        if decoder_input_ids is not None:
            decoder = self.run_decoder(
                decoder_input_ids, encoder[0], attention_mask, wanted, decoder_attention_mask
            )
            logits = self.lm_logits(decoder[0])
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
            **_inside(encoder, decoder),
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
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As `PreTrainedModel.from_pretrained`, which makes every loaded weight trainable."""
        loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model._freeze_other_heads()
        model._leave_old_sampling()
        return loaded

    def _freeze_other_heads(self) -> None:
        self.mlm_head.requires_grad_(False)
        self.sentence_head.requires_grad_(False)

    def _leave_old_sampling(self) -> None:
        """Drop the sampling that `generation_config.json` of our older directories has.

        Its ``max_new_tokens`` wins over the ``max_length`` that `Seq2SeqTrainer` hands on, so that
        ``predict_with_generate`` scored 256 drawn tokens whatever was asked for.
        """
        config = self.generation_config
        if all(getattr(config, name) == value for name, value in _OLD_SAMPLING.items()):
            for name in _OLD_SAMPLING:
                setattr(config, name, None)
            logger.warning(
                "%s 的 generation_config.json 是旧版写的（抽样，256 个词元），已不采用："
                "generate() 现在与 BART 一样默认取最可能的词元。要抽样请写 do_sample=True。",
                self.config.name_or_path or "模型",
            )

    @returns_output
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        encoder_outputs: tuple[Any, ...] | BaseModelOutput | None = None,
        past_key_values: EncoderDecoderCache | None = None,
        cache: EncoderDecoderCache | None = None,
        use_cache: bool | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        inputs_embeds: Tensor | None = None,
        decoder_inputs_embeds: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
    ) -> Seq2SeqLMOutput:
        """Decoder logits, and the loss when ``labels`` are given.

        Args:
            input_ids: (batch, src); not needed with ``inputs_embeds`` or ``encoder_outputs``.
            attention_mask: (batch, src), 1 on real tokens; None is all but [PAD].
            token_type_ids: (batch, src); None is type 0.
            decoder_input_ids: (batch, tgt); None is ``labels`` shifted right.
            decoder_attention_mask: (batch, past + tgt), 1 on real tokens; None is all.
            encoder_outputs: the encoder's output, (batch, src, hidden) first.
            past_key_values: keys and values of earlier positions.
            cache: what newer versions of transformers call ``past_key_values``.
            use_cache: make a cache where none is given; None: not in training or with ``labels``.
            labels: (batch, tgt), -100 ignored.
            num_items_in_batch: what the loss is divided by, when not the labels of this batch.
            inputs_embeds: (batch, src, hidden), in place of the words' embeddings.
            decoder_inputs_embeds: (batch, tgt, hidden), likewise.
            output_attentions: return the attention probabilities of every layer.
            output_hidden_states: return the input of every layer and the last output.
        """
        if decoder_input_ids is None and decoder_inputs_embeds is None:
            if labels is None:
                raise UsageError(
                    "需要 decoder_input_ids 或 labels；要续写文本请用 generate()。"
                    "用 Trainer 的 label_smoothing_factor 时，"
                    "请用 DataCollatorForSeq2Seq(tokenizer, model)。"
                )
            decoder_input_ids = self.prepare_decoder_input_ids_from_labels(labels)
        wanted = self.wanted(output_hidden_states, output_attentions)
        cache = self.chosen_cache(
            cache, past_key_values, False if labels is not None else use_cache
        )
        attention_mask = self.known_mask(input_ids, attention_mask)
        encoder = self.encoder_outputs(
            encoder_outputs, input_ids, attention_mask, token_type_ids, inputs_embeds, wanted
        )
        decoder = self.run_decoder(
            decoder_input_ids,
            encoder[0],
            attention_mask,
            wanted,
            decoder_attention_mask,
            cache,
            decoder_inputs_embeds,
        )
        logits = self.lm_logits(decoder[0])
        return Seq2SeqLMOutput(
            loss=None if labels is None else cross_entropy(logits, labels, num_items_in_batch),
            logits=logits,
            **_inside(encoder, decoder, cache),
        )

    def generate(
        self,
        inputs: Tensor | None = None,
        generation_config: Any = None,
        logits_processor: LogitsProcessorList | None = None,
        **kwargs: Any,
    ) -> Any:
        """`GenerationMixin.generate`, with two things certain.

        Ids from `num_emitted_tokens` on are never written, and [PAD] is not read where there is no
        ``attention_mask``.
        """
        processors = LogitsProcessorList(logits_processor or [])
        if self.config.num_emitted_tokens < self.config.vocab_size:
            processors.append(EmittedTokensOnly(self.config.num_emitted_tokens))
        ids = kwargs.get("input_ids") if inputs is None else inputs
        if kwargs.get("attention_mask") is None and ids is not None and ids.dim() == 2:
            kwargs["attention_mask"] = self.known_mask(ids, None)
        return super().generate(inputs, generation_config, processors, **kwargs)

    def prepare_inputs_for_generation(self, input_ids: Tensor, **kwargs: Any) -> dict[str, Any]:
        """Return what a step gives `forward`.

        The tokenizers that ``stop_strings`` and assisted generation need are left out: the mixin
        hands them on, and counts on a `forward` that swallows what it does not know.
        """
        for name in ("tokenizer", "assistant_tokenizer"):
            kwargs.pop(name, None)
        return super().prepare_inputs_for_generation(input_ids, **kwargs)


# What `generation_config.json` said besides ids before 2026-12.
_OLD_SAMPLING = {
    "do_sample": True,
    "temperature": 0.9,
    "top_k": 20,
    "repetition_penalty": 1.1,
    "max_new_tokens": 256,
}


def _inside(
    encoder: BaseModelOutput,
    decoder: BaseModelOutputWithPastAndCrossAttentions,
    cache: EncoderDecoderCache | None = None,
) -> dict[str, Any]:
    """What the outputs of all classes say of both halves."""
    return {
        **({_CACHE_NAME: cache} if cache is not None else {}),
        "decoder_hidden_states": decoder.hidden_states,
        "decoder_attentions": decoder.attentions,
        "cross_attentions": decoder.cross_attentions,
        "encoder_last_hidden_state": encoder.last_hidden_state,
        "encoder_hidden_states": encoder.hidden_states,
        "encoder_attentions": encoder.attentions,
    }

"""The classes that users of `transformers` expect, over the modules of `plug.model`.

They hold the same modules as `plug.Plug` under the same parameter names and own no mathematics:
`PlugParts` has that. A directory saved by either face loads in the other. Importing this module
registers the Auto classes; the names can also be imported from `plug`.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plug.errors import PlugError, UsageError
from plug.model.attention import causal_mask, padding_mask
from plug.model.configuration import PlugConfig
from plug.model.heads import MaskedLMHead
from plug.model.layers import DecoderLayer, Embeddings, EncoderLayer, KeyValue
from plug.model.plug import Encoder, PlugParts, initialize_weights

try:
    from transformers import (
        AutoConfig,
        AutoModel,
        AutoModelForMaskedLM,
        AutoModelForPreTraining,
        AutoModelForQuestionAnswering,
        AutoModelForSeq2SeqLM,
        AutoModelForSequenceClassification,
        AutoModelForTokenClassification,
        AutoTokenizer,
        DynamicCache,
        EncoderDecoderCache,
        GenerationMixin,
        LogitsProcessor,
        LogitsProcessorList,
        PreTrainedConfig,
        PreTrainedModel,
        PreTrainedTokenizerFast,
    )
    from transformers.initialization import guard_torch_init_functions
    from transformers.modeling_layers import GradientCheckpointingLayer
    from transformers.modeling_outputs import (
        BaseModelOutput,
        MaskedLMOutput,
        QuestionAnsweringModelOutput,
        Seq2SeqLMOutput,
        Seq2SeqModelOutput,
        SequenceClassifierOutput,
        TokenClassifierOutput,
    )
    from transformers.utils.generic import ModelOutput, can_return_tuple
except ModuleNotFoundError as error:
    if error.name != "transformers":
        raise
    raise PlugError(
        '这个类要用 transformers，但它没有安装。请运行：pip install "plug-zh[train]"'
    ) from None

IGNORE_INDEX = -100
# Newer versions of transformers say `cache`, older ones `past_key_values`.
_CACHE_NAME = next(
    field.name
    for field in dataclasses.fields(Seq2SeqLMOutput)
    if field.name in ("cache", "past_key_values")
)
# Arguments of `PreTrainedConfig` that are neither our keys nor written into a plain config.json.
_CONFIG_ARGUMENTS = frozenset(
    ["attn_implementation", "experts_implementation", "name_or_path", "quantization_config"]
)
_Forward = TypeVar("_Forward", bound=Callable[..., Any])


def _returns_output(forward: _Forward) -> _Forward:
    """`can_return_tuple` (honours ``return_dict``), with the type of what it wraps."""
    return cast(_Forward, can_return_tuple(forward))


class PlugTransformersConfig(PreTrainedConfig):
    """`PlugConfig` as `transformers` wants it: the same keys, checked by the same code.

    Raises:
        UsageError: an unknown key, or a value that makes no sense.
    """

    model_type = "plug"
    keys_to_ignore_at_inference = ("past_key_values", "cache", "losses")
    is_encoder_decoder: bool = True
    tie_word_embeddings: bool = True

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...  # the fields of `PlugConfig`

    def __post_init__(self, **kwargs: Any) -> None:
        checked = {
            key: value
            for key, value in kwargs.items()
            if key not in _CONFIG_ARGUMENTS and not key.startswith("_")
        }
        if "quantization" in kwargs:
            raise UsageError(
                "这个模型目录是量化过的，transformers 的类读不了它。"
                "请用 plug.load 或 plug generate，或用未量化的模型。"
            )
        super().__post_init__(**kwargs | PlugConfig.from_dict(checked).to_dict())

    def to_plug_config(self) -> PlugConfig:
        """The shape alone; attributes changed since construction are checked here."""
        return PlugConfig(
            **{field.name: getattr(self, field.name) for field in dataclasses.fields(PlugConfig)}
        )

    def get_text_config(
        self, decoder: bool | None = None, encoder: bool | None = None
    ) -> PreTrainedConfig:
        """This config; for the decoder alone, with its number of layers (it sizes the caches)."""
        if not decoder or encoder:
            return self
        config = copy.copy(self)
        config.num_hidden_layers = self.num_decoder_layers
        return config


class PlugEncoderLayer(GradientCheckpointingLayer, EncoderLayer):
    """`EncoderLayer`, recomputed in the backward pass when `transformers` asks for it."""


class PlugDecoderLayer(GradientCheckpointingLayer, DecoderLayer):
    """`DecoderLayer`, recomputed in the backward pass when `transformers` asks for it."""


class EncoderOfIds(nn.Module):
    """What `generate` calls as the encoder: ids in, `BaseModelOutput` out."""

    main_input_name = "input_ids"

    def __init__(self, model: PlugPreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        **_flags: Any,  # `return_dict` and the `output_…` that `generate` always adds
    ) -> BaseModelOutput:
        return BaseModelOutput(
            last_hidden_state=self.model.encode(input_ids, attention_mask, token_type_ids)
        )


class PlugPreTrainedModel(PreTrainedModel, PlugParts):
    """What all classes share: the config, initialisation, recomputation, the encoder by ids."""

    config_class = PlugTransformersConfig
    config: PlugTransformersConfig
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _input_embed_layer = "word_embeddings"
    _no_split_modules = ["PlugEncoderLayer", "PlugDecoderLayer"]  # noqa: RUF012
    accepts_loss_kwargs = False  # the Trainer divides by gradient accumulation steps itself

    def build_encoder(self, config: PlugConfig) -> None:
        """The parts of an understanding model alone."""
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config)

    def post_init(self) -> None:
        self.encoder.main_input_name = "input_ids"  # type: ignore[assignment]
        for module in self.modules():
            if type(module) is EncoderLayer:
                module.__class__ = PlugEncoderLayer
            elif type(module) is DecoderLayer:
                module.__class__ = PlugDecoderLayer
        super().post_init()

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """Set what was not loaded, as `Plug` does; loaded tensors carry a mark and are left."""
        with guard_torch_init_functions():
            initialize_weights(self, self.config.to_plug_config())

    def resize_token_embeddings(self, *_args: Any, **_kwargs: Any) -> nn.Embedding:
        raise UsageError(
            f"PLUG 的词表大小（{self.config.vocab_size}）不能改变：masked-LM 头和"
            " num_emitted_tokens 都依赖它。请改用自己训练的词表：plug pretrain vocab"
        )

    def get_encoder(self, modality: str | None = None) -> nn.Module:  # noqa: ARG002
        return EncoderOfIds(self)


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

    @_returns_output
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

    @_returns_output
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
            name: _cross_entropy(some_logits, some_labels)
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

    @_returns_output
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
            loss=None if labels is None else _cross_entropy(logits, labels, num_items_in_batch),
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


class PlugForMaskedLM(PlugPreTrainedModel):
    """The encoder and its masked-LM head."""

    _keys_to_ignore_on_load_unexpected = [r"^decoder\.", r"^sentence_head\."]  # noqa: RUF012
    accepts_loss_kwargs = True

    def __init__(self, config: PlugTransformersConfig) -> None:
        super().__init__(config)
        plug_config = config.to_plug_config()
        self.build_encoder(plug_config)
        self.mlm_head = MaskedLMHead(plug_config)
        self.post_init()

    @_returns_output
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> MaskedLMOutput:
        """Logits (batch, src, vocab); ``labels`` (batch, src), -100 ignored."""
        logits = self.mlm_logits(self.encode(input_ids, attention_mask, token_type_ids))
        loss = None if labels is None else _cross_entropy(logits, labels, num_items_in_batch)
        return MaskedLMOutput(loss=loss, logits=logits)


class _Classifier(PlugPreTrainedModel):
    """The encoder, dropout and a linear layer of `config.num_labels` rows."""

    _keys_to_ignore_on_load_unexpected = [  # noqa: RUF012
        r"^decoder\.",
        r"^mlm_head\.",
        r"^sentence_head\.",
    ]

    def __init__(self, config: PlugTransformersConfig) -> None:
        super().__init__(config)
        self.build_encoder(config.to_plug_config())
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels or 2)
        self.post_init()


class PlugForSequenceClassification(_Classifier):
    """One label a text, read at the encoder's first position as the sentence head does."""

    @_returns_output
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> SequenceClassifierOutput:
        """Logits (batch, num_labels); ``labels`` (batch,) as `config.problem_type` wants them."""
        encoded = self.encode(input_ids, attention_mask, token_type_ids)
        logits = self.classifier(self.dropout(encoded[:, 0]))
        loss = None
        if labels is not None:
            loss = self.loss_function(
                labels=labels, pooled_logits=logits.float(), config=self.config
            )
        return SequenceClassifierOutput(loss=loss, logits=logits)


class PlugForTokenClassification(_Classifier):
    """One label a token."""

    accepts_loss_kwargs = True

    @_returns_output
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> TokenClassifierOutput:
        """Logits (batch, src, num_labels); ``labels`` (batch, src), -100 ignored."""
        encoded = self.encode(input_ids, attention_mask, token_type_ids)
        logits = self.classifier(self.dropout(encoded))
        loss = None if labels is None else _cross_entropy(logits, labels, num_items_in_batch)
        return TokenClassifierOutput(loss=loss, logits=logits)


class PlugForQuestionAnswering(_Classifier):
    """Extractive reading: where an answer begins and ends, two logits a token."""

    def __init__(self, config: PlugTransformersConfig) -> None:
        config.num_labels = 2
        super().__init__(config)

    @_returns_output
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
    ) -> QuestionAnsweringModelOutput:
        """Logits (batch, src) of both ends, padding at -inf; positions (batch,), end inclusive."""
        encoded = self.encode(input_ids, attention_mask, token_type_ids)
        logits = self.classifier(self.dropout(encoded)).float()
        if attention_mask is not None:
            logits = logits.masked_fill(attention_mask[..., None] == 0, -torch.inf)
        start_logits, end_logits = logits.unbind(-1)
        loss = None
        if start_positions is not None and end_positions is not None:
            ends = ((start_logits, start_positions), (end_logits, end_positions))
            loss = torch.stack([F.cross_entropy(*each) for each in ends]).mean()
        return QuestionAnsweringModelOutput(
            loss=loss, start_logits=start_logits, end_logits=end_logits
        )


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


def _cross_entropy(
    logits: Tensor, labels: Tensor, num_items_in_batch: Tensor | int | None = None
) -> Tensor:
    """In fp32: the sum over labels that are not -100, by their number (no labels give 0).

    The Trainer passes ``num_items_in_batch``, the number over all micro-batches of a step.
    """
    items = num_items_in_batch
    if items is None:
        items = (labels != IGNORE_INDEX).sum().clamp(min=1)
    flat = logits.float().flatten(0, -2), labels.flatten()
    return F.cross_entropy(*flat, ignore_index=IGNORE_INDEX, reduction="sum") / items


AutoConfig.register("plug", PlugTransformersConfig, exist_ok=True)
AutoTokenizer.register(
    PlugTransformersConfig, fast_tokenizer_class=PreTrainedTokenizerFast, exist_ok=True
)
for _auto, _model in (
    (AutoModel, PlugModel),
    (AutoModelForPreTraining, PlugForPreTraining),
    (AutoModelForSeq2SeqLM, PlugForConditionalGeneration),
    (AutoModelForMaskedLM, PlugForMaskedLM),
    (AutoModelForSequenceClassification, PlugForSequenceClassification),
    (AutoModelForTokenClassification, PlugForTokenClassification),
    (AutoModelForQuestionAnswering, PlugForQuestionAnswering),
):
    _auto.register(PlugTransformersConfig, _model, exist_ok=True)

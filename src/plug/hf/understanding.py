"""The encoder under a head: the masked-LM head, and three that fine-tuning makes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import (
    MaskedLMOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)

from plug.checkpoints.directory import CONFIG_FILE
from plug.errors import UsageError
from plug.hf.base import PlugPreTrainedModel, cross_entropy, returns_output
from plug.hf.config import PlugTransformersConfig, local_path
from plug.model.configuration import read_config_file
from plug.model.heads import IGNORE_INDEX, MaskedLMHead


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

    def get_output_embeddings(self) -> nn.Module:
        """The word table, which is the output layer too (peft asks for it)."""
        return self.embeddings.word_embeddings

    @returns_output
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        inputs_embeds: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
    ) -> MaskedLMOutput:
        """Logits (batch, src, vocab); ``labels`` (batch, src), -100 ignored."""
        wanted = self.wanted(output_hidden_states, output_attentions)
        encoder = self.run_encoder(input_ids, attention_mask, token_type_ids, inputs_embeds, wanted)
        logits = self.mlm_logits(encoder[0])
        loss = None if labels is None else cross_entropy(logits, labels, num_items_in_batch)
        return MaskedLMOutput(
            loss=loss,
            logits=logits,
            hidden_states=encoder.hidden_states,
            attentions=encoder.attentions,
        )


class _Classifier(PlugPreTrainedModel):
    """The encoder, dropout and a linear layer of `config.num_labels` rows."""

    _keys_to_ignore_on_load_unexpected = [  # noqa: RUF012
        r"^decoder\.",
        r"^mlm_head\.",
        r"^sentence_head\.",
    ]

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As `PreTrainedModel.from_pretrained`.

        Raises:
            UsageError: the directory holds another of these classes; its head has the same name,
                and would be taken for one that it is not.
        """
        path = Path(local_path(pretrained_model_name_or_path))
        if (path / CONFIG_FILE).is_file():
            saved = read_config_file(path / CONFIG_FILE).get("architectures") or []
            others = {each.__name__ for each in _Classifier.__subclasses__()} - {cls.__name__}
            if found := sorted(others.intersection(saved)):
                raise UsageError(
                    f"{path} 是 {found[0]}，它的输出层不是 {cls.__name__} 的。"
                    f"请用 {found[0]}.from_pretrained，或从预训练的模型开始。"
                )
        return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

    def __init__(self, config: PlugTransformersConfig) -> None:
        super().__init__(config)
        self.build_encoder(config.to_plug_config())
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels or 2)
        self.post_init()


class PlugForSequenceClassification(_Classifier):
    """One label a text, read at the encoder's first position as the sentence head does."""

    @returns_output
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
    ) -> SequenceClassifierOutput:
        """Logits (batch, num_labels); ``labels`` (batch,) as `config.problem_type` wants them."""
        wanted = self.wanted(output_hidden_states, output_attentions)
        encoder = self.run_encoder(input_ids, attention_mask, token_type_ids, inputs_embeds, wanted)
        logits = self.classifier(self.dropout(encoder[0][:, 0]))
        loss = None
        if labels is not None:
            loss = self.loss_function(
                labels=labels, pooled_logits=logits.float(), config=self.config
            )
        return SequenceClassifierOutput(
            loss=loss,
            logits=logits,
            hidden_states=encoder.hidden_states,
            attentions=encoder.attentions,
        )


class PlugForTokenClassification(_Classifier):
    """One label a token."""

    accepts_loss_kwargs = True

    @returns_output
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        inputs_embeds: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
    ) -> TokenClassifierOutput:
        """Logits (batch, src, num_labels); ``labels`` (batch, src), -100 ignored."""
        wanted = self.wanted(output_hidden_states, output_attentions)
        encoder = self.run_encoder(input_ids, attention_mask, token_type_ids, inputs_embeds, wanted)
        logits = self.classifier(self.dropout(encoder[0]))
        loss = None if labels is None else cross_entropy(logits, labels, num_items_in_batch)
        return TokenClassifierOutput(
            loss=loss,
            logits=logits,
            hidden_states=encoder.hidden_states,
            attentions=encoder.attentions,
        )


class PlugForQuestionAnswering(_Classifier):
    """Extractive reading: where an answer begins and ends, two logits a token."""

    def __init__(self, config: PlugTransformersConfig) -> None:
        config.num_labels = 2
        super().__init__(config)

    @returns_output
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
    ) -> QuestionAnsweringModelOutput:
        """Logits (batch, src) of both ends, padding at -inf; positions (batch,), end inclusive.

        A position outside of the text is ignored.
        """
        attention_mask = self.known_mask(input_ids, attention_mask)
        wanted = self.wanted(output_hidden_states, output_attentions)
        encoder = self.run_encoder(input_ids, attention_mask, token_type_ids, inputs_embeds, wanted)
        logits = self.classifier(self.dropout(encoder[0])).float()
        if attention_mask is not None:
            logits = logits.masked_fill(attention_mask[..., None] == 0, -torch.inf)
        start_logits, end_logits = logits.unbind(-1)
        loss = None
        if start_positions is not None and end_positions is not None:
            ends = ((start_logits, start_positions), (end_logits, end_positions))
            losses = [cross_entropy(each, _inside(positions, each)) for each, positions in ends]
            loss = torch.stack(losses).mean()
        return QuestionAnsweringModelOutput(
            loss=loss,
            start_logits=start_logits,
            end_logits=end_logits,
            hidden_states=encoder.hidden_states,
            attentions=encoder.attentions,
        )


def _inside(positions: Tensor, logits: Tensor) -> Tensor:
    """(batch,) positions; those outside of the text, such as an answer cut off, are ignored."""
    positions = positions.flatten()
    is_outside = (positions < 0) | (positions >= logits.shape[1])
    return positions.masked_fill(is_outside, IGNORE_INDEX)

"""What all classes share: `PlugPreTrainedModel`, its layers and the loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.initialization import guard_torch_init_functions
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils.generic import can_return_tuple

from plug.checkpoints.weights import check_finite
from plug.errors import UsageError
from plug.hf.config import PlugTransformersConfig
from plug.model.configuration import PlugConfig
from plug.model.layers import DecoderLayer, Embeddings, EncoderLayer
from plug.model.plug import Encoder, PlugParts, initialize_weights

IGNORE_INDEX = -100
Forward = TypeVar("Forward", bound=Callable[..., Any])


def returns_output(forward: Forward) -> Forward:
    """`can_return_tuple` (honours ``return_dict``), with the type of what it wraps."""
    return cast(Forward, can_return_tuple(forward))


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

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As `PreTrainedModel.from_pretrained`; weights that are NaN or infinite are refused.

        Raises:
            PlugError: it names the tensors.
        """
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        on_device = ((name, x) for name, x in model.named_parameters() if not x.is_meta)
        check_finite(model.name_or_path, on_device)
        return loaded

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


def cross_entropy(
    logits: Tensor,
    labels: Tensor,
    num_items_in_batch: Tensor | int | None = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """In fp32: the sum over labels that are not -100, by their number (no labels give 0).

    The Trainer passes ``num_items_in_batch``, the number over all micro-batches of a step.
    """
    items = num_items_in_batch
    if items is None:
        items = (labels != IGNORE_INDEX).sum().clamp(min=1)
    total = F.cross_entropy(
        logits.float().flatten(0, -2),
        labels.flatten(),
        ignore_index=IGNORE_INDEX,
        reduction="sum",
        label_smoothing=label_smoothing,
    )
    return total / items

"""What all classes share: `PlugPreTrainedModel`, its layers, its checks of inputs and the loss."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.initialization import guard_torch_init_functions
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils.generic import can_return_tuple

from plug.checkpoints.headers import read_places
from plug.checkpoints.weights import Place, check_finite, map_tensors
from plug.distributed.fully_sharded import gathers_layers
from plug.errors import PlugError, UsageError
from plug.hf.adapters import teach_peft
from plug.hf.config import PlugTransformersConfig, local_path
from plug.hf.recording import Wanted, recording
from plug.model.configuration import PlugConfig
from plug.model.heads import IGNORE_INDEX
from plug.model.layers import DecoderLayer, Embeddings, EncoderLayer
from plug.model.plug import Encoder, PlugParts, initialize_weights
from plug.quantization.linear import QuantizedLinear, quantize_modules
from plug.quantization.scheme import Scheme, check_saved, scheme_of_entry

# Parts that a directory may lack: transformers reports that they are newly initialised.
_MAY_BE_NEW = ("classifier.", "decoder.", "mlm_head.", "sentence_head.")
Forward = TypeVar("Forward", bound=Callable[..., Any])

logger = logging.getLogger(__name__)


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
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,  # noqa: ARG002 (`generate` always asks for a dict)
    ) -> BaseModelOutput:
        wanted = self.model.wanted(output_hidden_states, output_attentions)
        return self.model.run_encoder(
            input_ids, attention_mask, token_type_ids, inputs_embeds, wanted
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
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As `PreTrainedModel.from_pretrained`; knows the name of the shipped model.

        Raises:
            PlugError: weights are NaN or infinite; or they are those of another model, or of one
                with adapters in it, so that parts of this one would begin with random values.
        """
        path = local_path(pretrained_model_name_or_path)
        wants_info = kwargs.pop("output_loading_info", False)
        loaded: Any = super().from_pretrained(path, *args, output_loading_info=True, **kwargs)
        model, info = loaded
        cls._check_names(path, info["missing_keys"], info["unexpected_keys"])
        if model.scheme is not None:
            _restore_dtypes(model, Path(path))
        check_finite(path, ((name, x) for name, x in model.named_parameters() if not x.is_meta))
        return loaded if wants_info else model

    @classmethod
    def _check_names(cls, path: Any, missing: Iterable[str], unexpected: Iterable[str]) -> None:
        """Raise a `PlugError` where weights are missing, or there are others."""
        missing = [key for key in missing if not key.startswith(_MAY_BE_NEW)]
        strange = [key for key in unexpected if not key.startswith("classifier.")]
        if missing or strange:
            told = [
                f"{what}权重 {'、'.join(sorted(names)[:3])} 等 {len(names)} 个"
                for what, names in (("缺少", missing), ("多出", strange))
                if names
            ]
            raise PlugError(
                f"{path} 与 {cls.__name__} 不符：{'；'.join(told)}。"
                "如果是用 peft 训练的，请保存 merge_and_unload() 返回的模型。"
            )

    def check_saved_names(self, directory: Path, found: Iterable[str]) -> None:
        """Raise a `PlugError` unless the tensors ``found`` in a directory are this model's."""
        wanted, names = self.state_dict().keys(), set(found)
        ignored = self._keys_to_ignore_on_load_unexpected or ()
        unexpected = [
            name for name in names - wanted if not any(re.search(each, name) for each in ignored)
        ]
        self._check_names(directory, wanted - names, unexpected)

    @torch.no_grad()
    def new_head(self, directory: Path) -> nn.Linear:
        """The linear layer `classifier` of ``directory``; else drawn as by `from_pretrained`."""
        head = cast(nn.Linear, self.get_submodule("classifier").to_empty(device="cpu").float())
        places = read_places(directory)
        if "classifier.weight" in places:
            parts = {
                f"classifier.{name}": places[f"classifier.{name}"] for name in ("weight", "bias")
            }
            for name, tensor in map_tensors(parts):
                head.get_parameter(name.removeprefix("classifier.")).copy_(tensor)
        else:
            nn.init.normal_(head.weight, std=self.config.initializer_range)
            nn.init.zeros_(head.bias)
        return head

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """As `PreTrainedModel.save_pretrained`.

        Raises:
            UsageError: peft has its layers in this model, so that no class could load the result.
        """
        has_adapters = any(type(part).__module__.startswith("peft.") for part in self.modules())
        if has_adapters and not getattr(self, "_hf_peft_config_loaded", False):
            raise UsageError(
                "模型里还有 peft 的适配器，这样保存的目录读不回来。请保存 peft 模型自己"
                "（只存适配器），或保存 merge_and_unload() 返回的模型。"
            )
        super().save_pretrained(*args, **kwargs)

    def build_encoder(self, config: PlugConfig) -> None:
        """Make the parts of an understanding model alone."""
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config)

    def post_init(self) -> None:
        self.encoder.main_input_name = "input_ids"  # type: ignore[assignment]
        for module in self.modules():
            if type(module) is EncoderLayer:
                module.__class__ = PlugEncoderLayer
            elif type(module) is DecoderLayer:
                module.__class__ = PlugDecoderLayer
        if self.scheme is not None:
            quantize_modules(self, self.scheme)
            teach_peft()
        super().post_init()

    @property
    def scheme(self) -> Scheme | None:
        """How the weights of the layers are kept; None where they are plain."""
        return scheme_of_entry(getattr(self.config, "quantization", None), "config")

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

    def word_table(self) -> Tensor:
        """As in `PlugParts`; where an adapter wraps the table, with what the adapter adds.

        Inputs and outputs share the table, so an adapter moves both, as merging it will.
        """
        table = self.embeddings.word_embeddings
        if isinstance(table, nn.Embedding):
            return table.weight
        return table(torch.arange(self.config.vocab_size, device=table.weight.device))

    def wanted(self, output_hidden_states: bool | None, output_attentions: bool | None) -> Wanted:
        """What to record: as asked, else as the config says."""
        states, attentions = output_hidden_states, output_attentions
        return Wanted(
            bool(self.config.output_hidden_states if states is None else states),
            bool(self.config.output_attentions if attentions is None else attentions),
        )

    def run_encoder(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        token_type_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        wanted: Wanted,
    ) -> BaseModelOutput:
        """`encode`, its inputs checked, and what is wanted of its layers.

        Args:
            input_ids: (batch, src); or ``inputs_embeds``, not both.
            attention_mask: (batch, src), 1 on real tokens; None: all but [PAD].
            token_type_ids: (batch, src); None is type 0.
            inputs_embeds: (batch, src, hidden), in place of the words' embeddings.
            wanted: of the layers.

        Raises:
            UsageError: a wrong shape, too many positions, or (on a CPU) an unknown id.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise UsageError("input_ids 和 inputs_embeds 要给其中一个，且只给一个。")
        self.check_inputs("input_ids", input_ids, inputs_embeds, attention_mask)
        self.check_ids("token_type_ids", token_type_ids, self.config.type_vocab_size)
        positions = cast(Tensor, input_ids if inputs_embeds is None else inputs_embeds).shape[:2]
        if token_type_ids is not None and token_type_ids.shape != positions:
            raise UsageError(
                f"token_type_ids 的形状是 {tuple(token_type_ids.shape)}，应为 {tuple(positions)}。"
            )
        self._warn_of_half_precision()
        attention_mask = self.known_mask(input_ids, attention_mask)
        with recording(self.encoder, wanted) as recorded:
            encoded = self.encode(input_ids, attention_mask, token_type_ids, inputs_embeds)
        return BaseModelOutput(
            last_hidden_state=cast(torch.FloatTensor, encoded),
            hidden_states=with_last(recorded.hidden_states, encoded, wanted),
            attentions=tuple(recorded.attentions) if wanted.attentions else None,
        )

    def known_mask(self, input_ids: Tensor | None, attention_mask: Tensor | None) -> Tensor | None:
        """The mask that was given; else 1 where ``input_ids`` are not [PAD]; else None."""
        if attention_mask is not None or input_ids is None:
            return attention_mask
        return (input_ids != self.config.pad_token_id).long()

    def check_inputs(
        self,
        name: str,
        ids: Tensor | None,
        embeds: Tensor | None,
        mask: Tensor | None,
        past: int = 0,
    ) -> None:
        """Refuse ids or embeddings that the tables have no rows for, and a mask of another shape.

        Args:
            name: of the ids, in the message.
            ids: (batch, positions).
            embeds: (batch, positions, hidden), where there are no ids.
            mask: (batch, past + positions).
            past: positions before these, in a cache.
        """
        given = ids if embeds is None else embeds
        assert given is not None
        inner = () if embeds is None else (self.config.hidden_size,)
        if given.dim() < 2 or given.shape[2:] != inner or not given.numel():
            shape = ", ".join(map(str, ("batch", "词元数", *inner)))
            raise UsageError(
                f"{name} 的形状是 {tuple(given.shape)}，应为 ({shape})，且一个词元都没有也不行。"
            )
        longest, length = self.config.max_position_embeddings, past + given.shape[1]
        if length > longest:
            raise UsageError(
                f"{name} 有 {length} 个词元，模型最多读 {longest} 个。请截短：truncation=True。"
            )
        self.check_ids(name, ids, self.config.vocab_size)
        if mask is not None and mask.shape != (given.shape[0], length):
            raise UsageError(
                f"{name} 的掩码形状是 {tuple(mask.shape)}，应为 {(given.shape[0], length)}。"
            )

    def check_ids(self, name: str, ids: Tensor | None, size: int) -> None:
        """Refuse ids from ``size`` on, on a CPU alone: a GPU would have to be waited for."""
        if ids is None or torch.compiler.is_compiling():
            return
        if ids.is_floating_point():
            raise UsageError(f"{name} 的类型是 {ids.dtype}，应为整数。")
        if ids.device.type == "cpu" and not 0 <= int(ids.min()) <= int(ids.max()) < size:
            raise UsageError(
                f"{name} 里有 {int(ids.min())}…{int(ids.max())}，模型只有 0…{size - 1}。"
                "请检查分词器与模型是否配套。"
            )

    def _warn_of_half_precision(self) -> None:
        """Say once that an optimizer's small steps vanish in half-precision weights.

        Of a sharded model these are copies that layers compute with; the optimizer has others.
        """
        if not (self.training and self.warns_of_half_precision) or torch.compiler.is_compiling():
            return
        self.warns_of_half_precision = False
        if gathers_layers(self) or type(self).__name__.startswith("FSDP"):  # also by Accelerate
            return
        dtypes = {each.dtype for each in self.parameters() if each.requires_grad}
        for dtype in dtypes & {torch.bfloat16, torch.float16}:
            logger.warning(
                "正在训练的权重是 %s：学习率小时，多数更新小于它能表示的最小变化，会被舍去。"
                "请用 from_pretrained(…, dtype=torch.float32) 载入；"
                "要快，再加 TrainingArguments(bf16=True)。",
                str(dtype).removeprefix("torch."),
            )

    warns_of_half_precision = True  # once; not where an optimizer rounds stochastically


def _restore_dtypes(model: PlugPreTrainedModel, directory: Path) -> None:
    """Read those parts of quantised weights again that ``dtype=`` made other numbers of.

    Raises:
        PlugError: the file has them in another dtype than the format's.
    """
    assert model.scheme is not None
    wrong: dict[str, Place] = {}
    places = read_places(directory)
    for name, layer in model.named_modules():
        if isinstance(layer, QuantizedLinear):
            specs = model.scheme.tensors(layer.out_features, layer.in_features)
            for part, (dtype, _) in specs.items():
                place = places[f"{name}.{part}"]
                check_saved(directory, f"{name}.{part}", place.spec.dtype, dtype)
                if layer.get_buffer(part).dtype != dtype:
                    wrong[f"{name}.{part}"] = place
    for full_name, tensor in map_tensors(wrong):
        name, _, part = full_name.rpartition(".")
        layer = model.get_submodule(name)
        setattr(layer, part, tensor.to(layer.get_buffer(part).device, copy=True))


def with_last(states: list[Tensor], last: Tensor, wanted: Wanted) -> tuple[Any, ...] | None:
    """Hidden states of the layers and the final norm's, if they are wanted."""
    return (*states, last) if wanted.hidden_states else None


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

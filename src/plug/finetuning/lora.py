"""LoRA in `finetune`, by peft: which base a mode takes, the adapters, what is saved.

Loading an adapter again needs no peft: `plug.loading.adapters`.
"""

from __future__ import annotations

import importlib.util
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from plug.checkpoints.directory import ADAPTER_CONFIG, CONFIG_FILE
from plug.errors import UsageError, install
from plug.files import write_json
from plug.finetuning.settings import FinetuneSettings
from plug.loading.adapters import AdaptedLinear, LowRank
from plug.quantization.scheme import read_scheme

_TASK_TYPES = {
    "PlugForConditionalGeneration": "SEQ_2_SEQ_LM",
    "PlugForSequenceClassification": "SEQ_CLS",
    "PlugForTokenClassification": "TOKEN_CLS",
    # peft 0.21 drops `token_type_ids` in its class for QUESTION_ANS: question and text look alike.
    "PlugForQuestionAnswering": None,
}
_MODEL_CARD = "README.md"  # of peft, mostly empty


def check_base(settings: FinetuneSettings, directory: Path) -> None:
    """Refuse a model whose weights are kept in another way than the mode of memory needs.

    Raises:
        UsageError: it is so, or peft is not installed.
    """
    scheme = read_scheme(directory / CONFIG_FILE)
    mode = settings.memory
    if settings.is_adapter and importlib.util.find_spec("peft") is None:
        raise UsageError(f"--memory {mode} 要用 peft，但它没有安装。请运行：{install('lora')}")
    if scheme is not None and mode != "qlora":
        why = "不能训练每个权重" if mode == "full" else "--memory lora 要未量化的模型"
        raise UsageError(
            f"{directory} 的权重是 {scheme.bits} 位整数，{why}。"
            "请用 --memory qlora，或量化之前的模型。"
        )
    if scheme is None and mode == "qlora":
        raise UsageError(
            f"--memory qlora 要量化过的模型，而 {settings.model} 没有量化。请先运行 plug quantize"
            f" --model {settings.model} --bits 4 --to 新目录，再用 --model 新目录；"
            "或用 --memory lora。"
        )


def multiplies_in_fp8(settings: FinetuneSettings, device: torch.device) -> bool:
    """Return whether quantised weights are multiplied in FP8.

    Raises:
        UsageError: it was asked for, and the card or the other settings do not allow it.
    """
    wanted = settings.quantized_products
    if wanted == "bf16" or (wanted == "auto" and settings.memory != "qlora"):
        return False
    can = False
    if device.type == "cuda" and settings.precision == "bf16":
        from plug.kernels.packed_linear import has_fp8

        can = has_fp8(device)
    if wanted == "fp8" and not can:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
        raise UsageError(
            f"quantized_products=fp8 要能乘 FP8 的显卡（计算能力 9.0 以上）和 precision=bf16，"
            f"这里是 {name}、{settings.precision}。请改用 quantized_products=auto 或 bf16。"
        )
    return can


def adapt(model: Any, settings: FinetuneSettings) -> Any:
    """Return peft's model around ``model``: adapters on all linear layers, the head trained whole.

    Args:
        model: of `plug.hf`.
        settings: of the run.
    """
    import peft

    from plug.hf.adapters import TARGET_MODULES

    name = type(model).__name__
    config = peft.LoraConfig(
        task_type=_TASK_TYPES[name],
        target_modules=TARGET_MODULES,
        modules_to_save=["classifier"] if hasattr(model, "classifier") else None,
        r=settings.lora_rank,
        lora_alpha=cast(int, settings.lora_alpha),  # any number will do
        lora_dropout=settings.lora_dropout,
        use_rslora=settings.rslora,
        use_dora=settings.dora,
    )
    with warnings.catch_warnings():  # peft 0.21 asks by a name that transformers 5.24 gives up
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing")
        adapted = peft.get_peft_model(model, config)
    for parameter in adapted.parameters():
        if parameter.requires_grad:  # the optimizer's small steps vanish in half precision
            parameter.data = parameter.data.float()
    return adapted


def save_adapter(
    model: Any, directory: Path, base: str, state: Mapping[str, Tensor] | None = None
) -> None:
    """Write the adapter of peft's ``model`` alone; its base is named as the user named it.

    ``state`` are the tensors that are trained, where ``model`` has only a shard of each.
    """
    model.save_pretrained(directory, save_embedding_layers=False, state_dict=state)
    (directory / _MODEL_CARD).unlink(missing_ok=True)
    config = json.loads((directory / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    write_json(directory / ADAPTER_CONFIG, config | {"base_model_name_or_path": base})


def without_peft(model: Any) -> Any:
    """The model inside of peft's, its adapted layers as those that inference knows.

    Weights are shared with ``model``, which stays as it is.
    """

    def copied(original: nn.Module) -> nn.Module:
        if hasattr(original, "lora_A"):
            return _plain_layer(original)
        copy = original.__new__(type(original))
        copy.__dict__.update(original.__dict__)
        copy._modules = {
            name: child if child is None else copied(child)
            for name, child in original._modules.items()
        }
        return copy

    return copied(model.get_base_model())


def _plain_layer(layer: Any) -> AdaptedLinear:
    (name,) = layer.active_adapters
    magnitude = layer.lora_magnitude_vector[name].weight if layer.lora_magnitude_vector else None
    return AdaptedLinear(
        layer.get_base_layer(),
        LowRank(
            layer.lora_A[name].weight.detach(),
            layer.lora_B[name].weight.detach() * layer.scaling[name],
            None if magnitude is None else magnitude.detach(),
        ),
    )

"""Fine-tuning over several processes of which none holds the whole model, by FSDP2 or ZeRO-3.

`run.py` asks here how a run is shared, and gets a sharded model; `trainer.py` writes and reads the
sharded checkpoints.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from plug.distributed.fully_sharded import gathered, is_fully_sharded, shard
from plug.errors import PlugError, UsageError
from plug.finetuning.adapted_layers import adapt_layers
from plug.finetuning.kind import Kind
from plug.finetuning.lora import adapt
from plug.finetuning.memory import Case, decide
from plug.finetuning.recomputation import layers_of, recompute_cheap_parts, recompute_layers
from plug.finetuning.settings import SHARDABLE, FinetuneSettings
from plug.jsonfiles import read_json
from plug.loading.shards import fill, write_gathered

_UNSUPPORTED = ("fgm", "from_scratch", "dora")  # need whole weights in one process
_PEFT_NAMES = (".base_layer", ".original_module")  # what peft puts into names of frozen parameters

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Layout:
    """How this run is shared.

    Attributes:
        processes: how many there are.
        device: of this process.
        mesh: over which FSDP2 shards the model; None: it does not.
        deepspeed: the configuration, where DeepSpeed trains; None: it does not.
    """

    processes: int
    device: torch.device
    mesh: DeviceMesh | None = None
    deepspeed: dict[str, Any] | None = None

    @property
    def is_fsdp(self) -> bool:
        return self.mesh is not None

    @property
    def is_zero3(self) -> bool:
        return zero_stage(self.deepspeed) == 3

    @property
    def is_sharded(self) -> bool:
        """Whether no process has a whole copy of the model."""
        return self.is_fsdp or self.is_zero3

    @property
    def engine(self) -> str:
        """Who keeps the shards and writes checkpoints: "none", "fsdp" or "deepspeed"."""
        if self.deepspeed is not None:
            return "deepspeed"
        return "fsdp" if self.is_fsdp else "none"

    @property
    def offloads(self) -> bool:
        """Whether DeepSpeed keeps the parameters in the host's memory."""
        zero = (self.deepspeed or {}).get("zero_optimization") or {}
        place = zero.get("offload_param") if isinstance(zero, dict) else None
        return isinstance(place, dict) and place.get("device") == "cpu"


def find_layout(settings: FinetuneSettings, case: Case, device: torch.device) -> Layout:
    """Return how the run is shared, as `settings.parallel` and the launcher's variables say.

    Joins the process group if there are several processes.

    Raises:
        UsageError: sharding is asked for without a launcher, or with what it cannot do.
    """
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    is_launched = "LOCAL_RANK" in os.environ
    sharding = settings.parallel.asked
    if sharding == "fsdp" and not is_launched:
        what = "sharding=fsdp" if settings.parallel.sharding == "fsdp" else "cpu_offload"
        raise UsageError(
            f"parallel.{what} 要由 torchrun 启动："
            "torchrun --nproc-per-node 卡数 -m plug finetune …。"
        )
    if device.type == "cuda" and is_launched:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    if settings.parallel.deepspeed:
        _refuse_unsupported(settings, "parallel.deepspeed")
        values = read_deepspeed(settings.parallel.deepspeed)
        if device.type == "cpu" and not _accelerate_knows_deepspeed():
            raise UsageError(
                "parallel.deepspeed 要有 GPU，这里用的是 CPU。CPU 上请去掉它，"
                "用 torchrun 启动并加 --set parallel.sharding=fsdp。"
            )
        return Layout(processes, device, deepspeed=values)
    if sharding == "auto":
        # Copies of the weights that change in the backward pass would part.
        is_shared = processes > 1 and (settings.is_fused or not _fits(settings, case))
        sharding = "fsdp" if is_shared else "none"
    if sharding == "none":
        return Layout(processes, device)
    _refuse_unsupported(settings, "parallel.sharding=fsdp")
    if settings.optimizer == "adamw8bit":
        # torchao compiles the step of a shard. The cache on disk gives it the code for a shard of
        # another size, since the whole tensor has the same (torch 2.13, torchao 0.18).
        torch.compiler.config.force_disable_caches = True
    if not dist.is_initialized():
        # gloo carries what `cpu_offload` keeps in the host's memory.
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    return Layout(processes, device, init_device_mesh(device.type, (processes,)))


def _accelerate_knows_deepspeed() -> bool:
    """Whether Accelerate has been told that DeepSpeed trains; on a CPU it cannot be asked to."""
    known = PartialState._shared_state.get("distributed_type")
    return bool(known == DistributedType.DEEPSPEED)


def _refuse_unsupported(settings: FinetuneSettings, asked: str) -> None:
    """Raise a `UsageError` at what needs whole weights, or gradients, in one process."""
    if settings.memory == "qlora":
        raise UsageError(f"--memory qlora 的整数权重不能分片。请用 --memory lora，或去掉 {asked}。")
    names = [name for name in _UNSUPPORTED if getattr(settings, name)]
    is_shardable = settings.optimizer in SHARDABLE and not settings.parallel.deepspeed
    if settings.is_fused and not is_shardable:
        names.append(f"optimizer={settings.optimizer}")
    if settings.child_tuning < 1:
        names.append("child_tuning")
    if names:
        raise UsageError(f"{'、'.join(names)} 不能与 {asked} 一起用。请去掉其中一个。")


def read_deepspeed(path: str) -> dict[str, Any]:
    """Return a DeepSpeed configuration.

    Raises:
        UsageError: the file is missing or no JSON object, deepspeed is not installed, or no
            launcher has started the process.
        PlugError: the file is damaged.
    """
    if importlib.util.find_spec("deepspeed") is None:
        raise UsageError(
            "parallel.deepspeed 要用 deepspeed，但它没有安装。"
            '请运行：pip install "plug-zh[deepspeed]"'
        )
    if "LOCAL_RANK" not in os.environ:
        raise UsageError(
            "parallel.deepspeed 要由 deepspeed 或 torchrun 启动："
            "deepspeed --num_gpus=卡数 --module plug finetune …。"
        )
    if not Path(path).is_file():
        raise UsageError(f"找不到 DeepSpeed 的设置文件 {path}。")
    values = read_json(Path(path))
    if not isinstance(values, dict) or zero_stage(values) not in (0, 1, 2, 3):
        raise UsageError(f"{path} 不是 DeepSpeed 的设置：zero_optimization.stage 应是 0 到 3。")
    if "scheduler" in values:
        logger.warning(
            "%s 里有 scheduler：学习率由 DeepSpeed 安排，warmup_fraction 和线性下降不起作用；"
            'DeepSpeed 的预热默认按对数升高，开头高得多（"warmup_type": "linear" 才是线性）。'
            "要用 PLUG 的学习率，请删去 scheduler。",
            path,
        )
    return values


def zero_stage(values: dict[str, Any] | None) -> int:
    """The stage of ZeRO that a DeepSpeed configuration asks for; -1 if that is no number."""
    zero = (values or {}).get("zero_optimization", {})
    stage = zero.get("stage", 0) if isinstance(zero, dict) else -1
    return stage if isinstance(stage, int) else -1


def _fits(settings: FinetuneSettings, case: Case) -> bool:
    """Whether each card has room for all of a run."""
    try:
        decide(settings, case)
    except UsageError:
        raise
    except PlugError:
        return False
    return True


def load_sharded(
    kind: Kind[Any, Any], directory: Path, settings: FinetuneSettings, layout: Layout
) -> Any:
    """Return the model of ``directory`` for training, of which each process reads its shard.

    Heads and adapters that are new are drawn alike in all processes.

    Raises:
        PlugError: the weights are damaged, or do not fit.
    """
    dtype = torch.bfloat16 if keeps_half(settings, layout.device) else torch.float32
    model = shard_for_training(kind.empty_model(directory, dtype=dtype), settings, layout)
    place = torch.device("cpu") if settings.parallel.cpu_offload else layout.device
    fill(without_wrapper(model), directory, place, _saved_name)
    return model


def computes_in_half(settings: FinetuneSettings, device: torch.device) -> bool:
    """Return whether gathered layers are bfloat16."""
    return device.type == "cuda" and settings.precision == "bf16"


def keeps_half(settings: FinetuneSettings, device: torch.device) -> bool:
    """Return whether the model's weights are kept in bfloat16, those of new adapters aside."""
    if settings.is_fused:
        return settings.precision == "bf16"
    return settings.is_adapter and computes_in_half(settings, device)


def shard_for_training(model: Any, settings: FinetuneSettings, layout: Layout) -> Any:
    """Return ``model``, without memory for its weights, as it is trained: adapted and sharded."""
    assert layout.mesh is not None
    half = computes_in_half(settings, layout.device)
    if settings.is_adapter:
        before = torch.get_rng_state()
        model = adapt(model, settings)
        torch.set_rng_state(before)
        _draw_adapters(model)
        if half:
            adapt_layers(model, in_fp8=False)
    every_layer = len(layers_of(model)) if settings.gradient_checkpointing else 0
    recompute_layers(model, settings.recomputed_layers or every_layer)
    if settings.is_fused:
        recompute_cheap_parts(model)
    bare = without_wrapper(model)
    # Weights without a copy in float32 take their gradients in bfloat16: half the memory and
    # traffic of a reduction.
    in_half = settings.is_fused and keeps_half(settings, layout.device)
    shard(
        bare,
        layout.mesh,
        settings.parallel,
        compute_dtype=torch.bfloat16 if half else None,
        reduce_dtype=torch.bfloat16 if in_half else torch.float32,
    )
    return model


def _draw_adapters(model: Any) -> None:
    """Give the adapters of peft's ``model`` their values, drawn as peft draws them.

    Beside layers without memory, peft's adapters have lost theirs.
    """
    for layer in model.modules():
        for adapter in getattr(layer, "lora_A", {}):
            for parts in (layer.lora_A, layer.lora_B):
                size = parts[adapter].in_features, parts[adapter].out_features
                parts[adapter] = nn.Linear(*size, bias=parts[adapter].bias is not None)
            layer.reset_lora_parameters(adapter, init_lora_weights=True)


def without_wrapper(model: Any) -> Any:
    """The model inside of peft's, or ``model``."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _saved_name(name: str) -> str:
    for word in _PEFT_NAMES:
        name = name.replace(word, "")
    return name


def save_model(model: Any, directory: Path | None) -> None:
    """Write a sharded model's config and weights as `save_pretrained` does; all call it together.

    Args:
        model: of `plug.hf`, sharded.
        directory: exists; None in the processes that write nothing.
    """
    state: dict[str, Tensor] = dict(model.named_parameters())  # there are no buffers
    write_gathered(directory or Path(), state, writes=directory is not None)
    if directory is not None:
        write_model_configs(model, directory)


def write_model_configs(model: Any, directory: Path) -> None:
    """Write what `save_pretrained` writes of a sharded model beside its weights."""
    config = model.config
    config.architectures = [plain_class(model).__name__]
    config.dtype = next(iter(model.parameters())).dtype
    config.save_pretrained(directory)
    if model.can_generate():
        model.generation_config.save_pretrained(directory)


def plain_class(model: Any) -> type:
    """The class of ``model``; FSDP2 makes a subclass of it."""
    return type(model).__mro__[2] if is_fully_sharded(model) else type(model)


def gathered_adapter(model: Any) -> dict[str, Tensor]:
    """Return what is trained of a sharded model, whole, on the CPU; all processes take part."""
    trained = {name: x for name, x in model.named_parameters() if x.requires_grad}
    return {name: x.cpu() for name, x in gathered(trained)}

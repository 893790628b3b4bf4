"""What a run keeps on disk: its settings, and the checkpoint from which it can be resumed."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from plug.checkpoints.directory import CONFIG_FILE
from plug.checkpoints.torch_files import read_torch_file
from plug.checkpoints.weights import check_finite, save_pickle
from plug.distributed.processes import Processes
from plug.errors import PlugError, UsageError
from plug.files import is_used, replace_directory, write_json
from plug.loading.save import write_model
from plug.model.plug import Plug
from plug.pretraining.adamw8bit import AdamW8bit
from plug.pretraining.settings import RunConfig
from plug.pretraining.sharded import CHECKPOINTS, found, read_values, restore
from plug.tokenization import PlugTokenizer

SETTINGS_FILE = "settings.json"
STATE_FILE = "training_state.pt"
CHECKPOINT = "checkpoint"  # a model directory with `STATE_FILE`
MODEL = "model"  # the model directory that a finished run leaves
# settings that change nothing of what is computed, and those that pass steps over
FREE_ON_RESUME = frozenset(
    {"output", "workers", "checkpoint_every", "checkpoint_minutes", "log_every", "tensorboard"}
    | {"skip_spikes", "skip_steps", "keep_checkpoints", "parallel", "recomputation"}
)


@dataclass(frozen=True, slots=True)
class Saved:
    """Where a resumed run goes on. Its weights are in the checkpoint's model directory."""

    path: Path
    step: int
    tokens: int
    optimizers: list[dict[str, Any]]
    norms: list[float]
    skipped: list[int]


@dataclass(slots=True)
class State:
    """What training changes, and what a checkpoint holds of it."""

    stage: int
    config: RunConfig
    model: Plug
    tokenizer: PlugTokenizer
    optimizers: list[Optimizer]
    step: int = 0  # optimiser steps done
    tokens: int = 0  # seen in them, by all processes
    norms: list[float] = field(default_factory=list)  # of the gradient; see `spikes.is_spike`
    skipped: list[int] = field(default_factory=list)  # steps (from 0) that were passed over
    corpus: str = ""  # the `fingerprint` of what it is trained on

    def save(self, output: Path, processes: Processes) -> None:
        """Replace the checkpoint in ``output``, or leave the old one if that fails."""
        values = self.to_dict(processes)
        values["optimizers"] = [optimizer.state_dict() for optimizer in self.optimizers]
        with replace_directory(output / CHECKPOINT, CONFIG_FILE) as directory:
            write_model(self.model, directory, tokenizer=self.tokenizer)
            save_pickle(values, directory / STATE_FILE)

    def to_dict(self, processes: Processes) -> dict[str, Any]:
        """What a checkpoint holds besides weights and the optimisers' states."""
        return {
            "stage": self.stage,
            "step": self.step,
            "tokens": self.tokens,
            "world_size": processes.world_size,
            "tensor": processes.tensor,
            "config": dataclasses.asdict(self.config),
            "norms": self.norms,
            "skipped": self.skipped,
            "corpus": self.corpus,
        }

    def restore(self, saved: Saved) -> None:
        """Go on from ``saved``; the weights have been read with the model.

        Raises:
            PlugError: the checkpoint is not of these optimisers.
        """
        is_sharded = saved.path.is_dir()
        count = 0 if is_sharded else len(self.optimizers)
        if len(saved.optimizers) != count or saved.step > self.config.steps:
            raise _damaged(saved.path, "步数或优化器的个数不对")
        if is_sharded:
            restore(self.model, self.optimizers, saved.path)
        steps = self.config.steps
        clean_from = round(self.config.mlm_fraction * steps) if self.stage == 2 else steps
        for optimizer, values in zip(self.optimizers, saved.optimizers, strict=not is_sharded):
            _check_optimizer(optimizer, values, saved, clean_from)
            optimizer.load_state_dict(values)
        self.step, self.tokens = saved.step, saved.tokens
        self.norms, self.skipped = list(saved.norms), list(saved.skipped)


def check_output(output: Path, *, resume: bool) -> None:
    """Refuse an output that is in use, or one without anything to resume.

    Raises:
        UsageError: says whether --resume is needed or has to go.
    """
    is_free = not is_used(output)
    if not is_free and not output.is_dir():
        raise UsageError(f"输出目录 {output} 是一个文件。请换一个 output。")
    is_run = (output / SETTINGS_FILE).is_file() or (output / CHECKPOINT / STATE_FILE).is_file()
    if is_free:
        if resume:
            raise UsageError(
                f"{output} 里没有可以接着训练的检查点，也没有中断的训练。请去掉 --resume。"
            )
    elif not is_run:
        raise UsageError(f"输出目录 {output} 已有内容，但不是一次训练。请换一个 output。")
    elif not resume:
        raise UsageError(
            f"输出目录 {output} 已有内容，是一次训练。接着训练请加 --resume"
            "（还没有检查点时从头开始），否则请换一个 output。"
        )


def write_settings(output: Path, stage: int, config: RunConfig) -> None:
    """Write down what the run was started with."""
    write_json(output / SETTINGS_FILE, {"stage": stage, **dataclasses.asdict(config)})


def is_finished(output: Path) -> bool:
    """Whether the run has left its model."""
    return (output / MODEL / CONFIG_FILE).is_file()


def sharding_of(output: Path) -> str:
    """Return the `parallel.sharding` that the checkpoint in ``output`` was written with, or ""."""
    if found(output / CHECKPOINTS):
        return "fsdp"
    return "none" if (output / CHECKPOINT / STATE_FILE).is_file() else ""


def read_saved(
    output: Path,
    stage: int,
    config: RunConfig,
    processes: Processes,
    corpus: str,
    is_sharded: bool = False,
) -> Saved | None:
    """The checkpoint of an interrupted run; None if it was stopped before the first one.

    Args:
        output: of the run.
        stage: that it is to go on with.
        config: likewise.
        processes: that it has now.
        corpus: the `fingerprint` of what the run would be trained on.
        is_sharded: whether the processes share the model.

    Raises:
        UsageError: the run was started with settings, a number of processes or a corpus that would
            make it another run.
        PlugError: the checkpoint or the settings are damaged.
    """
    path, sharded = output / CHECKPOINT / STATE_FILE, found(output / CHECKPOINTS)
    if (path.is_file() and is_sharded) or (sharded and not is_sharded):
        was, now = ("none", "fsdp") if is_sharded else ("fsdp", "none")
        raise UsageError(
            f"{output} 的检查点是用 parallel.sharding={was} 训练的，现在是 {now}。"
            f"请用 --set parallel.sharding={was}，或换一个 output 重新训练。"
        )
    if not path.is_file() and not sharded:
        path = output / SETTINGS_FILE
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            raise PlugError(f"{path} 已损坏，也没有检查点。请换一个 output 重新训练。") from None
        _check_same(path, before if isinstance(before, dict) else {}, stage, config)
        return None
    if sharded:  # the optimisers' states are read with the weights
        path = sharded[-1]
        values = read_values(path) | {"optimizers": []}
    else:
        values = read_torch_file(path, "optimizers").content
    kinds = {"stage": int, "config": dict, "world_size": int, "step": int, "tokens": int}
    kinds["optimizers"] = list
    if not isinstance(values, dict) or any(type(values.get(n)) is not k for n, k in kinds.items()):
        raise _damaged(path, "缺少内容，或内容的类型不对")
    if values["step"] < 0 or values["tokens"] < 0 or values["world_size"] < 1:
        raise _damaged(path, "步数、词元数或进程数不对")
    before = {"stage": values["stage"], **values["config"]}
    layout_before = values["world_size"], values.get("tensor", 1)
    norms, skipped = (values.get(name, []) for name in ("norms", "skipped"))
    if not (_are(norms, float) and _are(skipped, int)):
        raise _damaged(path, "跳过的步数或梯度的记录不对")
    saved = Saved(path, values["step"], values["tokens"], values["optimizers"], norms, skipped)
    _check_same(path, before, stage, config)
    if values.get("corpus", corpus) != corpus:  # checkpoints of earlier versions do not say
        raise UsageError(
            f"语料 {config.corpus} 在检查点 {path} 之后变了：接下去的批次不会是原来的。"
            "请恢复原来的语料，或换一个 output 重新训练。"
        )
    # Batches are the same whatever the number of processes; the draws of dropout are not.
    if config.dropout and layout_before != (processes.world_size, processes.tensor):
        count, tensor = layout_before
        was, now = (
            "" if each == 1 else f"（parallel.tensor={each}）"
            for each in (tensor, processes.tensor)
        )
        raise UsageError(
            f"检查点 {path} 是用 {count} 个进程{was}训练的，现在有"
            f" {processes.world_size} 个{now}，而 dropout={config.dropout}："
            "接下去不会与不中断的训练相同。请用同样多的进程"
            f"（torchrun --nproc-per-node {count}）和同样的 parallel.tensor，"
            "或换一个 output 重新训练。"
        )
    return saved


def _are(values: object, kind: type) -> bool:
    return isinstance(values, list) and all(type(value) is kind for value in values)


def _check_same(path: Path, before: dict[str, Any], stage: int, config: RunConfig) -> None:
    wanted = {"stage": stage, **dataclasses.asdict(config)}
    # Earlier versions had fewer settings, and did what the defaults are.
    before = {item.name: item.default for item in dataclasses.fields(config)} | before
    differing = sorted(
        # By their text: 1, 1.0 and True are equal numbers, and other settings.
        name
        for name in wanted.keys() - FREE_ON_RESUME
        if repr(before.get(name)) != repr(wanted[name])
    )
    if differing:
        raise UsageError(
            f"{path} 是用别的设置训练的，不同之处：{'、'.join(differing)}。"
            "请改回来，或换一个 output 重新训练。"
        )


def _damaged(path: Path, reason: str) -> PlugError:
    return PlugError(f"检查点 {path} 已损坏（{reason}）。请换一个 output 重新训练。")


def _check_optimizer(optimizer: Optimizer, values: Any, saved: Saved, clean_from: int) -> None:
    """Raise a `PlugError` unless a saved state is one of this optimiser after ``saved.step`` steps.

    `load_state_dict` takes states of other shapes and settings without a word.
    """
    own = optimizer.state_dict()["param_groups"]
    if not isinstance(values, dict) or values.keys() != {"state", "param_groups"}:
        raise _damaged(saved.path, "优化器的状态不全")
    if _settings(values["param_groups"]) != _settings(own):
        raise _damaged(saved.path, "优化器的参数组与设置不符")
    # Sources are clean from `clean_from` on, where no loss depends on the masked-LM head.
    counts = {saved.step - len(saved.skipped)}
    if clean_from < saved.step:
        counts.add(clean_from - sum(step < clean_from for step in saved.skipped))
    parameters = [each for group in optimizer.param_groups for each in group["params"]]
    if not isinstance(values["state"], dict) or not values["state"].keys() <= set(
        range(len(parameters))
    ):
        raise _damaged(saved.path, "优化器的状态与参数不符")
    tensors: dict[str, Tensor] = {}
    for index, state in values["state"].items():
        for name, value in state.items() if isinstance(state, dict) else [("", None)]:
            wanted = _wanted(optimizer, parameters[index], name)
            if not isinstance(value, Tensor) or (value.shape, value.dtype) != wanted:
                raise _damaged(saved.path, "优化器的状态与参数的形状不符")
            if name == "step" and value.item() not in counts:
                raise _damaged(saved.path, "优化器的步数与检查点的不符")
            tensors[f"optimizer.{index}.{name}"] = value
    check_finite(saved.path, tensors.items())


def _wanted(optimizer: Optimizer, parameter: Tensor, name: Any) -> tuple[torch.Size, torch.dtype]:
    """The shape and the dtype of a part of a weight's state."""
    if name == "step":
        return torch.Size(), torch.float32
    if isinstance(optimizer, AdamW8bit) and isinstance(
        own := optimizer.state_of(parameter).get(name), Tensor
    ):
        return own.shape, own.dtype
    return parameter.shape, parameter.dtype


def _settings(groups: Any) -> str:
    """Return the settings of parameter groups as text.

    They are without the rate, which every step sets, and without `fused`, which says how a step is
    computed: on a CPU earlier versions had it False.
    """
    if not isinstance(groups, list) or not all(isinstance(group, dict) for group in groups):
        return ""
    passed_over = ("lr", "fused")
    return repr(
        [sorted((str(k), v) for k, v in group.items() if k not in passed_over) for group in groups]
    )

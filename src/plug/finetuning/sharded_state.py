"""Checkpoints of a sharded run: what is trained in `weights`, AdamW's states in `optimizer`.

Both are directories of `plug.checkpoints.sharded`, inside of the Trainer's checkpoint. Frozen
weights are not saved: they are in the model's own directory.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from plug.checkpoints.sharded import is_sharded, read_sharded, write_sharded
from plug.checkpoints.weights import save_pickle
from plug.errors import PlugError, UsageError

WEIGHTS = "weights"
OPTIMIZER = "optimizer"
SCHEDULE_FILE = "schedule.pt"  # the learning rate's, which is the same in all processes
_DEEPSPEED_FILE = "latest"  # of its engine: names the folder of its files
_DEEPSPEED_SHARES = "global_step*/*zero_pp_rank_*_optim_states.pt"  # one of each process
_TRAINED = StateDictOptions(ignore_frozen_params=True)
_FLAT = StateDictOptions(ignore_frozen_params=True, flatten_optimizer_state_dict=True)


def write_weights(folder: Path, model: nn.Module) -> None:
    """Write what is trained of ``model`` into the checkpoint ``folder``."""
    write_sharded(folder / WEIGHTS, get_model_state_dict(model, options=_TRAINED))


def read_weights(folder: Path, model: nn.Module) -> None:
    """Read what `write_weights` wrote, for any number of processes.

    Raises:
        PlugError: the checkpoint is damaged, or of a model of another shape.
    """
    read_sharded(folder / WEIGHTS, get_model_state_dict(model, options=_TRAINED))


def write_optimizer(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, schedule: Any
) -> None:
    """Write the optimizer's states and the schedule into the checkpoint ``folder``."""
    state = get_optimizer_state_dict(model, optimizer, options=_FLAT)
    write_sharded(folder / OPTIMIZER, state)
    if dist.get_rank() == 0:
        save_pickle(schedule.state_dict(), folder / SCHEDULE_FILE)


def read_optimizer(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, schedule: Any
) -> None:
    """Read what `write_optimizer` wrote; raises as `read_weights`."""
    state = get_optimizer_state_dict(model, optimizer, options=_FLAT)
    read_sharded(folder / OPTIMIZER, state)
    set_optimizer_state_dict(model, optimizer, state, options=_FLAT)
    try:
        schedule.load_state_dict(torch.load(folder / SCHEDULE_FILE, weights_only=True))
    except (OSError, EOFError, RuntimeError, ValueError, KeyError):
        raise PlugError(
            f"检查点的 {folder / SCHEDULE_FILE} 已损坏，不能接着训练。"
            f"请删去 {folder}，从更早的检查点接着训练。"
        ) from None


def check_engine(folder: Path, engine: str, processes: int) -> None:
    """Refuse a checkpoint that this run's engine did not write, or cannot share out anew.

    Args:
        folder: the Trainer's checkpoint.
        engine: "none", "fsdp" or "deepspeed".
        processes: that take part now.

    Raises:
        UsageError: it is so.
    """
    written_by = "none"
    if is_sharded(folder / WEIGHTS):
        written_by = "fsdp"
    elif (folder / _DEEPSPEED_FILE).is_file():
        written_by = "deepspeed"
    if written_by != engine:
        option = {
            "none": "parallel.sharding=none",
            "fsdp": "parallel.sharding=fsdp",
            "deepspeed": "parallel.deepspeed",
        }
        how = "，由 torchrun 启动，进程数可以变，1 个也行" if written_by == "fsdp" else ""
        raise UsageError(
            f"检查点 {folder} 是用 {option[written_by]} 训练的，现在是 {option[engine]}。"
            f"请用原来的 {option[written_by]} 接着训练{how}；或换一个输出目录。"
        )
    shares = len(list(folder.glob(_DEEPSPEED_SHARES)))
    if shares and shares != processes:
        raise UsageError(
            f"检查点 {folder} 是 DeepSpeed 的 {shares} 个进程写的，它只能由 {shares} 个进程"
            f"接着训练，现在是 {processes} 个。请用 {shares} 个进程；"
            "要换进程数，请用 parallel.sharding=fsdp 重新训练。"
        )

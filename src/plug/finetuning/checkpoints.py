"""Checkpoints of a fine-tuning run: which of them count, which are kept, what a signal saves."""

from __future__ import annotations

import json
import zipfile
import zlib
from pathlib import Path
from typing import Any

from accelerate import PartialState
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import TrainerCallback

from plug.checkpoints.weights import check_finite
from plug.distributed.processes import Vote
from plug.errors import PlugError
from plug.files import remove_directory, sync_tree, write_text
from plug.interrupts import Interrupted, Interrupts

STATE_FILE = "trainer_state.json"  # of the Trainer, which writes it last
SYNCED_FILE = "synced"  # ours: everything else of the checkpoint is on the disk


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that is whole; None if the run has to begin anew.

    A killed process may leave a newer one that is not. Checkpoints of earlier versions have no
    `synced` file: they count if their state can be read.
    """
    found = [path.parent for path in folder.glob(f"checkpoint-*/{STATE_FILE}")]
    by_step = sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))
    whole = [path for path in by_step if _is_readable(path / STATE_FILE)]
    synced = [path for path in whole if (path / SYNCED_FILE).is_file()]
    return next(reversed(synced or whole), None)


def _is_readable(path: Path) -> bool:
    try:
        return isinstance(json.loads(path.read_text(encoding="utf-8")), dict)
    except (OSError, ValueError):
        return False


def check_checkpoint(folder: Path) -> None:
    """Look at every byte of a checkpoint before the Trainer reads it.

    Raises:
        PlugError: a file is damaged, or weights are NaN or infinite.
    """
    for path in sorted(
        [*folder.glob("*.safetensors"), *folder.glob("*.pt"), *folder.glob("*.pth")]
    ):
        try:
            if path.suffix == ".safetensors":
                check_finite(path, load_file(path).items())
            elif zipfile.ZipFile(path).testzip() is not None:
                raise zipfile.BadZipFile
        except (SafetensorError, zipfile.BadZipFile, OSError, EOFError, zlib.error):
            raise PlugError(
                f"检查点的 {path} 已损坏，不能接着训练。请删去 {folder}，从更早的检查点接着训练，"
                "或换一个输出目录重新训练。"
            ) from None


class Checkpoints(TrainerCallback):
    """Syncs each checkpoint before older ones are removed; saves one when a signal comes.

    Of the older ones the best is kept.

    Args:
        interrupts: what is asked of this process; all processes stop at the same step.
        output: of the run, for the message.
        resumable: whether checkpoints hold what ``--resume`` needs.
    """

    def __init__(self, interrupts: Interrupts, output: Path, resumable: bool) -> None:
        self.interrupts, self.output, self.resumable = interrupts, output, resumable
        self.processes = PartialState()
        self.vote = Vote(self.processes.num_processes)
        self.signal = 0

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        """Ask for a checkpoint if a signal came. At an epoch's end there is one in any case."""
        self.signal = self.signal or self.vote(self.interrupts.asked or 0)
        if self.signal and not self.resumable:
            raise Interrupted("已中断。这次训练没有留下可以接着训练的检查点。", self.signal)
        if self.signal and not _is_whole_epoch(state) and state.global_step < state.max_steps:
            control.should_save = True

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        """Sync the checkpoint that the Trainer has just written, and remove older ones."""
        folder = Path(args.output_dir)
        current = folder / f"checkpoint-{state.global_step}"
        self.processes.wait_for_everyone()
        if self.processes.is_main_process:
            sync_tree(current)
            write_text(current / SYNCED_FILE, "")
            kept = {current.name, Path(state.best_model_checkpoint or current).name}
            for path in folder.glob("checkpoint-*"):
                if path.name not in kept:
                    remove_directory(path)
        if self.signal:
            self.processes.wait_for_everyone()  # the launcher ends them all when one has ended
            raise Interrupted(
                f"已中断，第 {state.global_step} 步的检查点在 {self.output}。"
                "用同样的命令加 --resume 接着训练。",
                self.signal,
            )


def _is_whole_epoch(state: Any) -> bool:
    return abs(state.epoch - round(state.epoch)) < 1e-6

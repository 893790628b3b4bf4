"""`FinetuneSettings`: every option of a run and its default; imports no torch."""

from __future__ import annotations

import dataclasses
import shlex
import sys
from dataclasses import dataclass
from typing import Any

from plug.errors import UsageError
from plug.finetuning.tasks import find_task
from plug.generation.settings import MAX_PROMPT_TOKENS, WINDOW

PRECISIONS = ("bf16", "fp32")


@dataclass(frozen=True, kw_only=True, slots=True)
class FinetuneSettings:
    """One run. Epochs, batch size and lengths of 0 are the task's own, and are filled in here.

    Attributes:
        task: a name in `TASKS`.
        train: file to learn from; eval: file that chooses the best epoch.
        output: directory of the run; the model, its report and its settings end up in it.
        model: a name or directory as `plug.load` takes it.
        epochs: passes over the training file.
        learning_rate: highest, after the warm-up; then linear decay to 0.
        layer_decay: each layer further from the output learns by this factor more slowly.
        r_drop: weight of R-Drop's divergence (classification); 0: off.
        label_smoothing: share of the target that is spread over all labels, or all tokens; 0: off.
        fgm: length of the adversarial step on the word embeddings (FGM); 0: off.
        child_tuning: share of gradients that each step keeps (Child-Tuning-F); 1: all.
        patience: evaluations without a better score before the run stops; 0: never.
        num_beams: of the evaluations of generation; 1 is argmax.
        precision: of training on a GPU: "bf16" (autocast), or "fp32" with products in TF32: no
            casts, about 40% fewer kernels a step. A CPU always has fp32.
        from_scratch: start from random weights of the model's shape, for comparison.
    """

    task: str
    train: str
    eval: str
    output: str
    model: str = "plug-mini-zh"
    epochs: float = 0.0
    batch_size: int = 0
    eval_batch_size: int = 64
    learning_rate: float = 5e-4
    warmup_fraction: float = 0.1
    weight_decay: float = 0.01
    clip_grad_norm: float = 1.0
    layer_decay: float = 1.0
    r_drop: float = 0.0
    label_smoothing: float = 0.0
    fgm: float = 0.0
    child_tuning: float = 1.0
    source_length: int = 0
    target_length: int = 0
    num_beams: int = 1
    patience: int = 0
    seed: int = 1
    precision: str = "bf16"
    from_scratch: bool = False

    def __post_init__(self) -> None:
        task = find_task(self.task)
        for name in ("epochs", "batch_size", "source_length", "target_length"):
            if getattr(self, name) == 0:
                object.__setattr__(self, name, getattr(task, name))
        for item in dataclasses.fields(self):
            _check_type(item.name, getattr(self, item.name), str(item.type))
        for name in ("epochs", "batch_size", "eval_batch_size", "learning_rate", "target_length",
                     "num_beams", "clip_grad_norm"):  # fmt: skip
            if not getattr(self, name) > 0:
                raise UsageError(f"{name}={getattr(self, name)} 应大于 0。")
        for name, low in (("warmup_fraction", 0.0), ("layer_decay", 0.01), ("child_tuning", 0.01),
                          ("label_smoothing", 0.0)):  # fmt: skip
            if not low <= getattr(self, name) <= 1:
                raise UsageError(f"{name}={getattr(self, name)} 应在 {low} 与 1 之间。")
        for name in ("weight_decay", "r_drop", "fgm", "patience", "seed"):
            if not getattr(self, name) >= 0:
                raise UsageError(f"{name}={getattr(self, name)} 不能小于 0。")
        if self.r_drop and task.kind != "classification":
            raise UsageError(f"r_drop 只用于分类任务，{self.task} 不是。请去掉它。")
        if self.label_smoothing and task.kind == "reading":
            raise UsageError(f"label_smoothing 不能用于阅读理解，{self.task} 是。请去掉它。")
        if self.precision not in PRECISIONS:
            raise UsageError(f"precision={self.precision!r} 应是 {' 或 '.join(PRECISIONS)}。")

    def check_lengths(self, max_position_embeddings: int) -> None:
        """Raise `UsageError` where the model has no positions for the lengths."""
        longest = {"source_length": max_position_embeddings, "target_length": sys.maxsize}
        if find_task(self.task).kind == "generation":
            longest = {
                "source_length": min(MAX_PROMPT_TOKENS + 2, max_position_embeddings),
                "target_length": min(WINDOW["plug"], max_position_embeddings),
            }
        for name, most in longest.items():
            least = 16 if name == "source_length" else 1
            if not least <= getattr(self, name) <= most:
                raise UsageError(f"{name}={getattr(self, name)} 应在 {least} 到 {most} 之间。")

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def command(self) -> str:
        """The command line of this run: what differs from the defaults."""
        words = ["plug finetune", self.task]
        defaults = type(self)(task=self.task, train="", eval="", output="").to_dict()
        for name, value in self.to_dict().items():
            if name == "task" or value == defaults[name]:
                continue
            option = "--" + name.replace("_", "-")
            words.append(option if value is True else f"{option} {shlex.quote(str(value))}")
        return " ".join(words)


def _check_type(name: str, value: object, annotation: str) -> None:
    wanted: tuple[type, ...] = (str,)
    if "bool" in annotation:
        wanted = (bool,)
    elif "float" in annotation:
        wanted = (int, float)
    elif "int" in annotation:
        wanted = (int,)
    if not isinstance(value, wanted) or (isinstance(value, bool) and bool not in wanted):
        raise UsageError(f"{name}={value!r} 的类型应为 {annotation}。")

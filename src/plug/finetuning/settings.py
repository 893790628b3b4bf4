"""`FinetuneSettings`: every option of a fine-tuning run. Their one home; imports no torch.

The command line (`cli/finetune.py`), settings files, the table in `docs/finetuning.md` and the
checks are made from the fields. To add an option, add a field, and its effect in `trainer.py`.
"""

from __future__ import annotations

import dataclasses
import json
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from plug.distributed.settings import ParallelSettings
from plug.errors import UsageError
from plug.finetuning.tasks import find_task
from plug.generation.settings import MAX_BEAMS, MAX_PROMPT_TOKENS, WINDOW
from plug.options import (
    REQUIRED,
    Bool,
    Choice,
    Float,
    Int,
    Table,
    Text,
    check_options,
    merge,
    option,
    options_of,
)
from plug.shipped import SHIPPED_MODEL

# What the command line has an option for; all else is `--set NAME=VALUE`, or in a settings file.
FLAGS = (
    "train", "eval", "output", "model", "epochs", "batch_size", "eval_batch_size", "learning_rate",
    "source_length", "target_length", "num_beams", "seed", "precision", "from_scratch", "memory",
    "optimizer", "lora_rank",
)  # fmt: skip
MODES = ("auto", "full", "lora", "qlora")  # of `memory`
OPTIMIZERS = ("adamw", "adamw8bit", "adamw8bit_fused", "adafactor")
FUSED = ("adamw8bit_fused", "adafactor")  # they change weights in the backward pass
SHARDABLE = ("adamw8bit_fused",)  # of those, what works on shards
_NEED_GRADIENTS = {  # all of them at once: the default, which does not, and what for
    "gradient_accumulation_steps": (1, "累积梯度"),
    "fgm": (0.0, "第二份梯度"),
    "child_tuning": (1.0, "全部梯度"),
    "clip_grad_norm": (1.0, "全部梯度的范数"),
}
_OF_TASK = ("epochs", "batch_size", "source_length", "target_length")
_TASK_S = ("任务的默认值", "the task's")


@dataclass(frozen=True, kw_only=True, slots=True)
class FinetuneSettings:
    """One run. Each field's metadata has its help text and its limits.

    Epochs, batch size and lengths of 0 are the task's own, and are filled in; a user who writes one
    (`of`) is told that it is none.

    Raises:
        UsageError: a value is of another type, outside its limits, or excludes another option.
    """

    task: str = option(REQUIRED, Text(4096), "任务名。", "a name in `finetuning/tasks.py`")
    train: str = option(
        REQUIRED, Text(4096),
        "训练数据文件（可 .gz、.zst），或 datasets 的 名字:划分。",
        "file to learn from, or `NAME:SPLIT` of `datasets`",
    )  # fmt: skip
    eval: str = option(
        REQUIRED, Text(4096), "评测数据，用来选出最好的一轮。", "file that chooses the best epoch"
    )
    output: str = option(
        REQUIRED, Text(4096),
        "输出目录：模型、设置、报告。须不存在或为空。",
        "directory of the run: model, settings, report; new or empty",
    )  # fmt: skip
    model: str = option(
        SHIPPED_MODEL, Text(4096),
        "从哪个模型开始：名字或目录。",
        "where to start: a name or directory, as `plug.load` takes it",
    )  # fmt: skip
    epochs: float = option(
        0.0, Float(0.001, 10_000, zero=True), "训练几轮。", "passes over the training file", _TASK_S
    )
    batch_size: int = option(0, Int(0, 65_536), "每步几个例子。", "examples a step", _TASK_S)
    eval_batch_size: int = option(
        64, Int(1, 65_536), "评测时一次几个例子。", "examples at once in evaluations"
    )
    learning_rate: float = option(
        5e-4, Float(1e-30, 1e30),
        "最高学习率；大模型用 1e-5。",
        "highest, after the warm-up; then it falls to 0 in a line. Large models want 1e-5",
    )  # fmt: skip
    warmup_fraction: float = option(
        0.1,
        Float(0, 0.99),
        "学习率升高的步数所占比例。",
        "share of the steps that the rate rises in",
    )
    weight_decay: float = option(
        0.01, Float(0, 10), "权重衰减。", "a weight shrinks by the rate times this in each step"
    )
    clip_grad_norm: float = option(
        1.0, Float(1e-6, 1e6),
        "梯度范数的上限（adamw）。",
        "longest gradient; a longer one is scaled down. `adafactor` and `adamw8bit_fused` limit "
        "each weight's update instead",
    )  # fmt: skip
    layer_decay: float = option(
        1.0, Float(0.01, 1),
        "每低一层，学习率乘以它；1 为不变。",
        "each layer further from the output learns by this factor more slowly (arXiv:1801.06146)",
    )  # fmt: skip
    r_drop: float = option(
        0.0, Float(0, 1000),
        "R-Drop 的权重（分类任务）；0 为不用。",
        "weight of R-Drop: two passes with different dropout should agree (classification; "
        "arXiv:2106.14448); 0: off",
    )  # fmt: skip
    label_smoothing: float = option(
        0.0, Float(0, 1),
        "标签平滑：目标中分给所有标签（或词元）的比例；0 为不用。",
        "share of the target that is spread over all labels, or all tokens (arXiv:1512.00567); "
        "0: off",
    )  # fmt: skip
    fgm: float = option(
        0.0, Float(0, 1000),
        "对抗训练（FGM）在词向量上走多远，如 1；0 为不用。",
        "length of an adversarial step on the word embeddings, for a second gradient "
        "(arXiv:1605.07725); 0: off",
    )  # fmt: skip
    child_tuning: float = option(
        1.0, Float(0.01, 1),
        "每步保留多大比例的梯度；1 为全部。",
        "share of the gradients that each step keeps (Child-Tuning-F, arXiv:2109.05687); 1: all",
    )  # fmt: skip
    source_length: int = option(
        0, Int(0, 2**20), "最多读多少词元。", "tokens read at most, `[CLS]` and `[SEP]` counted",
        _TASK_S,
    )  # fmt: skip
    target_length: int = option(
        0, Int(0, 2**20),
        "最多写多少词元（常有几个字），或答案最长多少词元。",
        "tokens written at most, or of an answer",
        _TASK_S,
    )  # fmt: skip
    num_beams: int = option(
        1, Int(1, MAX_BEAMS),
        "生成任务评测时的束宽；1 为贪心。",
        "beams in evaluations of generation; 1: greedy",
    )  # fmt: skip
    patience: int = option(
        0, Int(0, 10_000),
        "连续几轮不见好就停；0 为不早停。",
        "evaluations without a better score before the run stops; 0: never",
    )  # fmt: skip
    seed: int = option(1, Int(0, 2**32 - 1), "随机种子。", "of the order, dropout and new heads")
    precision: str = option(
        "bf16", Choice(("bf16", "fp32")),
        "GPU 上的精度：bf16，或 fp32（乘法用 TF32）。CPU 上总是 fp32。",
        "of training on a GPU: bfloat16 autocast, or float32 with products in TF32 (no casts, "
        "about 40% fewer kernels a step). A CPU always has float32",
    )  # fmt: skip
    from_scratch: bool = option(
        False, Bool(),
        "不用模型的权重，随机初始化（供比较）。",
        "start from random weights of the model's shape, for comparison",
    )  # fmt: skip

    memory: str = option(
        "auto", Choice(MODES),
        "训练什么：full 为每个权重；lora 为各层旁的小矩阵（要装 peft），只存它们；"
        "qlora 同 lora，但模型是量化过的，占内存最少；auto 按模型和显存选，能 full 就 full。"
        "小模型在 TNEWS 上用 lora、qlora 比 full 低约 2 分，问题生成不低。",
        "what is trained: every weight, or small matrices beside the linear layers of encoder and "
        "decoder (LoRA by peft, arXiv:2106.09685), which are saved alone; with `qlora` the model "
        "is a directory of `plug quantize`, which takes the least memory. A head is trained whole. "
        "`auto` picks by the model and the GPU's memory: `full` with AdamW where that fits. With "
        "the small model adapters cost 2 points on TNEWS and none where it writes (results.md)",
    )  # fmt: skip
    optimizer: str = option(
        "adamw", Choice(OPTIMIZERS),
        "优化器：adamw；adamw8bit 的状态为 8 位（要装 torchao）；adafactor 在反向传播中更新权重，"
        "权重为 bf16，不留梯度，占内存最少；adamw8bit_fused 也这样更新，但有 8 位的状态，"
        "可以分片到几张卡。",
        "`adamw`; `adamw8bit`: its states in 8 bits (torchao); `adafactor`: bfloat16 weights that "
        "change inside the backward pass, so that neither all gradients nor a second copy of the "
        "weights exist: the least memory for `full`; `adamw8bit_fused`: likewise, by AdamW with "
        "states in 8 bits, on one card or with `fsdp` on several",
    )  # fmt: skip
    lora_rank: int = option(16, Int(1, 4096), "LoRA 的秩。", "of the small matrices")
    lora_alpha: float = option(
        32.0, Float(1e-6, 1e6), "LoRA 的缩放：乘以它除以秩。",
        "what the small matrices give is multiplied by it and divided by the rank",
    )  # fmt: skip
    lora_dropout: float = option(
        0.05, Float(0, 0.99), "LoRA 输入的 dropout。", "of the small matrices' inputs, in training"
    )
    rslora: bool = option(
        False, Bool(), "LoRA 的缩放除以秩的平方根。",
        "divide by the square root of the rank instead (rsLoRA, arXiv:2312.03732)",
    )  # fmt: skip
    dora: bool = option(
        False, Bool(), "LoRA 加上每个输出的模长（DoRA）。",
        "also learn the norm of each output's weights (DoRA, arXiv:2402.09353); slower",
    )  # fmt: skip
    quantized_products: str = option(
        "auto", Choice(("auto", "fp8", "bf16")),
        "qlora 在 GPU 上用什么精度乘：fp8（快，要 H100 一类的显卡）或 bf16；auto 看显卡。",
        "what `qlora` multiplies in on a GPU: FP8, forward and backward, which needs a card of "
        "compute capability 9.0, or bf16; auto: FP8 where the card has it",
    )  # fmt: skip
    gradient_accumulation_steps: int = option(
        1, Int(1, 65_536),
        "每几批更新一次权重：每步的例子是 batch_size 乘以它。",
        "batches whose gradients are added up before the weights change: a step has so many times "
        "`batch_size` examples",
    )  # fmt: skip
    gradient_checkpointing: bool = option(
        False, Bool(),
        "反向时重算各层，少占内存，约慢三分之一。",
        "compute each layer again in the backward pass: less memory, about a third slower",
    )  # fmt: skip
    recomputed_layers: int = option(
        0, Int(0, 10_000),
        "反向时重算前几层（编码器在先）；0 为由 gradient_checkpointing 决定。",
        "compute so many layers again, the encoder's first; 0: all or none, as "
        "`gradient_checkpointing` says",
    )  # fmt: skip

    parallel: ParallelSettings = option(
        ParallelSettings(), Table(ParallelSettings),
        "多张卡时怎样分工，见 docs/finetuning.md 的 [parallel]。",
        "how several cards share a run; see below",
        ("一张卡", "see below"),
    )  # fmt: skip

    def __post_init__(self) -> None:
        check_options(self)
        task = find_task(self.task)
        for name in _OF_TASK:
            if getattr(self, name) == 0:
                object.__setattr__(self, name, getattr(task, name))
        if self.parallel.tensor > 1:
            raise UsageError(
                f"plug finetune 没有张量并行：请去掉 parallel.tensor={self.parallel.tensor}，"
                "用 parallel.sharding=fsdp 把模型分到几张卡上。"
            )
        if self.r_drop and task.kind != "classification":
            raise UsageError(f"r_drop 只用于分类任务，{self.task} 不是。请去掉它。")
        if self.label_smoothing and task.kind == "reading":
            raise UsageError(f"label_smoothing 不能用于阅读理解，{self.task} 是。请去掉它。")
        if self.memory == "full" and (self.rslora or self.dora):
            raise UsageError("rslora 和 dora 要与 --memory lora 或 qlora 一起用。")
        if self.quantized_products == "fp8" and self.memory != "qlora":
            raise UsageError(
                f"quantized_products=fp8 要与 --memory qlora 一起用，现在是 {self.memory}。"
            )
        if self.is_adapter and self.optimizer != "adamw":
            raise UsageError(
                f"optimizer={self.optimizer} 用于训练每个权重，不能与 --memory {self.memory}"
                " 一起用。LoRA 的优化器状态很小，请用 adamw。"
            )
        if self.is_fused:
            self._check_fused()
        if self.is_adapter and (self.fgm or self.from_scratch):
            name = "fgm" if self.fgm else "from_scratch"
            raise UsageError(f"{name} 要训练每个权重，不能与 --memory {self.memory} 一起用。")

    def _check_fused(self) -> None:
        """Refuse what needs all gradients at once: they do not exist with `FUSED`."""
        for name, (default, what) in _NEED_GRADIENTS.items():
            if getattr(self, name) != default:
                raise UsageError(
                    f"optimizer={self.optimizer} 在反向传播中逐个更新权重，不留梯度，"
                    f"而 {name}={getattr(self, name)} 要{what}。请去掉它，或用 --optimizer adamw。"
                )
        if self.parallel.cpu_offload:
            raise UsageError(
                f"optimizer={self.optimizer} 在显卡上更新权重，不能与 parallel.cpu_offload 一起用。"
                "请去掉它，或用 --optimizer adamw。"
            )

    @property
    def is_adapter(self) -> bool:
        """Whether small matrices are trained, and saved alone."""
        return self.memory in ("lora", "qlora")

    @property
    def is_fused(self) -> bool:
        """Whether each weight changes in the backward pass, when its gradient is there."""
        return self.optimizer in FUSED

    @property
    def can_be_fused(self) -> bool:
        """Whether an optimizer of `FUSED` would do: nothing needs all gradients at once."""
        return all(getattr(self, name) == each for name, (each, _) in _NEED_GRADIENTS.items())

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> FinetuneSettings:
        """Settings from a mapping, such as a settings file's.

        Raises:
            UsageError: a name is unknown, one that must be given is missing, or a value is not
                accepted; a 0 for what a task decides is none.
        """
        required = [name for name, (default, _) in options_of(cls).items() if default is REQUIRED]
        if missing := [name for name in required if name not in values]:
            words = ["任务名" if name == "task" else f"--{name}" for name in missing]
            raise UsageError(f"缺少 {'、'.join(words)}。加上 `--help` 看用法。")
        for name in _OF_TASK:
            if values.get(name) == 0:
                raise UsageError(f"{name}={values[name]} 应大于 0。要用任务的默认值，请不写它。")
        return merge(cls, None, values)

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
            if isinstance(value, dict):
                changed = {k: v for k, v in value.items() if v != defaults[name][k]}
                words += [_assignment(f"{name}.{k}", v) for k, v in changed.items()]
            elif name not in FLAGS:
                words.append(_assignment(name, value))
            elif value is True:
                words.append(f"--{name.replace('_', '-')}")
            else:
                words.append(f"--{name.replace('_', '-')} {shlex.quote(str(value))}")
        return " ".join(words)


def _assignment(name: str, value: Any) -> str:
    return f"--set {shlex.quote(f'{name}={json.dumps(value)}')}"

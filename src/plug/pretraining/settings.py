"""`RunConfig`: every setting of a pre-training run, read from one TOML file (see `configs/`)."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from plug.distributed.settings import ParallelSettings
from plug.errors import UsageError
from plug.model.configuration import PRESETS
from plug.options import Table, merge_tables, read_toml
from plug.pretraining.optimization import OPTIMIZERS, SCHEDULES

_POSITIVE = (
    "steps",
    "batch_tokens",
    "micro_batch_tokens",
    "checkpoint_every",
    "keep_checkpoints",
    "log_every",
    "learning_rate",
    "clip_grad_norm",
)
_NOT_NEGATIVE = (
    "weight_decay",
    "domain_exponent",
    "workers",
    "checkpoint_minutes",
    "seed",
    "skip_spikes",
)
_SHARES = (
    "warmup_fraction",
    "mlm_fraction",
    "whole_sentence_share",
    "mlm_rate",
    "shuffle_rate",
    "dropout",
)
_CHOICES = {
    "preset": tuple(sorted(PRESETS)),
    "precision": ("bf16", "fp32"),
    "optimizer": OPTIMIZERS,
    "schedule": SCHEDULES,
}
_LARGEST_SEED = 2**31 - 1  # times a million and the steps, it is still a seed of torch's


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """One run of one stage. Paths are relative to where the command is run."""

    corpus: str  # folder that `plug pretrain data` wrote
    output: str  # folder of this run: log.csv, loss.png, checkpoint/, model/
    steps: int
    # [[length, weight], …] in stage 1, [[source, target, weight], …] in stage 2; in tokens, [CLS]
    # and [SEP] counted. Each batch draws one.
    shapes: list[list[float]]
    batch_tokens: int  # of all processes together, a step; source and target tokens
    learning_rate: float
    preset: str = "mini"
    model: dict[str, Any] = field(default_factory=dict)  # changes to the preset, e.g. its layers
    init_from: str = ""  # stage 2: the model folder that stage 1 left ("": from nothing)
    micro_batch_tokens: int = 65536  # of one process, forward and backward at once
    optimizer: str = "adamw"  # or "adamw8bit" (moments in 8 bits: torchao), "muon"
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    weight_decay: float = 0.01
    warmup_fraction: float = 0.1
    schedule: str = "linear"  # or "cosine", "constant"
    clip_grad_norm: float = 1.0
    dropout: float = 0.1  # hidden and attention, while training
    domain_exponent: float = 1.0  # a domain's weight is its tokens to this power
    domain_factors: dict[str, float] = field(default_factory=dict)
    mlm_rate: float = 0.15
    shuffle_rate: float = 0.05  # stage 1: share of trigrams; 0 leaves the word objective out
    sentence_objective: bool = True  # stage 1
    mlm_fraction: float = 0.9  # stage 2: share of the steps with a corrupted source and its loss
    whole_sentence_share: float = 0.3  # stage 2: passages cut at a sentence boundary
    precision: str = "bf16"  # or "fp32"
    compile: bool = False  # `torch.compile` of each layer; pays on a GPU
    # Products of encoder and decoder layers in FP8, forward and backward, a scale for each row; for
    # cards of compute capability 9.0 and precision = "bf16".
    fp8_products: bool = False
    # Layers that keep their input alone and are computed again in the backward pass, the encoder's
    # first; "auto": as many as the card's memory asks (none on a CPU, and none with `compile`).
    recomputation: int | str = "auto"
    workers: int = 2  # processes that make batches
    checkpoint_every: int = 1000  # steps
    checkpoint_minutes: float = 10.0  # a checkpoint is due after so long as well; 0: by steps alone
    keep_checkpoints: int = 2  # of a sharded run, the newest
    log_every: int = 10  # steps
    tensorboard: bool = False  # write TensorBoard files as well (extra `tensorboard`)
    # A step whose gradient's norm exceeds so many times the median of the last 100 is not applied,
    # nor one whose gradient is not a number (0: all are applied). At least 2.
    skip_spikes: float = 0.0
    # Numbers (from 1) of steps whose batch is passed over; may be added when resuming.
    skip_steps: list[int] = field(default_factory=list)
    seed: int = 1
    # The table [parallel], as in `plug finetune`: sharding, and tensor parallelism (`tensor`).
    parallel: ParallelSettings = field(default_factory=ParallelSettings)

    def __post_init__(self) -> None:
        for item in dataclasses.fields(self):
            value, default = getattr(self, item.name), item.default
            wanted = {"int": (int,), "float": (int, float), "str": (str,), "bool": (bool,)}.get(
                str(item.type)
            )
            is_bool = isinstance(value, bool)
            if wanted and (not isinstance(value, wanted) or (is_bool and bool not in wanted)):
                raise UsageError(
                    f"设置 {item.name}={value!r} 的类型应为 {item.type}（默认 {default!r}）。"
                    if default is not dataclasses.MISSING
                    else f"设置 {item.name}={value!r} 的类型应为 {item.type}。"
                )
            if isinstance(value, float) and not math.isfinite(value):
                raise UsageError(f"设置 {item.name}={value} 应是有限的数。")
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise UsageError(
                    f"设置 {name}={getattr(self, name)!r} 应为 {'、'.join(choices)} 之一。"
                )
        for name in _POSITIVE:
            if getattr(self, name) <= 0:
                raise UsageError(f"设置 {name}={getattr(self, name)} 应大于 0。")
        for name in _NOT_NEGATIVE:
            if getattr(self, name) < 0:
                raise UsageError(f"设置 {name}={getattr(self, name)} 不能小于 0。")
        for name in _SHARES:
            if not 0 <= getattr(self, name) <= 1:
                raise UsageError(f"设置 {name}={getattr(self, name)} 应在 0 与 1 之间。")
        if self.domain_exponent > 10:
            raise UsageError(f"设置 domain_exponent={self.domain_exponent} 应不大于 10。")
        if self.seed > _LARGEST_SEED:
            raise UsageError(f"设置 seed={self.seed} 应不大于 {_LARGEST_SEED}。")
        if 0 < self.skip_spikes < 2:
            raise UsageError(f"设置 skip_spikes={self.skip_spikes} 应为 0（不跳过）或不小于 2。")
        steps = self.skip_steps
        if not (isinstance(steps, list) and all(type(n) is int and n >= 1 for n in steps)):
            raise UsageError(
                f"设置 skip_steps={steps!r} 应为不小于 1 的步数的列表，如 [120, 121]。"
            )
        betas = self.betas
        if not (
            isinstance(betas, list)
            and len(betas) == 2
            and all(_is_number(beta) and 0 <= beta < 1 for beta in betas)
        ):
            raise UsageError(f"设置 betas={betas!r} 应为 [0, 1) 内的两个数。")
        parallel = Table(ParallelSettings).check("parallel", self.parallel)
        object.__setattr__(self, "parallel", parallel)
        if parallel.deepspeed:
            raise UsageError(
                '预训练不用 DeepSpeed：请去掉 parallel.deepspeed，用 sharding = "fsdp"。'
            )
        if parallel.tensor > 1 and (self.compile or self.fp8_products):
            asked = "compile" if self.compile else "fp8_products"
            raise UsageError(f"{asked} 不能与 parallel.tensor 一起用。请去掉其中一个。")
        again = self.recomputation
        if again != "auto" and (type(again) is not int or again < 0):
            raise UsageError(f'设置 recomputation={again!r} 应为 "auto" 或不小于 0 的层数。')
        if self.fp8_products and (self.precision != "bf16" or self.compile):
            asked = "compile=true" if self.compile else f"precision={self.precision}"
            raise UsageError(f"fp8_products 不能与 {asked} 一起用。请去掉其中一个。")
        if not isinstance(self.model, dict):
            raise UsageError(f"设置 model={self.model!r} 应为一个表，如 {{ hidden_size = 128 }}。")
        factors = self.domain_factors
        if not (
            isinstance(factors, dict)
            and all(_is_number(factor) and factor >= 0 for factor in factors.values())
        ):
            raise UsageError(f"设置 domain_factors={factors!r} 应为领域名到不小于 0 的数的表。")

    def parsed_shapes(self, dimensions: int) -> list[tuple[tuple[int, ...], float]]:
        """Each shape with its weight.

        Raises:
            UsageError: an entry is not ``dimensions`` lengths of at least 8 and a positive weight.
        """
        shapes: list[tuple[tuple[int, ...], float]] = []
        if not isinstance(self.shapes, list) or not self.shapes:
            raise UsageError(f"设置 shapes={self.shapes!r} 应为不空的列表。")
        for entry in self.shapes:
            good = (
                isinstance(entry, list)
                and len(entry) == dimensions + 1
                and all(isinstance(length, int) and length >= 8 for length in entry[:-1])
                and _is_number(entry[-1])
                and entry[-1] > 0
            )
            if not good:
                kind = "[长度, 权重]" if dimensions == 1 else "[源长度, 目标长度, 权重]"
                raise UsageError(f"shapes 的一项 {entry!r} 应为 {kind}，长度为不小于 8 的整数。")
            shapes.append((tuple(int(length) for length in entry[:-1]), float(entry[-1])))
        if len({shape for shape, _ in shapes}) < len(shapes):
            raise UsageError(f"设置 shapes={self.shapes!r} 里有重复的长度，请合成一项。")
        return shapes

    @classmethod
    def from_file(cls, path: Path, overrides: dict[str, Any] | None = None) -> RunConfig:
        """Read a TOML file; ``overrides`` (from `--set`) replace what it says, tables key by key.

        Raises:
            UsageError: the file is missing, no TOML, has unknown or missing settings, or values
                that make no sense.
        """
        values = merge_tables(read_toml(path), overrides or {})
        known = {item.name for item in dataclasses.fields(cls)}
        unknown = sorted(values.keys() - known)
        if unknown:
            raise UsageError(f"{path} 里有不认识的设置 {unknown}。可用的有 {sorted(known)}。")
        required = {
            item.name
            for item in dataclasses.fields(cls)
            if item.default is item.default_factory is dataclasses.MISSING
        }
        if missing := sorted(required - values.keys()):
            raise UsageError(f"{path} 缺少设置 {missing}。")
        return cls(**values)


def _is_number(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return math.isfinite(value)

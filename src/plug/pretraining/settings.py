"""`RunConfig`: every setting of a pre-training run, read from one TOML file (see `configs/`)."""

from __future__ import annotations

import dataclasses
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from plug.errors import UsageError
from plug.model.configuration import PRESETS

_POSITIVE = (
    "steps",
    "batch_tokens",
    "micro_batch_tokens",
    "checkpoint_every",
    "log_every",
    "learning_rate",
    "clip_grad_norm",
)
_SHARES = (
    "warmup_fraction",
    "mlm_fraction",
    "whole_sentence_share",
    "mlm_rate",
    "shuffle_rate",
    "dropout",
)


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
    optimizer: str = "adamw"  # or "muon"
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
    workers: int = 2  # processes that make batches
    checkpoint_every: int = 1000  # steps
    log_every: int = 10  # steps
    seed: int = 1

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
        if self.preset not in PRESETS:
            raise UsageError(f"preset={self.preset!r} 不在 {sorted(PRESETS)} 之中。")
        for name in _POSITIVE:
            if getattr(self, name) <= 0:
                raise UsageError(f"设置 {name}={getattr(self, name)} 应大于 0。")
        for name in _SHARES:
            if not 0 <= getattr(self, name) <= 1:
                raise UsageError(f"设置 {name}={getattr(self, name)} 应在 0 与 1 之间。")
        if self.precision not in ("bf16", "fp32"):
            raise UsageError(f"precision={self.precision!r} 应为 bf16 或 fp32。")
        if self.workers < 0:
            raise UsageError(f"workers={self.workers} 不能小于 0。")

    def parsed_shapes(self, dimensions: int) -> list[tuple[tuple[int, ...], float]]:
        """Each shape with its weight.

        Raises:
            UsageError: an entry is not ``dimensions`` lengths of at least 8 and a positive weight.
        """
        shapes = []
        for entry in self.shapes:
            good = (
                isinstance(entry, list)
                and len(entry) == dimensions + 1
                and all(isinstance(length, int) and length >= 8 for length in entry[:-1])
                and entry[-1] > 0
            )
            if not good:
                kind = "[长度, 权重]" if dimensions == 1 else "[源长度, 目标长度, 权重]"
                raise UsageError(f"shapes 的一项 {entry!r} 应为 {kind}，长度为不小于 8 的整数。")
            shapes.append((tuple(int(length) for length in entry[:-1]), float(entry[-1])))
        if not shapes:
            raise UsageError("shapes 不能为空。")
        return shapes

    @classmethod
    def from_file(cls, path: Path, overrides: dict[str, Any] | None = None) -> RunConfig:
        """Read a TOML file; ``overrides`` (from `--set`) replace what it says.

        Raises:
            UsageError: the file is missing, no TOML, has unknown or missing settings, or values
                that make no sense.
        """
        if not path.is_file():
            raise UsageError(f"设置文件 {path} 不存在。")
        try:
            values = tomllib.loads(path.read_text(encoding="utf-8")) | (overrides or {})
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise UsageError(f"{path} 不是有效的 TOML：{error}") from None
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

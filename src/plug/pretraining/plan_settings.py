"""`PlanSettings`: what `plug pretrain plan` is asked, and the cards it knows. Imports no torch.

What was measured is in `CARDS`, with the place where it is written down. All else is an assumption,
has an option, and is named as one in the plan.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from plug.checkpoints.directory import CONFIG_FILE
from plug.errors import UsageError
from plug.model.configuration import PRESETS, PlugConfig
from plug.options import Bool, Choice, Float, Int, Text, bytes_of, check_options, option


@dataclass(frozen=True, slots=True)
class Card:
    """A kind of card.

    Attributes:
        memory: bytes that a program may use.
        product: operations a second of a large product in bf16; 0: not known.
        price: of an hour, in yuan; always an assumption; 0: not known.
        training: model operations a second while one card alone trains the 27B; 0: not measured.
        training_fp8: likewise with products in FP8, of 4 + 1 layers of the 27B on one of two cards.
        source: where all of these were measured; empty: an assumption.
    """

    memory: float
    product: float
    price: float
    training: float = 0.0
    training_fp8: float = 0.0
    source: str = ""


CARDS = {
    "H100": Card(83e9, 778e12, 15.0, 556e12, 794e12, "docs/experiments.md"),
    "H200": Card(149e9, 778e12, 20.0),  # the same chip with more memory
    "A100": Card(83e9, 250e12, 8.0),
    "H20": Card(95e9, 140e12, 6.0),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanSettings:
    """What is to be trained, on what.

    Raises:
        UsageError: a value is not accepted.
    """

    preset: str = option(
        "27b", Text(4096),
        f"规格名（{'、'.join(PRESETS)}），或模型目录、config.json 的路径。",
        "the size: a preset's name, or the path of a model's directory or config.json",
    )  # fmt: skip
    card: str = option(
        "H100", Text(64),
        f"显卡（{'、'.join(CARDS)}），或显存的大小，如 24GB（还要给 tflops）。",
        "the kind of card, or the memory of another kind, such as 24GB (with `tflops`)",
    )  # fmt: skip
    cards: int = option(64, Int(1, 2**20), "几张。", "how many")
    characters: float = option(
        3e10, Float(1e3, 1e15), "训练多少字，如 3e10。", "Chinese characters to train on"
    )
    characters_per_token: float = option(
        1.0, Float(0.1, 10), "一个词元多少字。27B 的词表约一字一个。", "characters of a token"
    )
    source_length: int = option(512, Int(8, 2**20), "一段读多少词元。", "tokens of a source")
    target_length: int = option(
        512, Int(0, 2**20), "一段写多少词元；0 为第一阶段。", "tokens of a target; 0: stage 1"
    )
    batch_tokens: int = option(
        4_194_304, Int(1, 2**40), "一步多少词元，所有卡合计。", "tokens of a step, of all cards"
    )
    optimizer: str = option(
        "adamw8bit", Choice(("adamw", "adamw8bit", "muon")), "优化器。", "the optimizer"
    )
    fp8: bool = option(
        False, Bool(), "用 FP8 乘（fp8_products）。", "products in FP8 (`fp8_products`)"
    )
    tflops: float = option(
        0.0, Float(0.001, 1e5, zero=True),
        "每张卡训练时每秒的模型 TFLOP（不计重算）；0：单卡实测的乘以 scaling，没有实测的用 mfu。",
        "model TFLOP/s of a card while training, recomputation not counted; 0: what one card alone "
        "was measured at x `scaling`, or where nothing was measured, product x `mfu`",
    )  # fmt: skip
    scaling: float = option(
        0.8, Float(0.01, 1), "许多张卡一起时，每张保持单卡速度的几分之几。",
        "share of its speed alone that a card keeps among many",
    )  # fmt: skip
    mfu: float = option(
        0.5,
        Float(0.01, 1),
        "没有实测的卡：训练的速度是矩阵乘的几分之几。",
        "of a card that was not measured: training as a share of a product's speed",
    )
    network: float = option(
        50.0, Float(0.1, 1e4), "卡间每秒多少 GB，每张卡。", "GB/s of a card to the others"
    )
    price: float = option(
        0.0, Float(0.001, 1e6, zero=True),
        "一张卡一小时多少元；0：表里的假设。", "yuan an hour of a card; 0: that of the table",
    )  # fmt: skip
    failure_hours: float = option(
        50_677.0, Float(1, 1e9),
        "一张卡平均多少小时坏一次（Llama 3：16,384 张 54 天 419 次）。",
        "mean hours between failures of one card (Llama 3, arXiv 2407.21783, section 3.3.4: 419 in "
        "54 days on 16,384 cards)",
    )  # fmt: skip
    checkpoint_seconds: float = option(
        1.0, Float(0.001, 1e5), "存一次检查点训练停多少秒。", "seconds that a checkpoint stops it"
    )
    restart_minutes: float = option(
        15.0, Float(0.01, 1e5), "从出故障到接着训练多少分钟。", "minutes from a failure to work"
    )

    def __post_init__(self) -> None:
        check_options(self)
        _ = self.config
        if not (self.kind.product or self.tflops):
            raise UsageError(
                f"card={self.card!r} 训练的速度不知道。请用 --tflops 给出每张卡每秒的模型 TFLOP，"
                f"或用 {'、'.join(CARDS)}。"
            )

    @property
    def config(self) -> PlugConfig:
        """The shape that is trained."""
        if self.preset in PRESETS:
            return PRESETS[self.preset]
        path = Path(self.preset)
        try:
            file = path / CONFIG_FILE if path.is_dir() else path
            is_there = file.is_file()
        except OSError:  # too long for a path
            is_there = False
        if not is_there:
            raise UsageError(
                f"preset={self.preset!r} 不是规格名（{'、'.join(PRESETS)}），"
                f"那里也没有 {CONFIG_FILE}。"
            )
        return PlugConfig.from_file(file)

    @property
    def kind(self) -> Card:
        """The kind of card; of one that is not in the table, only the memory is known."""
        if self.card in CARDS:
            return CARDS[self.card]
        try:
            return Card(bytes_of(self.card, "card"), 0.0, 0.0)
        except UsageError:
            raise UsageError(
                f"card={self.card!r} 既不是 {'、'.join(CARDS)}，也不是显存的大小。请写如 24GB。"
            ) from None

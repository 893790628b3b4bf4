"""Ways to fine-tune a model, from every weight to adapters, and which of them fits a card."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace

from plug.errors import UsageError
from plug.loading.estimate import Need, Training, training_need
from plug.model.configuration import PlugConfig

# The largest card that anybody has: in memory without end nothing is given up.
NO_LIMIT = 2**60


@dataclass(frozen=True, kw_only=True, slots=True)
class Mode:
    """What is trained, by what, and how the weights are kept: no number of examples or layers."""

    memory: str
    optimizer: str = "adamw"
    bits: int = 16

    @property
    def name(self) -> str:
        """As tables have it."""
        kept = {32: "float32", 16: "bf16"}.get(self.bits, f"{self.bits} 位")
        by = f" {self.optimizer}" if self.memory == "full" else ""
        return f"{self.memory}{by}（{kept}）"


# From the best to the smallest. Every weight first; then what leaves the model's weights alone.
MODES = (
    Mode(memory="full", bits=32),
    Mode(memory="full", optimizer="adafactor"),
    Mode(memory="lora"),
    Mode(memory="qlora", bits=8),
    Mode(memory="qlora", bits=4),
)


@dataclass(frozen=True, slots=True)
class Way:
    """A mode, and what was given up for it to fit.

    Attributes:
        training: what a step is; its batch is what is computed at once.
        accumulated: batches that make a step.
        need: the peak that is predicted.
    """

    training: Training
    accumulated: int
    need: Need


def ways(config: PlugConfig, mode: Mode, training: Training, accumulated: int = 1) -> Iterator[Way]:
    """Yield what a mode can give up for memory, the best first.

    More and more layers are computed again in the backward pass. Then half as many examples are
    computed at once, and twice as many batches make a step, again and again. (A fused optimizer
    step cannot wait for more batches: there the examples at once stay.)

    Args:
        config: the model's shape.
        mode: to be tried.
        training: batch size, lengths, cards; what `Mode` and this function say is replaced.
        accumulated: batches that make a step as it was asked for.

    Raises:
        UsageError: 4 bits, and a layer cannot be parted into groups.
    """
    layers = config.num_hidden_layers
    if training.target_length:
        layers += config.num_decoder_layers
    base = replace(training, memory=mode.memory, optimizer=mode.optimizer, bits=mode.bits)
    size = training.batch_size
    while size:
        steps = accumulated * -(-training.batch_size // size)
        if not (base.is_fused and steps > 1):
            for count in range(layers + 1):
                each = replace(
                    base,
                    batch_size=size,
                    recomputed=count,
                    accumulates=base.accumulates or steps > 1,
                )
                yield Way(each, steps, training_need(config, each))
        size //= 2


def best_way(
    config: PlugConfig, mode: Mode, training: Training, room: int, accumulated: int = 1
) -> Way | None:
    """Return the first of `ways` that takes ``room`` bytes at most, overhead and all; or None."""
    with contextlib.suppress(UsageError):  # too narrow for groups of 4 bits
        for way in ways(config, mode, training, accumulated):
            if way.need.with_overhead().total <= room:
                return way
    return None


def smallest_way(
    config: PlugConfig, mode: Mode, training: Training, accumulated: int = 1
) -> Way | None:
    """Return the one of `ways` with the lowest peak; None where the mode is impossible."""
    with contextlib.suppress(UsageError):
        return min(
            ways(config, mode, training, accumulated), key=lambda way: way.need.total, default=None
        )
    return None

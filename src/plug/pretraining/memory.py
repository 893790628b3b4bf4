"""Whether a run fits its cards, and how many layers are computed again so that it does."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from plug.errors import PlugError
from plug.loading.estimate import OVERHEAD_BYTES, Training, training_need
from plug.loading.memory import free_memory
from plug.model.configuration import PlugConfig
from plug.pretraining.settings import RunConfig

_MOST_CARDS = 4096  # that are tried where fewer do not hold the model


def recomputed_layers(
    config: PlugConfig,
    settings: RunConfig,
    stage: int,
    device: torch.device,
    *,
    world_size: int,
    cards: int,
) -> int:
    """Return how many layers keep their input alone; with "auto" the fewest that fit.

    On a CPU, and with `compile`, where the compiler decides what is kept, "auto" is 0 layers.

    Args:
        config: of the model.
        settings: of the run.
        stage: 1 or 2.
        device: of this process.
        world_size: processes, or groups of them, that share a batch.
        cards: that share one copy of the model.

    Raises:
        PlugError: the card is too small; the message says what would fit.
    """
    room = free_memory(device)
    if room is None:
        return 0 if settings.recomputation == "auto" else int(settings.recomputation)
    if max(world_size, cards) > 1:  # all decide alike; what is free differs a little between cards
        room = torch.cuda.get_device_properties(device).total_memory - 2 * OVERHEAD_BYTES
    found = fewest_recomputed(config, settings, stage, room, world_size=world_size, cards=cards)
    if found is None:
        raise PlugError(too_small(config, settings, stage, room, world_size, cards))
    return found


def fewest_recomputed(
    config: PlugConfig,
    settings: RunConfig,
    stage: int,
    room: int,
    *,
    world_size: int,
    cards: int,
) -> int | None:
    """Return the fewest layers that have to be computed again for ``room`` bytes; None: no number.

    A number that the settings name is the only one.
    """
    layers = config.num_hidden_layers + (config.num_decoder_layers if stage == 2 else 0)
    counts: Any = [0] if settings.compile else range(layers + 1)
    overhead = OVERHEAD_BYTES
    if settings.recomputation != "auto":
        counts, overhead = [int(settings.recomputation)], 0
    for count in counts:
        if need_of(config, settings, stage, world_size, cards, count) + overhead <= room:
            return int(count)
    return None


def need_of(
    config: PlugConfig, settings: RunConfig, stage: int, world_size: int, cards: int, count: int
) -> int:
    """Return the bytes at the peak on a card, of the shape that takes most."""
    return max(
        training_need(config, each).total
        for each in trainings(settings, stage, world_size=world_size, cards=cards, recomputed=count)
    )


def trainings(
    settings: RunConfig, stage: int, *, world_size: int, cards: int, recomputed: int
) -> Iterator[Training]:
    """Yield what a step is for memory, for each of the shapes."""
    is_half = settings.precision == "bf16"
    for lengths, _ in settings.parsed_shapes(dimensions=stage):
        tokens = sum(lengths)
        rows = max(1, settings.batch_tokens // tokens // world_size)
        parts = -(-rows * tokens // settings.micro_batch_tokens)
        size = -(-rows // min(rows, parts))
        shuffled = settings.shuffle_rate if stage == 1 else 0.0
        yield Training(
            batch_size=size,
            source_length=lengths[0],
            target_length=lengths[1] if stage == 2 else 0,
            optimizer=settings.optimizer,
            half=is_half,
            recomputed=recomputed,
            accumulates=cards == 1 or parts > 1,
            dropout=settings.dropout > 0,
            cards=cards,
            tensor=settings.parallel.tensor,
            reshards=settings.parallel.reshard_after_forward,
            offload=settings.parallel.cpu_offload,
            masked_share=settings.mlm_rate + shuffled,
            half_stream=is_half,
            fp8=settings.fp8_products,
            compiled=settings.compile,
        )


def too_small(
    config: PlugConfig,
    settings: RunConfig,
    stage: int,
    room: int,
    world_size: int,
    cards: int,
) -> str:
    """Return a sentence on what is missing, and one on what would fit."""
    free = settings if settings.compile else replace(settings, recomputation="auto")

    def fits(changed: RunConfig, world_size: int, cards: int) -> bool:
        found = fewest_recomputed(config, changed, stage, room, world_size=world_size, cards=cards)
        return found is not None

    def largest_part(changed: RunConfig) -> int | None:
        """The most tokens at once that fit, of halves of those asked for; a row at least."""
        size = settings.micro_batch_tokens
        least = max(sum(lengths) for lengths, _ in settings.parsed_shapes(dimensions=stage))
        while size >= least or size == settings.micro_batch_tokens:
            if fits(replace(changed, micro_batch_tokens=size), world_size, cards):
                return size
            size //= 2
        return None

    layers = config.num_hidden_layers + (config.num_decoder_layers if stage == 2 else 0)
    count = layers if settings.recomputation == "auto" else int(settings.recomputation)
    needed = need_of(config, settings, stage, world_size, cards, count)
    what = f"重算全部 {layers} 层" if settings.recomputation == "auto" else f"重算 {count} 层"
    found = []
    if (size := largest_part(free)) == settings.micro_batch_tokens:
        found.append('recomputation="auto"')
    elif size is not None:
        found.append(f"micro_batch_tokens={size}")
    if size is None and settings.optimizer != "adamw8bit":
        size = largest_part(replace(free, optimizer="adamw8bit"))
        small = f" 和 micro_batch_tokens={size}" if size != settings.micro_batch_tokens else ""
        found += [f'optimizer="adamw8bit"{small}'] if size is not None else []
    tensor = settings.parallel.tensor
    counts = (tensor * n for n in _powers(cards // tensor))
    more = next((n for n in counts if fits(free, max(n // tensor, world_size), n)), None)
    if more is not None:
        found.append(f"parallel.sharding=fsdp，{more} 张这样的卡")
    return (
        f"显存放不下：每张卡约需 {needed / 1e9:.1f} GB（{what}，一次至多"
        f" {settings.micro_batch_tokens} 个词元），可用 {room / 1e9:.1f} GB。"
        + (f"可以用：{'；或 '.join(found)}。" if found else "请换显存更大的卡。")
    )


def _powers(above: int) -> Iterator[int]:
    """The powers of two above a number of cards."""
    number = 2
    while number <= _MOST_CARDS:
        if number > above:
            yield number
        number *= 2

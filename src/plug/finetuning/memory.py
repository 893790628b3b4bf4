"""Ways to fine-tune, from every weight to adapters: which fits a card, and what `auto` picks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace

from plug.errors import PlugError, UsageError
from plug.finetuning.settings import FinetuneSettings
from plug.loading.estimate import Need, Training, generation_need, host_need, training_need
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


# Those that several cards can share (FSDP2).
SHARDED_MODES = (
    MODES[0],
    Mode(memory="full", optimizer="adamw8bit", bits=32),
    Mode(memory="full", optimizer="adamw8bit_fused"),
    MODES[2],
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

    More and more layers are computed again in the backward pass. Then fewer examples are computed
    at once, and more batches make a step of as many examples. (A fused optimizer step cannot wait
    for more batches: there the examples at once stay.)

    Args:
        config: the model's shape.
        mode: to be tried.
        training: batch size, lengths, cards, the least number of recomputed layers; what `Mode`
            says is replaced.
        accumulated: batches that make a step as it was asked for.

    Raises:
        UsageError: 4 bits, and a layer cannot be parted into groups.
    """
    layers = layers_in(config, training)
    base = replace(training, memory=mode.memory, optimizer=mode.optimizer, bits=mode.bits)
    for size in range(training.batch_size, 0, -1):
        steps, rest = divmod(training.batch_size, size)
        if rest or (base.is_fused and steps > 1):
            continue
        for count in range(min(base.recomputed, layers), layers + 1):
            each = replace(
                base,
                batch_size=size,
                recomputed=count,
                accumulates=base.accumulates or steps > 1,
            )
            yield Way(each, accumulated * steps, training_need(config, each))


def layers_in(config: PlugConfig, training: Training) -> int:
    """Return how many layers the task's model has."""
    return config.num_hidden_layers + (config.num_decoder_layers if training.target_length else 0)


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


# --- what a run does ------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """What a decision looks at besides the settings.

    Args:
        config: of the model.
        bits: 8 or 4 of a quantised model; None: its weights are floats.
        source_length: tokens of the longest example.
        target_length: likewise; 0 where the task has no decoder.
        room: bytes free on the device; None where nobody says.
        on_gpu: whether it is one.
        cards: that share weights, gradients and states (FSDP2); one: each has all of them.
        offload: whether those are kept in the host's memory.
        host: bytes free there; None where nobody says.
        processes: that take a step together; with one of ``cards`` each has a copy of the weights.
    """

    config: PlugConfig
    bits: int | None
    source_length: int
    target_length: int
    room: int | None
    on_gpu: bool
    cards: int = 1
    offload: bool = False
    host: int | None = None
    processes: int = 1


@dataclass(frozen=True, slots=True)
class Decision:
    """The settings of a run, `auto` decided; ``told``: what was picked and why; "" for nothing."""

    settings: FinetuneSettings
    told: str
    way: Way | None = None


def decide(settings: FinetuneSettings, case: Case) -> Decision:
    """Pick a mode for `--memory auto`; refuse another one that does not fit.

    `auto` takes the first of `MODES` that fits, and of its ways the first. A model in floats is not
    quantised for it. On a CPU weights, gradients and optimizer states decide alone: what is kept
    for the backward pass differs there, and nothing else is given up.

    Args:
        settings: as asked for.
        case: the model, the data, the device.

    Raises:
        PlugError: the memory is too small; the message says for what, by how much, what would fit.
    """
    modes = _modes(settings, case)
    training = training_of(settings, case)
    if case.offload and case.host is not None:
        fitting = [mode for mode in modes if _host_bytes(case, mode, training) <= case.host]
        if not fitting:
            raise PlugError(_no_host_memory(case, modes[-1], training))
        modes = fitting
    accumulated = settings.gradient_accumulation_steps
    is_auto = settings.memory == "auto"
    if case.room is None or not case.on_gpu:
        for mode in modes:
            bare = replace(training, batch_size=1, source_length=1, target_length=1)
            if case.room is None or best_way(case.config, mode, bare, case.room):
                is_usual = mode == modes[0] or not is_auto
                return Decision(_applied(settings, mode), "" if is_usual else _picked(mode))
        raise PlugError(_too_small(settings, case, modes, training))
    for mode in modes:
        if is_auto:
            way = best_way(case.config, mode, training, case.room, accumulated)
        else:
            way = next(ways(case.config, mode, training, accumulated))
            if way.need.total > case.room:
                way = None
        if way is not None:
            return _decided(settings, case, mode, way)
    raise PlugError(_too_small(settings, case, modes, training))


def _host_bytes(case: Case, mode: Mode, training: Training) -> int:
    picked = replace(training, memory=mode.memory, optimizer=mode.optimizer, bits=mode.bits)
    return host_need(case.config, picked)


def _no_host_memory(case: Case, mode: Mode, training: Training) -> str:
    assert case.host is not None
    needed = _host_bytes(case, mode, training)
    return (
        f"offload 要把权重、梯度和优化器状态放在内存里：{mode.name} 约需"
        f" {gb(needed)} GB，空闲 {gb(case.host)} GB，差 {gb(needed - case.host)} GB。"
        "请换内存更大的机器、用 --memory lora，或不用 offload。"
    )


def _modes(settings: FinetuneSettings, case: Case) -> list[Mode]:
    """Those that the settings and the model leave, the best first."""
    half = settings.precision == "bf16" and case.on_gpu
    bits = _fused_bits(settings) if settings.is_fused else 32
    full = [Mode(memory="full", optimizer=settings.optimizer, bits=bits)]
    lora = Mode(memory="lora", bits=16 if half else 32)
    if settings.memory == "full":
        return full
    if settings.memory == "lora":
        return [lora]
    needs_all = settings.fgm or settings.from_scratch or settings.optimizer != "adamw"
    if case.bits is not None:
        if needs_all:
            raise UsageError(
                f"模型的权重是 {case.bits} 位整数，不能训练每个权重，"
                "而 fgm、from_scratch、adamw 之外的 optimizer 要训练它们。"
                "请去掉它，或用量化之前的模型。"
            )
        return [Mode(memory="qlora", bits=case.bits)]
    if settings.optimizer == "adamw" and settings.can_be_fused and not case.offload:
        if case.cards > 1 or settings.parallel.sharding == "fsdp":
            full.append(_shared_in_half(settings))
        elif case.processes == 1:
            full.append(Mode(memory="full", optimizer="adafactor", bits=_fused_bits(settings)))
    needs_lora = settings.rslora or settings.dora
    if needs_all and needs_lora:
        raise UsageError("rslora、dora 用于 LoRA，而 fgm、from_scratch、optimizer 要训练每个权重。")
    return [*([] if needs_lora else full), *([] if needs_all else [lora])]


def _shared_in_half(settings: FinetuneSettings) -> Mode:
    """Every weight, without a copy in float32, on several cards."""
    return Mode(memory="full", optimizer="adamw8bit_fused", bits=_fused_bits(settings))


def _fused_bits(settings: FinetuneSettings) -> int:
    return 16 if settings.precision == "bf16" else 32


def training_of(settings: FinetuneSettings, case: Case) -> Training:
    """Return what the settings say of a training step; its mode is left as it is by default."""
    training = Training(
        batch_size=settings.batch_size * (2 if settings.r_drop else 1),
        source_length=case.source_length,
        target_length=case.target_length,
        half=settings.precision == "bf16" and case.on_gpu,
        rank=settings.lora_rank,
        recomputed=settings.recomputed_layers,
        accumulates=settings.gradient_accumulation_steps > 1,
        dropout=case.config.hidden_dropout_prob > 0,
        cards=case.cards,
        reshards=settings.parallel.reshard_after_forward,
        offload=case.offload,
    )
    if settings.gradient_checkpointing and not settings.recomputed_layers:
        training = replace(training, recomputed=layers_in(case.config, training))
    return training


def _applied(settings: FinetuneSettings, mode: Mode) -> FinetuneSettings:
    return replace(settings, memory=mode.memory, optimizer=mode.optimizer)


def _decided(settings: FinetuneSettings, case: Case, mode: Mode, way: Way) -> Decision:
    """Apply a way to the settings, and say what it gives up."""
    assert case.room is not None
    training = way.training
    size = training.batch_size // (2 if settings.r_drop else 1)
    given_up = []
    if way.accumulated != settings.gradient_accumulation_steps:
        given_up.append(
            f"一步的 {settings.batch_size * settings.gradient_accumulation_steps} 个例子分"
            f" {way.accumulated} 批算，每批 {size} 个"
        )
    layers = layers_in(case.config, training)
    asked = layers if settings.gradient_checkpointing else settings.recomputed_layers
    if training.recomputed > asked:
        given_up.append(f"反向时重算 {layers} 层中的 {training.recomputed} 层")
    evaluated = evaluation_size(settings, case, way)
    if evaluated < settings.eval_batch_size:
        given_up.append(f"评测一次 {evaluated} 个例子（原为 {settings.eval_batch_size}）")
    decided = replace(
        _applied(settings, mode),
        batch_size=max(1, size),
        gradient_accumulation_steps=way.accumulated,
        eval_batch_size=evaluated,
    )
    if settings.memory == "auto":
        decided = replace(decided, recomputed_layers=training.recomputed)
    told = f"{_picked(mode)}预计显存峰值 {gb(way.need.total)} GB（空闲 {gb(case.room)} GB）。"
    if given_up:
        told += f"为了放得下：{'；'.join(given_up)}。"
    return Decision(decided, told, way)


def _picked(mode: Mode) -> str:
    return f"微调方式：{mode.name}。"


def evaluation_size(settings: FinetuneSettings, case: Case, way: Way) -> int:
    """Return how many examples an evaluation takes at once, so that its peak is below training's.

    `eval_batch_size`, or half of it, and so on. An encoder's task keeps the inside of a layer; a
    generation task has its caches.
    """
    training, size = way.training, settings.eval_batch_size
    while size > 1:
        if training.target_length:
            need = generation_need(
                case.config,
                weights=way.need.weights + way.need.optimizer,
                batch_size=size * settings.num_beams,
                source_length=settings.source_length,
                capacity=settings.target_length,
                bytes_per_value=training.stream,
                bits=training.bits,
            ).total
        else:
            inside = 8 * case.config.hidden_size + 2 * case.config.intermediate_size
            need = way.need.weights + way.need.optimizer
            need += size * settings.source_length * inside * training.stream
        if need <= way.need.total:
            break
        size //= 2
    return size


def _too_small(
    settings: FinetuneSettings, case: Case, modes: list[Mode], training: Training
) -> str:
    """Say what was asked, by how much it does not fit, and what would."""
    config, room = case.config, case.room
    assert room is not None
    accumulated = settings.gradient_accumulation_steps
    asked = modes[-1]
    if settings.memory == "auto":
        smallest = smallest_way(config, asked, training, accumulated)
        what = f"--memory auto 的各种方式都放不下，最省的 {asked.name}"
    else:
        smallest = next(ways(config, asked, training, accumulated), None)
        what = f"--memory {settings.memory} 放不下：{asked.name}、一批 {settings.batch_size} 个例子"
    assert smallest is not None
    needed = (
        smallest.need.with_overhead().total if settings.memory == "auto" else smallest.need.total
    )
    message = f"{what} 约需 {gb(needed)} GB，空闲 {gb(room)} GB，差 {gb(needed - room)} GB。"
    found = []
    if settings.memory != "auto":
        way = best_way(config, asked, training, room, accumulated)
        if way is not None:
            found.append(
                f"同样的方式，加上 {_options(settings, way)}，约需 {gb(way.need.total)} GB"
            )
        others = _modes(replace(settings, memory="auto"), case)
        fits = (each for each in others if best_way(config, each, training, room, accumulated))
        other = next((each for each in fits if each.memory != settings.memory), None)
        if other is not None:
            found.append(f"--memory auto（会用 {other.name}）")
    if case.cards > 1 and not case.offload:
        fused = _shared_in_half(settings)
        way = best_way(config, fused, training, room)
        if way is not None and settings.memory == "full" and settings.can_be_fused:
            words = f"--optimizer {fused.optimizer} {_options(settings, way)}".strip()
            found.append(f"{words}，约需 {gb(way.need.total)} GB")
        away = replace(training, offload=True)
        way = best_way(config, modes[0], away, room, accumulated)
        if way is not None:
            host = gb(host_need(config, way.training))
            found.append(
                f"{modes[0].name} 加上 --set parallel.cpu_offload=true，"
                f"显存约需 {gb(way.need.total)} GB、内存约需 {host} GB"
            )
    if case.bits is None and not (settings.fgm or settings.from_scratch):
        for bits in (8, 4):
            way = best_way(config, Mode(memory="qlora", bits=bits), training, room, accumulated)
            if way is not None:
                found.append(
                    f"先量化：plug quantize --model {settings.model} --bits {bits} --to 新目录，"
                    f"再用 --model 新目录 --memory qlora，约需 {gb(way.need.total)} GB"
                )
                break
    return message + (f"可以：{'；'.join(found)}。" if found else "请换显存更大的卡。")


def _options(settings: FinetuneSettings, way: Way) -> str:
    """The options of the command line that make a run go this way."""
    words = []
    size = way.training.batch_size // (2 if settings.r_drop else 1)
    if size != settings.batch_size:
        words.append(f"--batch-size {size}")
        words.append(f"--set gradient_accumulation_steps={way.accumulated}")
    if way.training.recomputed:
        words.append(f"--set recomputed_layers={way.training.recomputed}")
    return " ".join(words)


def gb(count: int) -> str:
    """Bytes in GB of 10^9, for messages."""
    return f"{count / 1e9:.1f}"

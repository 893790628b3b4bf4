"""The training loop of both stages: a plain PyTorch loop, the same in one process or several.

Each process makes its share of each batch, and gradients are summed. (With tensor parallelism a
few processes make one share together.) Batch, dropout and learning rate of a step depend on the
seed, the step and the share alone, so a resumed run is exact.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from time import monotonic, perf_counter

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader

from plug.distributed.fully_sharded import is_fully_sharded, run_forward
from plug.distributed.processes import Processes, Vote
from plug.errors import PlugError
from plug.interrupts import Interrupted, Interrupts, ignore_signals
from plug.model.plug import Plug
from plug.pretraining import losses as loss_functions
from plug.pretraining.batches import Batch, PalmBatches, StructBertBatches, global_batch_tokens
from plug.pretraining.gradients import Gradients
from plug.pretraining.masking import IGNORE_INDEX
from plug.pretraining.optimization import learning_rate_scale
from plug.pretraining.record import FIELDS, MORE_FIELDS, Record
from plug.pretraining.settings import RunConfig
from plug.pretraining.sharded import ShardedCheckpoints, ShardedGradients
from plug.pretraining.spikes import check_skipped, is_spike
from plug.pretraining.state import State
from plug.pretraining.watching import PROCESS_FIELDS, Meter, open_board
from plug.progress import StepProgress

logger = logging.getLogger(__name__)

Batches = StructBertBatches | PalmBatches
LossFunction = Callable[[Plug, Batch], dict[str, Tensor]]
LOSSES = {1: ["mlm", "word", "sentence"], 2: ["lm", "mlm"]}  # the columns of the log, by stage
_SAVE = 1  # a vote, below the number of any signal that we listen to


def train(state: State, batches: Batches, processes: Processes, output: Path) -> None:
    """Take the steps that are left, write the log, and save checkpoints into ``output``.

    Raises:
        Interrupted: a signal came; a checkpoint was saved.
        PlugError: a loss is no longer a number.
    """
    config, first = state.config, processes.is_first
    passed_over = {number - 1 for number in config.skip_steps}
    todo = [step for step in range(state.step, config.steps) if step not in passed_over]
    logs = _Logs(state, processes, output)
    loader = DataLoader(
        batches,
        batch_size=None,
        sampler=todo,
        num_workers=config.workers,
        pin_memory=processes.device.type == "cuda",
        worker_init_fn=ignore_signals,
    )
    gradients: Gradients | ShardedGradients
    checkpoints = None
    if is_fully_sharded(state.model):
        gradients = ShardedGradients(state.model, processes)
        checkpoints = ShardedCheckpoints(
            output, processes, config.keep_checkpoints, state.tokenizer
        )
        checkpoints.watch(state.optimizers)
    else:
        gradients = Gradients(state.model.named_parameters(), processes.world_size)
    vote = logs.vote
    schedule = _Schedule(config)
    with (
        closing(gradients),
        Interrupts() as interrupts,
        StepProgress(config.steps, state.step, first) as progress,
    ):
        for step, batch in zip(todo, logs.meter.batches(loader), strict=True):
            state.skipped += sorted(n for n in passed_over if state.step <= n < step)
            means, grad_norm = take_step(state, gradients, batch, processes, vote, step)
            state.step, state.tokens = (
                step + 1,
                state.tokens + global_batch_tokens(batch, config.batch_tokens),
            )
            if checkpoints is not None:
                checkpoints.look()
                if step == todo[0]:
                    checkpoints.prepare(state.model, state.optimizers)
            is_last = step == todo[-1]
            # One clock decides, and all stop at the same step.
            wish = interrupts.asked or (_SAVE if first and schedule.is_due(state.step) else 0)
            agreed = 0 if is_last else vote(wish)
            is_logged = state.step % config.log_every == 0 or is_last
            is_applied = step not in state.skipped[-1:]
            if is_logged or agreed:
                values = {name: float(mean) for name, mean in means.items()}
                if is_applied:
                    _check_finite({**values, "grad_norm": float(grad_norm)}, state.step)
            if is_logged:
                rate = logs.add(state, values, float(grad_norm))
                progress.update(state.step, rate, values)
            if agreed:
                logs.sync()  # the log reaches the disk before the checkpoint that counts on it
                if checkpoints is not None:
                    values = state.to_dict(processes)
                    waits = agreed > _SAVE
                    checkpoints.save(state.model, state.optimizers, values, waits=waits)
                elif first:
                    state.save(output, processes)
                schedule.saved()
            if agreed > _SAVE:
                if processes.world_size > 1:
                    dist.barrier()  # the launcher ends all processes when one has ended
                raise Interrupted(
                    f"已中断，第 {state.step} 步的检查点在 {output}。"
                    "用同样的命令加 --resume 接着训练。",
                    agreed,
                )
    state.skipped += sorted(n for n in passed_over if state.step <= n < config.steps)
    if checkpoints is not None:
        checkpoints.finish()
        checkpoints.close()
    logs.close()


class _Logs:
    """What the run writes down of itself; the first process writes, all measure."""

    def __init__(self, state: State, processes: Processes, output: Path) -> None:
        self.vote = Vote(processes.world_size)
        self.meter = Meter(state.model.config, processes.device)
        self._log = self._processes = self._board = None
        if processes.is_first:
            fields = [*FIELDS, *LOSSES[state.stage], *MORE_FIELDS]
            self._log = Record(output / "log.csv", fields, state.step)
            if processes.world_size > 1:
                self._processes = Record(output / "processes.csv", PROCESS_FIELDS, state.step)
            if state.config.tensorboard:
                self._board = open_board(str(output / "tensorboard"), state.step)
        self._before = self._log.seconds_before if self._log else 0.0
        self._began = self._since = perf_counter()
        self._tokens = state.tokens

    def add(self, state: State, losses: dict[str, float], grad_norm: float) -> float:
        """Write a row of the log; called by all processes. Returns the tokens a second."""
        measured = self.meter.read()
        everyone = self.vote.gather(list(measured.values()))
        now = perf_counter()
        rate = (state.tokens - self._tokens) / (now - self._since)
        self._since, self._tokens = now, state.tokens
        if self._log is None:
            return rate
        row = {
            "step": state.step,
            "tokens": state.tokens,
            "seconds": round(self._before + now - self._began, 2),
            "tokens_per_second": round(rate),
            "learning_rate": state.optimizers[0].param_groups[0]["lr"],
            "grad_norm": float(f"{grad_norm:.7g}"),  # all digits that float32 has
            **{name: round(value, 6) for name, value in losses.items()},
            **{name: measured[name] for name in ("mfu", "memory_gb", "data_wait")},
            "skipped": len(state.skipped),
        }
        self._log.add(row)
        if self._processes is not None:
            for number, values in enumerate(everyone):
                named = dict(zip(measured, values, strict=True))
                self._processes.add({"step": state.step, "process": number, **named})
        if self._board is not None:
            for name in row.keys() - {"step"}:
                self._board.add_scalar(name, row[name], state.step)
        return rate

    def sync(self) -> None:
        for each in (self._log, self._processes):
            if each is not None:
                each.sync()
        if self._board is not None:
            self._board.flush()

    def close(self) -> None:
        if self._board is not None:
            self._board.close()


class _Schedule:
    """When a checkpoint is due: after so many steps, or so many minutes since the last."""

    def __init__(self, config: RunConfig) -> None:
        self.every = config.checkpoint_every
        self.seconds = 60 * config.checkpoint_minutes or math.inf
        self.last = monotonic()

    def is_due(self, step: int) -> bool:
        return step % self.every == 0 or monotonic() - self.last >= self.seconds

    def saved(self) -> None:
        self.last = monotonic()


def take_step(
    state: State,
    gradients: Gradients | ShardedGradients,
    batch: Batch,
    processes: Processes,
    vote: Vote,
    step: int,
) -> tuple[dict[str, Tensor], Tensor]:
    """Take optimiser step number ``step`` (from 0), unless its gradient is a spike.

    Returns:
        The mean losses by name, and the gradient's norm; left on the device.
    """
    config, device = state.config, processes.device
    losses: LossFunction = (
        loss_functions.structbert_losses if state.stage == 1 else loss_functions.palm_losses
    )
    # Dropout depends on the step and the share of the batch, so that a resumed run repeats it.
    # Processes that compute a share together drop the same values of it; the heads that each of
    # them has lose the same attention probabilities.
    torch.manual_seed((config.seed * 1_000_003 + step) * 4099 + processes.data_rank)
    batch = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
    names, counts = _count(batch, processes)
    sums = torch.zeros_like(counts)
    is_sharded = isinstance(gradients, ShardedGradients)
    # Sharded layers are gathered by all processes together, as often.
    least = vote(part_count(batch, config.micro_batch_tokens)) if is_sharded else 1
    # FSDP2 gathers weights in bf16: autocast would but make norms write float32.
    casts = config.precision == "bf16" and not is_sharded
    parts = list(split(batch, config.micro_batch_tokens, least))
    for number, part in enumerate(parts, start=1):
        with torch.autocast(device.type, torch.bfloat16, enabled=casts):
            part_sums = run_forward(state.model, partial(losses, state.model, part))
        together = torch.stack([part_sums[name] for name in names])
        gradients.begin(is_last=number == len(parts))
        # FSDP2 takes the mean over the shares where `Gradients` takes the sum.
        factor = processes.data_size if is_sharded else 1
        ((together / counts).sum() * factor).backward()
        sums += together.detach()
    waiting = dist.all_reduce(sums, async_op=True) if processes.world_size > 1 else None
    grad_norm = gradients.finish(config.clip_grad_norm)
    if config.skip_spikes and vote(
        int(is_spike(float(grad_norm), state.norms, config.skip_spikes))
    ):
        if processes.is_first:
            what = "远大于平常" if math.isfinite(grad_norm) else "不是有限的数"
            logger.warning("第 %d 步的梯度范数 %.4g %s，跳过这一步。", step + 1, grad_norm, what)
        state.skipped.append(step)
        check_skipped(state.skipped, step)
    else:
        _apply(state, step)
    gradients.clear()
    if waiting is not None:
        waiting.wait()
        sums /= processes.tensor  # so many have computed each share
    return dict(zip(names, (sums / counts).unbind(), strict=True)), grad_norm


def _apply(state: State, step: int) -> None:
    """Change the weights by the gradients that they have."""
    config = state.config
    warmup = round(config.warmup_fraction * config.steps)
    scale = learning_rate_scale(step, config.steps, warmup, config.schedule)
    for optimizer in state.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * scale
        optimizer.step()


def _count(batch: Batch, processes: Processes) -> tuple[list[str], Tensor]:
    """The names of the losses, and the predictions of each in all processes; at least 1.

    A count is 0 where no trigram was free to be shuffled.
    """
    counted = loss_functions.prediction_counts(batch)
    counts = torch.stack(list(counted.values())).float()
    if processes.world_size > 1:
        dist.all_reduce(counts)
        counts /= processes.tensor  # so many have the same share
    return list(counted), counts.clamp(min=1)


def part_count(batch: Batch, micro_batch_tokens: int) -> int:
    """Return how many parts a batch is computed in: one row at least, else so many tokens."""
    rows = len(batch["input_ids"])
    return -(-rows // _part_size(batch, micro_batch_tokens))


def _part_size(batch: Batch, micro_batch_tokens: int) -> int:
    rows = len(batch["input_ids"])
    tokens = sum(batch[k].numel() for k in ("input_ids", "decoder_input_ids") if k in batch)
    return -(-rows // min(rows, -(-tokens // micro_batch_tokens)))


def split(batch: Batch, micro_batch_tokens: int, least: int = 1) -> Iterator[Batch]:
    """Yield the batch in `part_count` parts, or in ``least`` if that is more.

    If there are fewer rows than parts, the last parts are a row from which nothing is predicted.
    """
    rows = len(batch["input_ids"])
    size = _part_size(batch, micro_batch_tokens)
    if least > part_count(batch, micro_batch_tokens):
        pieces = min(least, rows)
        parted = {name: tensor.tensor_split(pieces) for name, tensor in batch.items()}
        for index in range(pieces):
            yield {name: each[index] for name, each in parted.items()}
        yield from [_nothing(batch)] * (least - pieces)
        return
    for start in range(0, rows, size):
        yield {name: tensor[start : start + size] for name, tensor in batch.items()}


def _nothing(batch: Batch) -> Batch:
    """A row from which nothing is predicted."""
    labels = loss_functions.LABELS.values()
    row = {name: tensor[:1].clone() for name, tensor in batch.items()}
    return {
        name: tensor.fill_(IGNORE_INDEX) if name in labels else tensor
        for name, tensor in row.items()
    }


def _check_finite(values: dict[str, float], step: int) -> None:
    broken = [name for name, value in values.items() if not math.isfinite(value)]
    if broken:
        raise PlugError(
            f"第 {step} 步的 {'、'.join(broken)} 不再是有限的数。"
            "请降低 learning_rate 或加大 warmup_fraction，换一个 output 重新训练。"
        )

"""What a run tells of itself: speed, share of the card's speed, memory, time spent on waiting."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from time import perf_counter
from typing import Any

import torch

from plug.errors import UsageError
from plug.model.accounting import training_flops
from plug.model.configuration import PlugConfig
from plug.pretraining.batches import Batch

# The columns of `processes.csv`, a row for each process and row of the log.
PROCESS_FIELDS = ["step", "process", "tokens_per_second", "mfu", "memory_gb", "data_wait"]


class Meter:
    """Measures one process between two rows of the log.

    Args:
        config: the shape of the model.
        device: of this process.
    """

    def __init__(self, config: PlugConfig, device: torch.device) -> None:
        self._config, self._device = config, device
        self._peak = measured_product(device) if device.type == "cuda" else 0.0
        self._start()

    def _start(self) -> None:
        self._since, self._waited, self._tokens, self._flops = perf_counter(), 0.0, 0, 0

    def batches(self, loader: Iterable[Batch]) -> Iterator[Batch]:
        """Yield the loader's batches, and note how long it was waited for and what is in them."""
        iterator = iter(loader)
        while True:
            began = perf_counter()
            batch = next(iterator, None)
            self._waited += perf_counter() - began
            if batch is None:
                return
            self._tokens += sum(
                batch[name].numel() for name in ("input_ids", "decoder_input_ids") if name in batch
            )
            self._flops += batch_flops(self._config, batch)
            yield batch

    def read(self) -> dict[str, float]:
        """Return what `PROCESS_FIELDS` names but the first two, and begin anew.

        `mfu` is 0 where there is no card to compare with.
        """
        seconds = perf_counter() - self._since
        is_card = self._device.type == "cuda"
        read = {
            "tokens_per_second": round(self._tokens / seconds),
            "mfu": round(self._flops / seconds / self._peak, 4) if self._peak else 0.0,
            "memory_gb": round(torch.cuda.max_memory_allocated() / 1e9, 3) if is_card else 0.0,
            "data_wait": round(self._waited / seconds, 4),
        }
        self._start()
        return read


def batch_flops(config: PlugConfig, batch: Batch) -> int:
    """Operations of a training step on a process's share of a batch, its masked-LM head's too."""
    rows, source = batch["input_ids"].shape
    target = batch["decoder_input_ids"].shape[1] if "decoder_input_ids" in batch else 0
    layers = rows * training_flops(config, source, target, every_parameter=True)
    predicted = sum(batch[n].numel() for n in ("mlm_labels", "word_labels") if n in batch)
    hidden = config.hidden_size
    return layers + 3 * 2 * predicted * hidden * (hidden + config.vocab_size)


def measured_product(device: torch.device, size: int = 8192, times: int = 10) -> float:
    """Return the operations a second of a large product in bf16 on this very card."""
    left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    for _ in range(3):
        left @ right
    events[0].record()
    for _ in range(times):
        left @ right
    events[1].record()
    torch.cuda.synchronize(device)
    return times * 2 * size**3 / (events[0].elapsed_time(events[1]) / 1e3)


def check_board() -> None:
    """Raise a `UsageError` if TensorBoard is not installed (extra `tensorboard`)."""
    if find_spec("tensorboard") is None:
        raise UsageError(
            'tensorboard=true 要用的 TensorBoard 没有安装。请 pip install "plug-zh[tensorboard]"，'
            "或去掉这项设置：log.csv 里有同样的数。"
        )


def open_board(directory: str, resume_step: int) -> Any:
    """Return a `SummaryWriter` of TensorBoard; what it wrote after ``resume_step`` is dropped."""
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(directory, purge_step=resume_step + 1)

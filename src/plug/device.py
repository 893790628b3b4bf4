"""Where a model runs, from what a user typed; by which means; and what happens without memory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from plug.errors import PlugError, UsageError


def find_device(name: str | None = None) -> torch.device:
    """The device called ``name`` ("cpu", "cuda", "cuda:1", …); None is CUDA where there is one.

    Raises:
        UsageError: no such device on this machine.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError):
        raise UsageError(
            f"这台机器上用不了设备 {name!r}。请用 cpu，或已装好驱动的 cuda。"
        ) from None
    return device


@cache
def has_kernels(device: torch.device) -> bool:
    """Whether `plug.kernels` run there: NVIDIA, compute capability 8.0 or more, with Triton.

    Triton comes with PyTorch for CUDA on Linux. Without them PyTorch's functions do the same.
    """
    return (
        device.type == "cuda"
        and torch.version.hip is None
        and torch.cuda.get_device_capability(device) >= (8, 0)
        and find_spec("triton") is not None
    )


@contextlib.contextmanager
def explain_out_of_memory(device: torch.device, batch_size: int) -> Iterator[None]:
    """Turn the error of a device without memory into a `PlugError` that says what to do."""
    try:
        yield
    except torch.cuda.OutOfMemoryError:
        all_of_it = torch.cuda.get_device_properties(device).total_memory
        used = torch.cuda.memory_allocated(device)
        torch.cuda.empty_cache()
        smaller = (
            f"请用 --batch-size {max(1, batch_size // 2)}（现在 {batch_size}）"
            if batch_size > 1
            else "请用更短的 --window，或量化过的模型（plug quantize），或 --device-map auto"
        )
        raise PlugError(
            f"{device} 的显存用完了：共 {all_of_it / 1e9:.1f} GB，"
            f"本程序占着 {used / 1e9:.1f} GB。{smaller}。"
        ) from None


def send(values: Sequence[Any] | Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return ``values`` of the host on ``device``: numbers, or lists of them, of equal length.

    The host does not wait for what a GPU has to do before; a copy from ordinary memory would.
    """
    found = torch.as_tensor(values, dtype=dtype)
    if device.type == "cuda":
        found = found.pin_memory()
    return found.to(device, non_blocking=True)

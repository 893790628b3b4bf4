"""Where a model runs, from what a user typed, and by which means."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import torch

from plug.errors import UsageError


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

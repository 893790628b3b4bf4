"""Where a model runs, from what a user typed."""

from __future__ import annotations

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

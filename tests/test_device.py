"""Which devices have which means; cards that are not here are told of."""

from __future__ import annotations

import pytest
import torch

from plug import device as devices
from plug.errors import UsageError


def test_a_device_that_is_not_here_is_an_error() -> None:
    assert devices.find_device("cpu") == torch.device("cpu")
    for name in ("cuda:99", "tpu"):
        with pytest.raises(UsageError, match=f"用不了设备 '{name}'"):
            devices.find_device(name)


@pytest.mark.parametrize(
    ("capability", "hip", "triton", "expected"),
    [
        ((9, 0), None, True, True),
        ((8, 0), None, True, True),
        ((7, 5), None, True, False),  # T4: no m16n8k16
        ((9, 0), None, False, False),  # Windows
        ((9, 4), "6.4", True, False),  # AMD
    ],
)
def test_kernels_need_an_nvidia_card_of_80_and_triton(
    capability: tuple[int, int],
    hip: str | None,
    triton: bool,
    expected: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(devices, "find_spec", lambda _: object() if triton else None)
    has_kernels = devices.has_kernels.__wrapped__  # without its memory

    assert has_kernels(torch.device("cuda")) is expected
    assert not has_kernels(torch.device("cpu"))

"""Kernels are tested on the GPU where there is one, else on the CPU (`tests/conftest.py`)."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def generator(device: str) -> torch.Generator:
    return torch.Generator(device).manual_seed(0)


@pytest.fixture(autouse=True)
def _on_the_device(device: str) -> Iterator[None]:
    """Tensors that a test makes are on the device."""
    with torch.device(device):
        yield

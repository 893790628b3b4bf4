"""Without a GPU, the Triton kernels run on the CPU, by Triton's own interpreter."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined


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

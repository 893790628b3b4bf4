"""These kernels run on the CPU, also where there is a GPU."""

from __future__ import annotations

import pytest


@pytest.fixture
def device() -> str:
    return "cpu"

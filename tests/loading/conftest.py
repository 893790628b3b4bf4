"""A saved model, and what it must be after loading."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from plug.loading.save import save
from plug.model.plug import Plug


@pytest.fixture
def saved(tiny_model: Plug, tmp_path: Path) -> Path:
    directory = tmp_path / "saved"
    save(tiny_model, directory, tokenizer=None)
    return directory


@pytest.fixture
def assert_same_bits() -> Callable[[Plug, Plug], None]:
    """Two models have the same tensors, to the bit."""

    def check(actual: Plug, expected: Plug) -> None:
        wanted = expected.state_dict()
        found = actual.state_dict()
        assert found.keys() == wanted.keys()
        for name, tensor in wanted.items():
            assert found[name].dtype == tensor.dtype, name
            assert torch.equal(found[name], tensor), name

    return check

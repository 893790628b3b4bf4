from __future__ import annotations

import importlib
import os
import subprocess
import sys

import pytest

import plug


def seconds(*arguments: str) -> float:
    """Of the processor, the least of several runs: the machine may be busy with something else."""
    times = []
    for _ in range(5):
        before = os.times()
        subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
        after = os.times()
        times.append(
            after.children_user
            - before.children_user
            + after.children_system
            - before.children_system
        )
    return min(times)


def test_import_plug_takes_under_300_ms() -> None:
    assert seconds("-c", "import plug") < 0.3


def test_plug_help_takes_under_700_ms() -> None:
    assert seconds("-m", "plug", "--help") < 0.7


@pytest.mark.parametrize(
    "code",
    ["import plug", "import plug.cli", "import plug; plug.PlugConfig, plug.UsageError"],
)
def test_torch_is_imported_only_when_needed(code: str) -> None:
    check = "import sys; print([m for m in ('torch', 'numpy', 'transformers') if m in sys.modules])"
    ran = subprocess.run([sys.executable, "-c", f"{code}\n{check}"], capture_output=True, text=True)
    assert ran.stdout == "[]\n", ran.stderr


@pytest.mark.parametrize("name", plug.__all__)
def test_a_public_name_is_the_one_its_home_defines(name: str) -> None:
    assert name in dir(plug)
    value = getattr(plug, name)
    if name != "__version__":
        assert value is getattr(importlib.import_module(plug._HOMES[name]), name)
        assert getattr(value, "__module__", "plug").startswith("plug")


def test_an_unknown_public_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="PlugX"):
        _ = plug.PlugX

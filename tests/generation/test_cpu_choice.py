"""What is fastest here: measured once, kept, and measured again where that is of no use."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from plug.generation import cpu_choice
from plug.generation.cpu_model import CpuModel
from plug.kernels.cpu.build import library, library_file


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(cpu_choice, "_known", {})
    return


def candidates(**milliseconds: float) -> dict[str, Callable[[], Callable[[], object]]]:
    def taking(duration: float) -> Callable[[], Callable[[], object]]:
        return lambda: lambda: time.sleep(duration / 1000)

    return {name: taking(each) for name, each in milliseconds.items()}


def forget() -> None:
    """As a new process."""
    cpu_choice._known.clear()


def test_what_was_measured_is_kept_for_the_next_process() -> None:
    assert cpu_choice._fastest("step", candidates(kernels=20, pytorch=1)) == "pytorch"
    forget()
    assert cpu_choice._fastest("source", candidates(kernels=1, pytorch=20)) == "kernels"
    forget()
    assert cpu_choice._fastest("step", candidates(kernels=1, pytorch=20)) == "pytorch"


@pytest.mark.parametrize(
    "content",
    ["{", "[]", '{"torch": 3}', '{"torch": "0.1", "milliseconds": {"step": {"kernels": 1}}}'],
)
def test_a_damaged_or_old_file_is_measured_again(content: str) -> None:
    path = library_file().with_suffix(".json")
    path.parent.mkdir(parents=True)
    path.write_text(content)

    assert cpu_choice._fastest("step", candidates(kernels=20, pytorch=1)) == "pytorch"
    assert json.loads(path.read_text())["torch"] == torch.__version__


def test_a_near_tie_is_for_the_kernels() -> None:
    path = library_file().with_suffix(".json")
    path.parent.mkdir(parents=True)
    times = {"step": {"kernels": 1.0, "pytorch": 0.9}}
    path.write_text(json.dumps({"torch": torch.__version__, "milliseconds": times}))

    assert cpu_choice._fastest("step", candidates(kernels=1, pytorch=1)) == "kernels"


def test_a_cache_that_cannot_be_written_does_not_matter(tmp_path: Path) -> None:
    (tmp_path / "plug").write_text("no directory")

    assert cpu_choice._fastest("step", candidates(kernels=20, pytorch=1)) == "pytorch"


@pytest.mark.skipif(library() is None, reason="needs a C++ compiler")
def test_each_candidate_runs() -> None:
    names = {cpu_choice.KERNELS, cpu_choice.PYTORCH, cpu_choice.BFLOAT16}

    assert cpu_choice.fastest_step(CpuModel) in names
    assert cpu_choice.fastest_source() in names
    assert set(cpu_choice._kept()) == {"step", "source"}

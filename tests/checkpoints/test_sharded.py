"""Checkpoints that threads copy and write while their tensors change."""

from __future__ import annotations

import errno
import json
import pickle
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint import metadata as torch_metadata

from plug.checkpoints import sharded
from plug.checkpoints.sharded import Copier, begin_sharded, read_sharded, write_sharded
from plug.errors import PlugError


@pytest.fixture
def group() -> Iterator[dist.ProcessGroup]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.new_group(backend="gloo")
    dist.destroy_process_group()


@pytest.fixture
def copier() -> Iterator[Copier]:
    made = Copier(torch.device("cpu"))
    yield made
    made.close()


def write_beside(directory: Path) -> None:
    (directory / "state.json").write_text(json.dumps({"step": 3}))


def test_what_changes_after_the_copy_is_not_written(
    group: dist.ProcessGroup, copier: Copier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Copy and write wait until they are let go: twice, since the copier is used again."""
    gates = {"copy": threading.Event(), "write": threading.Event()}
    copy, write = Copier._copy, sharded.FileSystemWriter.write_data

    def late_copy(*arguments: Any) -> Any:
        assert gates["copy"].wait(30)
        return copy(*arguments)

    def late_write(*arguments: Any) -> Any:
        assert gates["write"].wait(30)
        return write(*arguments)

    monkeypatch.setattr(Copier, "_copy", late_copy)
    monkeypatch.setattr(sharded.FileSystemWriter, "write_data", late_write)
    tensors = {"weight": torch.ones(4, 6), "step": torch.tensor(1.0), "rate": 0.5}
    for number in (1, 2):
        place = tmp_path / f"step-{number}"
        writing = begin_sharded(place, tensors, group, write_beside, copier)
        gates["copy"].set()
        writing.wait_for_copy()
        assert not place.exists()
        tensors["weight"] += 1.0
        gates["write"].set()
        writing.finish()
        found = {"weight": torch.zeros(4, 6), "step": torch.tensor(0.0), "rate": 0.0}
        read_sharded(place, found)
        assert torch.equal(found["weight"], torch.full((4, 6), float(number)))
        assert found["rate"] == 0.5
        for gate in gates.values():
            gate.clear()
        assert json.loads((place / "state.json").read_text()) == {"step": 3}


def test_a_copy_that_fails_is_told_of_at_the_end(
    group: dist.ProcessGroup, copier: Copier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sharded.FileSystemWriter, "write_data", fail)
    writing = begin_sharded(
        tmp_path / "step-1", {"weight": torch.ones(2)}, group, write_beside, copier
    )
    writing.wait_for_copy()
    with pytest.raises(PlugError, match="step-1"):
        writing.finish()
    assert not (tmp_path / "step-1").exists()


def test_a_full_disk_before_the_tensors_leaves_no_checkpoint(
    group: dist.ProcessGroup, copier: Copier, tmp_path: Path
) -> None:
    """An earlier build gave the files that were there the checkpoint's name."""

    def fill_the_disk(directory: Path) -> None:
        write_beside(directory)
        raise OSError(28, "No space left on device")

    place, tensors = tmp_path / "step-1", {"weight": torch.ones(4, 6)}
    with pytest.raises(PlugError, match="No space left on device"):
        begin_sharded(place, tensors, group, fill_the_disk, copier)
    assert not place.exists()
    begin_sharded(place, tensors, group, write_beside, copier).finish()  # now there is room
    assert json.loads((place / "state.json").read_text()) == {"step": 3}


@pytest.mark.parametrize("failing", range(10))
def test_no_thread_s_error_is_lost(
    failing: int,
    group: dist.ProcessGroup,
    copier: Copier,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fill_up(tensor: Tensor, *arguments: Any, **options: Any) -> None:
        if len(tensor) == 1 + failing:
            raise OSError(errno.ENOSPC, "No space left on device")
        save(tensor, *arguments, **options)

    save = torch.save
    monkeypatch.setattr(torch, "save", fill_up)
    tensors = {str(number): torch.ones(1 + number, 2) for number in range(10)}
    writing = begin_sharded(tmp_path / "step", tensors, group, write_beside, copier)

    with pytest.raises(PlugError, match="No space left"):
        writing.finish()
    assert not (tmp_path / "step").exists()


@pytest.mark.parametrize("waits", [False, True])
def test_a_full_disk_names_the_checkpoint_and_no_offset(
    waits: bool,
    group: dist.ProcessGroup,
    copier: Copier,
    full_disk: Callable[[int], AbstractContextManager[None]],
    tmp_path: Path,
) -> None:
    """Torch's writer says no more than "unexpected pos 704 vs 598"."""
    place, tensors = tmp_path / "step-1", {"weight": torch.ones(100, 600)}
    message = re.escape(f"没能写入 {place}：文件没有写完，磁盘可能已满。")

    def write() -> None:
        if waits:
            write_sharded(place, tensors)
        else:
            begin_sharded(place, tensors, group, write_beside, copier).finish()

    with full_disk(20_000), pytest.raises(PlugError, match=message):
        write()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("group")
def test_what_python_3_11_2_wrote_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Debian 12 has it: enums are pickled as getattr(class, name); not so by 3.11.7 and 3.12.1."""
    monkeypatch.setattr(
        torch_metadata._MEM_FORMAT_ENCODING,
        "__reduce_ex__",
        lambda self, _: (getattr, (type(self), self.name)),
    )
    write_sharded(tmp_path / "step", {"weight": torch.ones(2, 3)})
    assert b"getattr" in (tmp_path / "step" / ".metadata").read_bytes()

    found = {"weight": torch.zeros(2, 3)}
    read_sharded(tmp_path / "step", found)

    assert torch.equal(found["weight"], torch.ones(2, 3))


class _Looked:
    """Pickled as a look at another class than that enum."""

    def __reduce__(self) -> Any:
        return getattr, (torch_metadata.Metadata, "__init__")


@pytest.mark.usefixtures("group")
def test_no_other_attribute_is_looked_up(tmp_path: Path) -> None:
    write_sharded(tmp_path / "step", {"weight": torch.ones(2, 3)})
    (tmp_path / "step" / ".metadata").write_bytes(pickle.dumps(_Looked()))

    with pytest.raises(PlugError, match="step 已损坏"):
        read_sharded(tmp_path / "step", {"weight": torch.zeros(2, 3)})

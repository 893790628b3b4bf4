from __future__ import annotations

import argparse
import enum
import os
import pickle
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from plug.checkpoints.original_shards import open_shard
from plug.checkpoints.torch_files import Foreign, read_torch_file
from plug.errors import PlugError


class Colour(enum.Enum):
    RED = 1


class Scaler:
    def __init__(self) -> None:
        self.scale, self.history = 2.0**16, [1, 2]


def tensors() -> dict[str, Tensor]:
    torch.manual_seed(0)
    flat = torch.randn(60)
    table = torch.randn(7, 3)
    return {
        "plain": torch.randn(4, 5),
        "half": torch.randn(3, 3).half(),
        "bfloat16": torch.randn(2, 9).bfloat16(),
        "integers": torch.arange(11),
        "slice": flat[7:27].view(4, 5),
        "columns": flat.view(6, 10)[:, 2:5],
        "transposed": torch.randn(3, 8).t(),
        "table": table,
        "tied": table,
        "parameter": nn.Parameter(torch.randn(5)),
        "scalar": torch.tensor(3.0),
        "empty": torch.empty(0, 4),
    }


@pytest.mark.parametrize("is_zip", [True, False])
def test_tensors_are_those_that_torch_reads(is_zip: bool, tmp_path: Path) -> None:
    path = tmp_path / "shard.pt"
    state = OrderedDict(tensors())
    state._metadata = {"": {"version": 1}}  # type: ignore[attr-defined]  # as nn.Module does
    torch.save({"module": state}, path, _use_new_zipfile_serialization=is_zip)

    found = open_shard(path).tensors

    expected = torch.load(path, weights_only=True)["module"]
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name
    assert found["table"].data_ptr() == found["tied"].data_ptr()


@pytest.mark.parametrize("is_zip", [True, False])
def test_objects_beside_the_tensors_are_named_and_do_nothing(is_zip: bool, tmp_path: Path) -> None:
    path = tmp_path / "shard.pt"
    beside = {
        "args": argparse.Namespace(lr=1e-5),
        "random": np.random.RandomState(0).get_state(),
        "scaler": Scaler(),
        "colour": Colour.RED,
        "places": {Path("a"), Path("b")},
        "device": torch.device("cpu"),
        "counts": {1, 2},
        "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}},
    }
    torch.save(
        {"module": tensors(), **beside, "mp_world_size": 2},
        path,
        _use_new_zipfile_serialization=is_zip,
    )

    shard = open_shard(path)

    assert torch.equal(shard.tensors["plain"], tensors()["plain"])
    assert shard.world_size == 2
    assert "argparse.Namespace" in shard.foreign
    assert any(name.endswith(".Scaler") for name in shard.foreign)
    assert isinstance(read_torch_file(path, "module").content["scaler"], Foreign)


def test_an_object_among_the_tensors_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "shard.pt"
    torch.save({"module": {**tensors(), "more": argparse.Namespace(lr=1)}}, path)

    with pytest.raises(PlugError, match=r"'more' 是 argparse\.Namespace 对象.*没有损坏") as caught:
        open_shard(path)

    assert "重新取得" not in str(caught.value)


class Calls:
    """Unpickled, it would call what it is told to."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.called = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.called


def test_nothing_is_imported_or_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "shard.pt"
    torch.save({"module": tensors(), "a": Calls(os.mkdir, "ran"), "b": Calls(exec, "1/0")}, path)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content.replace(b"c__builtin__\nexec\n", b"cthis\nimported\n"))
    sys.modules.pop("this", None)

    shard = open_shard(path)

    assert not (tmp_path / "ran").exists()
    assert "this" not in sys.modules
    assert "this.imported" in shard.foreign


def _claim(module: dict[str, Tensor]) -> Callable[[Path], None]:
    return lambda path: torch.save({"module": module}, path)


def _pickle(content: bytes) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("shard/data.pkl", content)

    return write


@pytest.mark.parametrize(
    ("write", "says"),
    [
        (_claim({"a": torch.zeros(1).expand(2**20, 2**14)}), "重叠"),
        (_claim({str(i): torch.zeros(9)[:8] for i in range(9)}), None),
        (
            _claim(dict(zip("abcdefgh", torch.zeros(99999).unfold(0, 90000, 1), strict=False))),
            "称有",
        ),
        # Indices and lengths for which Python's reader in C would reserve memory at once.
        (_pickle(b"\x80\x02]r\xff\xff\xff\x7f."), None),
        (_pickle(b"\x80\x04\x8e" + (2**40).to_bytes(8, "little") + b"abc."), "EOF|pickle"),
        (_pickle(b""), "EOF"),
        (_pickle(b"\x80\x02" + b"(" * 100_000 + b"t" * 100_000 + b"."), "module"),
        (lambda path: path.write_bytes(b"nothing of the kind"), "损坏"),
        (lambda path: path.write_bytes(pickle.dumps({"module": {}})), "torch.save"),
        (os.mkfifo, "普通文件"),
        (Path.mkdir, "普通文件"),
    ],
)
def test_what_a_file_claims_is_checked_before_memory_is_taken(
    write: Callable[[Path], object], says: str | None, tmp_path: Path
) -> None:
    path = tmp_path / "shard.pt"
    write(path)

    if says is None and path.stat().st_size > 1000:
        assert open_shard(path).tensors["3"].sum() == 0
        return
    with pytest.raises(PlugError, match=says) as caught:
        open_shard(path)

    assert "\n" not in str(caught.value)

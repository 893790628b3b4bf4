from __future__ import annotations

from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor

from plug.checkpoints.headers import locate_weights
from plug.checkpoints.weights import Place
from plug.errors import PlugError
from plug.loading.transfer import Part, Transfer

CPU = torch.device("cpu")
TENSORS = {
    "table": torch.randn(37, 12, generator=torch.Generator().manual_seed(0)),
    "norm": torch.arange(50.0).bfloat16(),
    "packed": torch.arange(60, dtype=torch.uint8).view(6, 10),
}


@pytest.fixture
def places(tmp_path: Path) -> dict[str, Place]:
    safetensors.torch.save_file(TENSORS, tmp_path / "model.safetensors")
    return locate_weights(tmp_path, {name: tuple(x.shape) for name, x in TENSORS.items()})


@pytest.mark.parametrize("piece_bytes", [8, 100, 2**20])  # less than a row, some rows, all
@pytest.mark.parametrize(
    ("name", "region"),
    [
        ("table", ()),
        ("table", (slice(5, 31),)),
        ("table", (slice(None), slice(4, 9))),
        ("table", (slice(3, 36), slice(11, 12))),
        ("norm", ()),
        ("norm", (slice(7, 33),)),
        ("packed", (slice(None), slice(0, 5))),
    ],
)
def test_a_region_is_what_slicing_gives(
    name: str, region: tuple[slice, ...], piece_bytes: int, places: dict[str, Place]
) -> None:
    expected = TENSORS[name][region]
    target = torch.full(expected.shape, 77, dtype=expected.dtype)

    with Transfer(CPU, threads=3, piece_bytes=piece_bytes) as transfer:
        transfer.fill([Part(places[name], target, region)])

    assert target.equal(expected)


def test_many_tensors_at_once_become_the_dtypes_asked_for(places: dict[str, Place]) -> None:
    targets = {name: torch.zeros(x.shape, dtype=torch.float32) for name, x in TENSORS.items()}
    with Transfer(CPU, piece_bytes=16) as transfer:
        begun = transfer.begin(Part(places[name], x) for name, x in targets.items())
        transfer.finish(begun)

    assert all(targets[name].equal(x.float()) for name, x in TENSORS.items())


@pytest.mark.gpu
@pytest.mark.parametrize("piece_bytes", [2**12, 2**22])
def test_on_a_gpu_buffers_are_not_filled_again_too_early(tmp_path: Path, piece_bytes: int) -> None:
    tensors: dict[str, Tensor] = {f"{n}": torch.randn(1000, 1024) for n in range(8)}
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors")
    places = locate_weights(tmp_path, dict.fromkeys(tensors, (1000, 1024)))
    device = torch.device("cuda")
    half = slice(None), slice(512, 1024)
    targets = {name: torch.empty(1000, 512, device=device) for name in tensors}

    with Transfer(device, piece_bytes=piece_bytes) as transfer:
        transfer.fill(Part(places[name], targets[name], half) for name in tensors)

    assert all(targets[name].cpu().equal(x[half]) for name, x in tensors.items())


def test_a_file_that_ends_too_early_is_named(places: dict[str, Place]) -> None:
    file = places["norm"].file
    file.write_bytes(file.read_bytes()[:-70])
    targets = {name: torch.empty(x.shape, dtype=x.dtype) for name, x in TENSORS.items()}

    with Transfer(CPU) as transfer, pytest.raises(PlugError, match=r"model.safetensors 已损坏"):
        transfer.fill(Part(places[name], x) for name, x in targets.items())

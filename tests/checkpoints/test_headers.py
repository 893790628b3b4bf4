"""A header must account for every byte, and the index for every tensor."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from plug.checkpoints.headers import locate_weights, read_places, weight_files
from plug.errors import PlugError

TENSORS = {
    "a": torch.arange(6.0).view(2, 3),
    "b": torch.ones(4).half(),
    "c": torch.zeros(5, dtype=torch.int8),
}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    safetensors.torch.save_file(TENSORS, tmp_path / "model.safetensors")
    return tmp_path


def header(directory: Path, change: Callable[[dict[str, Any]], object]) -> None:
    file = directory / "model.safetensors"
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    values = json.loads(content[8 : 8 + length])
    change(values)
    encoded = json.dumps(values).encode()
    file.write_bytes(len(encoded).to_bytes(8, "little") + encoded + content[8 + length :])


def test_places_are_where_the_values_lie(directory: Path) -> None:
    content = (directory / "model.safetensors").read_bytes()

    places = read_places(directory)

    assert places.keys() == TENSORS.keys()
    for name, place in places.items():
        raw = content[place.start : place.start + place.spec.num_bytes]
        found = torch.frombuffer(bytearray(raw), dtype=place.spec.dtype).view(place.spec.shape)
        assert torch.equal(found, TENSORS[name])


def test_names_and_shapes_must_be_those_expected(directory: Path) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in TENSORS.items()}
    assert locate_weights(directory, shapes).keys() == shapes.keys()

    with pytest.raises(PlugError, match=r"缺少 1 个张量：d.*a 是 \[2, 3\]，应为 \[3, 2\]"):
        locate_weights(directory, shapes | {"a": (3, 2), "d": (1,)})


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda h: h["a"].update(shape=[3, 3]), "'a' 的位置"),
        (lambda h: h["a"].update(shape=[6.0]), "不是整数"),
        (lambda h: h["a"].update(shape=[True, 6]), "不是整数"),
        (lambda h: h["a"].update(shape=[-2, -3]), "不是整数"),
        (lambda h: h["a"].update(shape=[1] * 9), "形状或位置不对"),
        (lambda h: h["a"].update(dtype="F64"), "F64"),
        (lambda h: h["a"].update(dtype=["F32"]), "F32"),
        (lambda h: h["a"].update(data_offsets=list(h["b"]["data_offsets"])), "的位置"),
        (lambda h: h["a"].update(more=1), "说明不全"),
        (lambda h: h["a"].pop("dtype"), "说明不全"),
        (lambda h: h.pop("c"), "字节"),
        (lambda h: h.update(d=3), "说明不全"),
    ],
)
def test_a_header_that_does_not_account_for_its_file_is_refused(
    change: Callable[[dict[str, Any]], object], says: str, directory: Path
) -> None:
    header(directory, change)

    with pytest.raises(PlugError, match=says) as caught:
        read_places(directory)

    assert "model.safetensors" in str(caught.value)


def test_float16_beside_bfloat16_is_refused(tmp_path: Path) -> None:
    """One letter of the header makes one of the other, and all values wrong."""
    both = {"a": torch.ones(4).half(), "b": torch.ones(4).bfloat16()}
    safetensors.torch.save_file(both, tmp_path / "model.safetensors")
    with pytest.raises(PlugError, match=r"float16.*bfloat16"):
        read_places(tmp_path)

    scales = {"a": torch.ones(4).half(), "b.scale": torch.ones(4).bfloat16()}
    safetensors.torch.save_file(scales, tmp_path / "model.safetensors")
    assert read_places(tmp_path).keys() == scales.keys()


@pytest.mark.parametrize(
    ("weight_map", "says"),
    [
        ({"a": "x.safetensors"}, "里的张量与索引"),
        ({"a": "x.safetensors", "b": "x.safetensors", "d": "x.safetensors"}, "里的张量与索引"),
        ({"a": "../x.safetensors", "b": "x.safetensors"}, "写成了"),
        ({"a": 3}, "写成了"),
        ({"a": "x\0.safetensors"}, "缺少权重文件"),
        ({"a": "y" * 300 + ".safetensors"}, "缺少权重文件"),
        ({}, "weight_map"),
        ([], "weight_map"),
    ],
)
def test_an_index_that_is_not_of_its_files_is_refused(
    weight_map: object, says: str, tmp_path: Path
) -> None:
    tensors = {"a": torch.ones(2), "b": torch.ones(3)}
    safetensors.torch.save_file(tensors, tmp_path / "x.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "x.safetensors", "b": "x.safetensors"}}))
    assert weight_files(tmp_path) == {tmp_path / "x.safetensors": {"a", "b"}}

    index.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(PlugError, match=says):
        read_places(tmp_path)


def test_a_name_that_breaks_lines_does_not_break_the_message(tmp_path: Path) -> None:
    safetensors.torch.save_file({"a\nb": torch.ones(2)}, tmp_path / "model.safetensors")

    with pytest.raises(PlugError, match=r"多出 1 个张量：'a\\nb'") as caught:
        locate_weights(tmp_path, {})

    assert "\n" not in str(caught.value)

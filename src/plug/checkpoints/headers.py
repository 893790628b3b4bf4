"""What the safetensors files of a model directory hold, from their headers alone.

A header must account for every byte of its file, and the index for every tensor, before anything is
read or reserved.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from plug.checkpoints.weights import (
    DTYPES,
    DTYPES_BY_CODE,
    INDEX_FILE,
    SINGLE_FILE,
    Place,
    TensorSpec,
    check_names_and_shapes,
    damaged,
    shorten,
)
from plug.errors import PlugError
from plug.jsonfiles import parse_json, read_json, shown

_MAX_HEADER_BYTES = 100 * 2**20  # the library's own limit
_MAX_DIMENSIONS = 8
_QUANTIZED = (".scale", ".center")  # of quantised layers, whatever the others' dtype


def locate_weights(directory: Path, expected: Mapping[str, tuple[int, ...]]) -> dict[str, Place]:
    """Return where each tensor of a model directory lies, and what it is.

    Raises:
        PlugError: as `read_places`, or names or shapes differ from ``expected``.
    """
    found = read_places(directory)
    shapes = {name: place.spec.shape for name, place in found.items()}
    check_names_and_shapes(directory, shapes, expected)
    return found


def read_places(directory: Path) -> dict[str, Place]:
    """Return where each tensor of a directory lies, whatever tensors there are.

    Raises:
        PlugError: a file is missing or damaged, the files and their index disagree, or a dtype is
            none of ours.
    """
    found: dict[str, Place] = {}
    for file, listed in weight_files(directory).items():
        places = read_header(file)
        if listed is not None and listed != places.keys():
            raise PlugError(
                f"{file} 里的张量与索引 {INDEX_FILE} 写的不同："
                f"{shorten(sorted(listed ^ places.keys()))}。请重新取得模型。"
            )
        found |= places
    # One bit of a header makes one of the other; no program writes both.
    plain = {place.spec.dtype for name, place in found.items() if not name.endswith(_QUANTIZED)}
    if {torch.float16, torch.bfloat16} <= plain:
        raise PlugError(
            f"{directory} 的权重有的是 float16，有的是 bfloat16，本项目不会写出这样的目录。"
            "请重新取得模型。"
        )
    return found


def weight_files(directory: Path) -> dict[Path, set[str] | None]:
    """Return the safetensors files of a directory in order, each with the tensors the index lists.

    A directory with one file and no index gives None for the tensors.

    Raises:
        PlugError: there are none, one named by the index is missing, or the index is no index.
    """
    index_path = directory / INDEX_FILE
    if not index_path.exists():
        if not (directory / SINGLE_FILE).is_file():
            raise PlugError(f"{directory} 里没有权重文件 {SINGLE_FILE}。请检查模型是否完整。")
        return {directory / SINGLE_FILE: None}
    index = read_json(index_path)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise PlugError(f"{index_path} 不是有效的权重索引：没有 weight_map。请重新取得模型。")
    listed: dict[str, set[str]] = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or not file.endswith(".safetensors") or "/" in file:
            raise PlugError(
                f"{index_path} 不是有效的权重索引：{shown(name)} 所在的文件写成了 {shown(file)}。"
                "请重新取得模型。"
            )
        listed.setdefault(file, set()).add(name)
    missing = [name for name in sorted(listed) if not _is_file(directory / name)]
    if missing:
        told = shorten([name if name.isprintable() else shown(name) for name in missing])
        raise PlugError(f"{directory} 缺少权重文件 {told}。请重新取得模型。")
    return {directory / name: listed[name] for name in sorted(listed)}


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (ValueError, OSError):  # a name with NUL, or too long for the system
        return False


def read_header(file: Path) -> dict[str, Place]:
    """Return the tensors of one file, whose header must account for every byte.

    Raises:
        PlugError: it does not, or a dtype is none of ours.
    """
    size, length, header = _header(file)
    header.pop("__metadata__", None)
    entries = {name: _entry(file, name, entry) for name, entry in header.items()}
    places, end = {}, 0
    for name, (spec, first, last) in sorted(entries.items(), key=lambda item: item[1][1:]):
        if first != end or last - first != spec.num_bytes:
            raise damaged(file, f"{shown(name)} 的位置 {first}…{last} 与形状或前一个张量不符")
        places[name] = Place(file, 8 + length + first, spec)
        end = last
    if 8 + length + end != size:
        raise damaged(file, f"应有 {8 + length + end} 字节，实有 {size} 字节")
    return places


def _header(file: Path) -> tuple[int, int, dict[str, Any]]:
    """Return the file's size, its header's length, and the header."""
    try:
        with file.open("rb") as opened:
            size = os.fstat(opened.fileno()).st_size
            length = int.from_bytes(opened.read(8), "little")
            if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
                raise damaged(file, f"文件头的长度 {length} 不对")
            content = opened.read(length)
    except OSError as error:
        raise damaged(file, error.strerror or str(error)) from None
    try:
        header = parse_json(content, "文件头")
    except PlugError as error:
        raise damaged(file, str(error).rstrip("。")) from None
    if not isinstance(header, dict):
        raise damaged(file, "文件头不是 JSON 对象")
    return size, length, header


def _entry(file: Path, name: str, entry: Any) -> tuple[TensorSpec, int, int]:
    """Return what a header's entry says: the tensor, its first byte, and the one after its last."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise damaged(file, f"{shown(name)} 的说明不全")
    shape, offsets = entry["shape"], entry["data_offsets"]
    for numbers in (shape, offsets):
        if not isinstance(numbers, list) or not all(
            type(number) is int and 0 <= number < 2**60 for number in numbers
        ):
            raise damaged(file, f"{shown(name)} 的形状或位置不是整数")
    if len(offsets) != 2 or len(shape) > _MAX_DIMENSIONS:
        raise damaged(file, f"{shown(name)} 的形状或位置不对")
    if not isinstance(entry["dtype"], str) or entry["dtype"] not in DTYPES_BY_CODE:
        raise PlugError(
            f"{file} 里有 {shown(entry['dtype'])} 类型的张量，只支持 {'、'.join(DTYPES)}。"
        )
    return TensorSpec(DTYPES_BY_CODE[entry["dtype"]], tuple(shape)), offsets[0], offsets[1]

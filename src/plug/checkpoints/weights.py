"""safetensors files of a model directory: written slice by slice in place, mapped to be read.

A file is laid out first: its header is written and its blocks are reserved, so that a full disk is
an error now and not a crash later. Values then go through a memory map, and their pages are let go
at once. So neither saving nor converting holds the output in memory.

The layout is the one `transformers` uses: `model.safetensors`, or numbered files and an index.
"""

from __future__ import annotations

import contextlib
import json
import math
import mmap
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import EllipsisType
from typing import IO, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from plug.errors import PlugError
from plug.files import new_file, write_json

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_SHARD_BYTES = 4 * 1024**3
_CODES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int8: "I8",  # of quantised layers
    torch.uint8: "U8",
}
_DTYPES_BY_CODE = {code: dtype for dtype, code in _CODES.items()}

Region = tuple[slice, ...] | EllipsisType


class TensorSpec(NamedTuple):
    """What a tensor will be, before its values are known."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Place(NamedTuple):
    """Where a tensor lies, and what it is."""

    file: Path
    start: int  # its first byte in the file
    spec: TensorSpec


class WeightWriter:
    """Writes the weights of one model directory; a context manager.

    Leaving it without an error flushes the files to the disk and writes the index.

    Args:
        directory: exists, and holds no weights yet.
        specs: every tensor, in the order in which files are filled.
        max_shard_bytes: a file that would grow past this ends, and another begins.

    Raises:
        OSError: the disk is full, or a file cannot be written.
    """

    def __init__(
        self,
        directory: Path,
        specs: Mapping[str, TensorSpec],
        max_shard_bytes: int = MAX_SHARD_BYTES,
    ) -> None:
        self.directory = directory
        self.total_bytes = sum(spec.num_bytes for spec in specs.values())
        self._specs = specs
        self._groups = _group(specs, max_shard_bytes)
        self._views: dict[str, tuple[mmap.mmap, int]] = {}  # tensor -> its file, its first byte
        self._files: list[tuple[IO[bytes], mmap.mmap]] = []

    def __enter__(self) -> WeightWriter:
        try:
            for file_name, names in self._groups.items():
                self._reserve(self.directory / file_name, names)
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                for file, mapped in self._files:
                    mapped.flush()
                    os.fsync(file.fileno())
                self._write_index()
        finally:
            self._close()

    def write(self, name: str, value: Tensor, region: Region = ...) -> None:
        """Copy ``value``, from any device and dtype, into a region of the tensor ``name``."""
        mapped, start = self._views[name]
        spec = self._specs[name]
        target = torch.frombuffer(
            mapped, dtype=spec.dtype, count=math.prod(spec.shape), offset=start
        ).view(spec.shape)[region]
        if target.shape != value.shape:  # `copy_` would broadcast
            raise ValueError(f"{name}{region}: {tuple(value.shape)} into {tuple(target.shape)}")
        target.copy_(value)
        if hasattr(mmap, "MADV_DONTNEED"):  # a shared map: the pages go, what was written stays
            page = start // mmap.PAGESIZE * mmap.PAGESIZE
            mapped.madvise(mmap.MADV_DONTNEED, page, start + spec.num_bytes - page)

    def _reserve(self, path: Path, names: list[str]) -> None:
        names = sorted(names, key=lambda name: -self._specs[name].dtype.itemsize)  # keeps alignment
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        size = 0
        starts = {}
        for name in names:
            spec = self._specs[name]
            starts[name] = size
            size += spec.num_bytes
            header[name] = {
                "dtype": _CODES[spec.dtype],
                "shape": list(spec.shape),
                "data_offsets": [starts[name], size],
            }
        encoded = json.dumps(header).encode()
        encoded += b" " * (-len(encoded) % 8)
        data_start = 8 + len(encoded)
        file = path.open("w+b")
        try:
            file.write(len(encoded).to_bytes(8, "little") + encoded)
            file.flush()
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, data_start + size)
            else:
                file.truncate(data_start + size)
            mapped = mmap.mmap(file.fileno(), data_start + size)
        except BaseException:
            file.close()
            raise
        self._files.append((file, mapped))
        self._views |= {name: (mapped, data_start + start) for name, start in starts.items()}

    def _write_index(self) -> None:
        if len(self._groups) > 1:
            weight_map = {name: file for file, names in self._groups.items() for name in names}
            index = {"metadata": {"total_size": self.total_bytes}, "weight_map": weight_map}
            write_json(self.directory / INDEX_FILE, index)

    def _close(self) -> None:
        for file, mapped in self._files:
            with contextlib.suppress(BufferError):  # an error's traceback still holds a view of it
                mapped.close()
            file.close()
        self._files.clear()
        self._views.clear()


def map_tensors(places: Mapping[str, Place]) -> Iterator[tuple[str, Tensor]]:
    """Each tensor, in its saved dtype; ``places`` are from `locate_weights`.

    A private view of the mapped file: no copy, and what is written into it stays out of the file.
    One file is open at a time.
    """
    names_by_file: dict[Path, list[str]] = {}
    for name, place in places.items():
        names_by_file.setdefault(place.file, []).append(name)
    for file, names in names_by_file.items():
        with safe_open(file, framework="pt") as opened:
            for name in names:
                yield name, opened.get_tensor(name)


def locate_weights(directory: Path, expected: Mapping[str, tuple[int, ...]]) -> dict[str, Place]:
    """Where each tensor of a model directory lies, and what it is; from the headers alone.

    Raises:
        PlugError: a file is missing or damaged, or names or shapes differ from ``expected``.
    """
    found: dict[str, Place] = {}
    for file in weight_files(directory):
        try:
            with safe_open(file, framework="pt"):  # checks the header, and the file's size by it
                pass
            found |= _places(file)
        except (SafetensorError, OSError) as error:
            raise PlugError(
                f"{file} 已损坏或不是 safetensors 文件（{error}）。请重新取得模型。"
            ) from None
        except KeyError as error:
            raise PlugError(
                f"{file} 里有 {error.args[0]} 类型的张量，只支持 {'、'.join(DTYPES)}。"
            ) from None
    shapes = {name: place.spec.shape for name, place in found.items()}
    check_names_and_shapes(directory, shapes, expected)
    return found


def _places(file: Path) -> dict[str, Place]:
    """From a header that was checked."""
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(length))
    header.pop("__metadata__", None)
    return {
        name: Place(
            file,
            8 + length + entry["data_offsets"][0],
            TensorSpec(_DTYPES_BY_CODE[entry["dtype"]], tuple(entry["shape"])),
        )
        for name, entry in header.items()
    }


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a model directory, in order.

    Raises:
        PlugError: there are none, one named by the index is missing, or the index is no index.
    """
    index_path = directory / INDEX_FILE
    if not index_path.is_file():
        if not (directory / SINGLE_FILE).is_file():
            raise PlugError(f"{directory} 里没有权重文件 {SINGLE_FILE}。请检查模型是否完整。")
        return [directory / SINGLE_FILE]
    try:
        index = json.loads(index_path.read_text(encoding="utf-8"))
        names = sorted({Path(name).name for name in index["weight_map"].values()})
    except (ValueError, KeyError, TypeError, AttributeError):
        raise PlugError(f"{index_path} 不是有效的权重索引。请重新取得模型。") from None
    missing = [name for name in names if not (directory / name).is_file()]
    if missing:
        raise PlugError(f"{directory} 缺少权重文件 {'、'.join(missing)}。请重新取得模型。")
    return [directory / name for name in names]


def check_names_and_shapes(
    source: Path, found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]
) -> None:
    """Raise a `PlugError` that names every difference, at most 5 of a kind."""
    problems = []
    for title, names in (
        ("缺少", sorted(expected.keys() - found.keys())),
        ("多出", sorted(found.keys() - expected.keys())),
    ):
        if names:
            problems.append(f"{title} {len(names)} 个张量：{_shorten(names)}")
    wrong = [
        f"{name} 是 {list(found[name])}，应为 {list(shape)}"
        for name, shape in expected.items()
        if name in found and tuple(found[name]) != tuple(shape)
    ]
    if wrong:
        problems.append(f"{len(wrong)} 个张量形状不对：{_shorten(wrong)}")
    if problems:
        raise PlugError(
            f"{source} 的权重与配置不符：{'；'.join(problems)}。请检查 config.json 与权重是否配套。"
        )


def save_pickle(payload: object, path: Path) -> None:
    """Write as `torch.save` does. A write that fails is an OSError; torch raises a RuntimeError."""
    with new_file(path, "wb") as file:
        try:
            torch.save(payload, file)
        except RuntimeError as error:
            raise OSError(None, str(error).split("\n")[0]) from error


def _group(specs: Mapping[str, TensorSpec], max_shard_bytes: int) -> dict[str, list[str]]:
    groups: list[list[str]] = [[]]
    size = 0
    for name, spec in specs.items():
        if groups[-1] and size + spec.num_bytes > max_shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += spec.num_bytes
    if len(groups) == 1:
        return {SINGLE_FILE: groups[0]}
    return {
        f"model-{number:05d}-of-{len(groups):05d}.safetensors": names
        for number, names in enumerate(groups, 1)
    }


def _shorten(items: list[str]) -> str:
    return "、".join(items[:5]) + ("……" if len(items) > 5 else "")

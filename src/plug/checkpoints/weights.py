"""safetensors files of a model directory: written slice by slice in place, mapped to be read.

A file is laid out first: its header is written and its blocks are reserved, so that a full disk is
an error now and not a crash later. Values then go through a memory map, and their pages are let go
at once. So neither saving nor converting holds the output in memory.

The layout is the one `transformers` uses: `model.safetensors`, or numbered files and an index.
"""

from __future__ import annotations

import collections
import contextlib
import json
import math
import mmap
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
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
DTYPES_BY_CODE = {code: dtype for dtype, code in _CODES.items()}

_SHORT_WRITES = ("inline_container", "PytorchStreamWriter", "iostream")  # torch says no more
_WRITING_ERRORS = (*_SHORT_WRITES, "I/O error")

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
        if sys.platform != "win32":  # a shared map: the pages go, what was written stays
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
    """Yield each tensor in its saved dtype; ``places`` are from `plug.checkpoints.headers`.

    A private view of the mapped file: no copy, and what is written into it stays out of the file.
    One file is open at a time.

    Raises:
        PlugError: a file is not what it was when its header was read.
    """
    names_by_file: dict[Path, list[str]] = {}
    for name, place in places.items():
        names_by_file.setdefault(place.file, []).append(name)
    for file, names in names_by_file.items():
        try:
            opened = safe_open(file, framework="pt")
        except (SafetensorError, OSError) as error:
            raise damaged(file, str(error)) from None
        with opened:
            for name in names:
                yield name, opened.get_tensor(name)


def damaged(file: Path, reason: str) -> PlugError:
    """Return the error that says what is wrong with a safetensors file."""
    return PlugError(f"{file} 已损坏或不是 safetensors 文件（{reason}）。请重新取得模型。")


def finite(source: object, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Pass named tensors on, of any device; after the last, refuse those that are no numbers.

    The least and the largest value of each tensor tell: both are NaN where a value is. That reads
    a tensor once, and waits for a device once for all.

    Raises:
        PlugError: values are NaN or infinite; it names the tensors.
    """
    names, extremes = [], []
    for name, tensor in tensors:
        for part in _parts(tensor.detach()):
            if part.is_floating_point() and part.numel():
                names.append(name)
                extremes.append(torch.stack(torch.aminmax(part)).float())
        yield name, tensor
    if not extremes:
        return
    is_finite = torch.stack(extremes).isfinite().all(1).tolist()
    if wrong := [name for name, good in zip(names, is_finite, strict=True) if not good]:
        raise PlugError(
            f"{source} 里有 NaN 或无穷大：{shorten(wrong)}。权重已损坏，或超出了所用精度的范围。"
            "请重新取得模型，或换一种 dtype。"
        )


def _parts(tensor: Tensor) -> Iterator[Tensor]:
    """Yield the plain tensors that a tensor is made of, such as a moment's codes and scales."""
    if not hasattr(tensor, "__tensor_flatten__"):
        yield tensor
        return
    for name in tensor.__tensor_flatten__()[0]:
        yield from _parts(getattr(tensor, name))


def check_finite(source: object, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Raise as `finite` does."""
    collections.deque(finite(source, tensors), maxlen=0)


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
            problems.append(f"{title} {len(names)} 个张量：{shorten(names)}")
    wrong = [
        f"{name} 是 {list(found[name])}，应为 {list(shape)}"
        for name, shape in expected.items()
        if name in found and tuple(found[name]) != tuple(shape)
    ]
    if wrong:
        problems.append(f"{len(wrong)} 个张量形状不对：{shorten(wrong)}")
    if problems:
        advice = "请检查 config.json 与权重是否配套。"
        if "classifier.weight" in found.keys() - expected.keys():
            advice = "这是微调过的分类、标注或阅读理解模型，请用 plug predict。"
        raise PlugError(f"{source} 的权重与配置不符：{'；'.join(problems)}。{advice}")


def save_pickle(payload: object, path: Path) -> None:
    """Write as `torch.save` does. A write that fails is an OSError; torch raises a RuntimeError."""
    with new_file(path, "wb") as file, writing_errors():
        torch.save(payload, file)


@contextlib.contextmanager
def writing_errors() -> Iterator[None]:
    """Raise an OSError where torch or safetensors say in their own way that they cannot write."""
    try:
        yield
    except (RuntimeError, SafetensorError) as error:
        if not any(word in str(error) for word in _WRITING_ERRORS):
            raise
        raise OSError(None, writing_reason(error)) from error


def writing_reason(error: BaseException) -> str:
    """Return why something could not be written, in one line for users."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror  # without the file, whose name may be a temporary one
    text = str(error).strip().split("\n")[0][:200]
    if any(word in text for word in _SHORT_WRITES):
        return "文件没有写完，磁盘可能已满"
    return text or type(error).__name__


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


def shorten(items: list[str]) -> str:
    """Return what a message shows of a list: at most 5 of it, on one line, none of them long."""
    items = [item if item.isprintable() else repr(item) for item in items[:6]]
    items = [item if len(item) <= 200 else f"{item[:200]}……" for item in items]
    return "、".join(items[:5]) + ("……" if len(items) > 5 else "")

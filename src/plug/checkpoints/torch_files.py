"""Read the tensors of a file that `torch.save` wrote, without running anything that it names.

A pickle names functions and classes for its reader to import and call. Here it imports nothing: the
functions that rebuild tensors are ours and note what they are given, and every other name becomes
an inert `Foreign`. So a trainer's objects beside the tensors (a loss scaler, `argparse.Namespace`)
do no harm and no longer stand in the way, which they do with ``torch.load(weights_only=True)``.

What a file claims is checked against its size before memory is taken. Its tensors are mapped.

Formats: PyTorch's `torch/serialization.py`; a zip archive since 1.6, before that four pickles, the
list of storages and their bytes in turn.
"""

from __future__ import annotations

import io
import math
import os
import pickle
import stat
import struct
import zipfile
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

import torch
from torch import Tensor

from plug.errors import PlugError
from plug.jsonfiles import shown

_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
_MAX_PICKLE_BYTES = 2**30  # without its tensors
_MAX_DIMENSIONS = 8
_MAX_DEPTH = 4  # of the dictionaries and lists in which tensors are looked for
_LOCAL_HEADER = struct.Struct("<4s5H3I2H")  # of a member of a zip archive
_MAGIC = 0x1950A86A20F9469CFC6C  # before 1.6: the first pickle


class Foreign:
    """Stands for an object, or a class, of a name that is not imported; does nothing."""

    origin = ""

    def __new__(cls, *_args: Any, **_options: Any) -> Foreign:
        """Take whatever a pickle gives."""
        return super().__new__(cls)

    def __init__(self, *_args: Any, **_options: Any) -> None:
        pass

    def __call__(self, *_args: Any, **_options: Any) -> Foreign:
        """Be the function that it may stand for."""
        return self

    def __setstate__(self, _state: Any) -> None:
        pass

    def __setitem__(self, _key: Any, _value: Any) -> None:
        pass

    def append(self, _value: Any) -> None:
        """As a list's; likewise the next two."""

    def extend(self, _values: Any) -> None:
        pass

    def add(self, _value: Any) -> None:
        pass


class _Dict(dict[Any, Any]):
    """An `OrderedDict`, whose attributes are passed over."""

    def __setstate__(self, _state: Any) -> None:
        pass


class _Storage(NamedTuple):
    key: str
    dtype: torch.dtype
    numel: int


class Record(NamedTuple):
    """A tensor as a pickle describes it: which elements of which storage."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class TorchFile(NamedTuple):
    """What a file holds."""

    content: Any  # tensors below ``key`` are mapped; others are `Record`s, and objects `Foreign`
    foreign: list[str]  # the names that were not imported


def read_torch_file(path: Path, key: str) -> TorchFile:
    """Return what a file of `torch.save` holds.

    Args:
        path: of the file.
        key: of its dictionary, below which tensors are wanted.

    Raises:
        PlugError: it is no such file, incomplete or damaged, or claims more than it holds.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise PlugError(f"{path} 不是普通文件（是目录、管道或设备）。请换成真正的文件。")
        with path.open("rb") as file:
            is_zip = file.read(4) == b"PK\x03\x04"
            file.seek(0)
            reader = _ZipReader(path, file) if is_zip else _OldReader(path, file)
            return TorchFile(reader.content(key), list(reader.names))
    except PlugError:
        raise
    except _CannotReadError as error:
        reason = str(error)
    except Exception as error:  # a damaged pickle can raise anything
        reason = f"{type(error).__name__}：{str(error).splitlines()[0][:160] if str(error) else ''}"
    raise PlugError(f"读不了 {path}：文件不完整或已损坏（{reason}）。请重新取得它。")


class _CannotReadError(Exception):
    pass


class _Unpickler(pickle._Unpickler):
    """Python's own, in Python: the one in C reserves whatever size a pickle claims."""

    def __init__(
        self, file: Any, names: dict[str, type[Foreign]], storages: dict[str, _Storage]
    ) -> None:
        super().__init__(file, encoding="utf-8", errors="surrogateescape")
        self._names, self._storages = names, storages

    def find_class(self, module: str, name: str) -> Any:
        """Return what stands for a global: nothing is imported."""
        if (module, name) == ("collections", "OrderedDict"):
            return _Dict
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        if (module, name) in _REBUILD:
            return _REBUILD[module, name]
        origin = f"{module}.{name}"
        if origin not in self._names:
            self._names[origin] = type("Foreign", (Foreign,), {"origin": origin})
        return self._names[origin]

    def persistent_load(self, pid: Any) -> _Storage:
        """Return a storage: (storage, its dtype, its key, a device, its number of elements)."""
        if not isinstance(pid, tuple) or len(pid) < 5 or pid[0] != "storage":
            raise _CannotReadError("不认识的存储")
        _, dtype, key, _, count = pid[:5]
        if not isinstance(dtype, torch.dtype):
            raise _CannotReadError(f"不支持 {getattr(dtype, 'origin', shown(dtype))}")
        if not isinstance(key, str) or type(count) is not int or count < 0:
            raise _CannotReadError("不认识的存储")
        if len(pid) > 5 and pid[5] is not None:
            raise _CannotReadError("存储是另一个存储的一部分")
        self._storages[key] = _Storage(key, dtype, count)
        return self._storages[key]


def _rebuild_tensor(
    storage: Any, offset: Any, shape: Any, stride: Any, *_training_state: Any
) -> Record:
    """Return a tensor's record, if its elements lie within its storage and none lies on another."""
    numbers = [offset, *shape, *stride]
    if (
        not isinstance(storage, _Storage)
        or len(shape) != len(stride)
        or len(shape) > _MAX_DIMENSIONS
        or not all(type(number) is int and 0 <= number < 2**60 for number in numbers)
    ):
        raise _CannotReadError("张量的说明不对")
    end = offset  # one after the last element, and the least stride that does not overlap
    least = 1
    for step, size in sorted(zip(stride, shape, strict=True)):
        if size > 1:
            if step < least:
                raise _CannotReadError("张量的元素互相重叠")
            least = step * size
        end += (size - 1) * step
    if math.prod(shape) and end >= storage.numel:
        raise _CannotReadError(f"张量 {list(shape)} 超出它的存储（{storage.numel} 个数）")
    return Record(storage, offset, tuple(shape), tuple(stride))


def _rebuild_parameter(data: Any, *_training_state: Any) -> Any:
    return data


def _rebuild_from_type(function: Any, _type: Any, arguments: Any, _state: Any) -> Any:
    if function not in _REBUILD.values():
        raise _CannotReadError("不认识的张量")
    return function(*arguments)


_REBUILD = {
    ("torch._utils", "_rebuild_tensor"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _rebuild_parameter,
    ("torch._tensor", "_rebuild_from_type_v2"): _rebuild_from_type,
}


def _records(value: Any, depth: int = 0) -> list[Record]:
    """Return the records that `_Reader._mapped` makes tensors of."""
    if isinstance(value, Record):
        return [value]
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    if depth == _MAX_DEPTH:
        return []
    return [record for each in inside for record in _records(each, depth + 1)]


class _Reader:
    """What the two formats share: a pickle, whose tensors lie elsewhere in the file."""

    def __init__(self, path: Path, file: IO[bytes]) -> None:
        self.path, self.file = path, file
        self.size = os.fstat(file.fileno()).st_size
        self.names: dict[str, type[Foreign]] = {}
        self.storages: dict[str, _Storage] = {}
        self._own: dict[_Storage, torch.UntypedStorage] = {}  # tensors that share one share memory

    def content(self, key: str) -> Any:
        payload = self.payload()
        if not isinstance(payload, dict) or key not in payload:
            return payload
        self._check_claims(_records(payload[key]))
        whole = torch.UntypedStorage.from_file(str(self.path), False, self.size)  # private
        mapped = self._mapped(payload[key], cast(torch.UntypedStorage, whole))
        return {**payload, key: mapped}

    def _mapped(self, value: Any, whole: torch.UntypedStorage, depth: int = 0) -> Any:
        """Return a copy of ``value`` with tensors in the place of records."""
        if isinstance(value, Record):
            return self._tensor(value, whole)
        if depth < _MAX_DEPTH:
            if isinstance(value, dict):
                return {k: self._mapped(v, whole, depth + 1) for k, v in value.items()}
            if isinstance(value, list):
                return [self._mapped(each, whole, depth + 1) for each in value]
        return value

    def unpickle(self, file: Any) -> Any:
        return _Unpickler(file, self.names, self.storages).load()

    def payload(self) -> Any:
        raise NotImplementedError

    def place(self, storage: _Storage) -> int:
        """Return the first byte of a storage in the file, which holds all of it."""
        raise NotImplementedError

    def _check_claims(self, records: list[Record]) -> None:
        """Many tensors in one small storage would become a large model."""
        distinct = {(x.storage.key, x.offset, x.shape): x for x in records}.values()
        claimed = sum(math.prod(x.shape) * x.storage.dtype.itemsize for x in distinct)
        if claimed > self.size:
            raise _CannotReadError(
                f"张量共称有 {claimed / 1e6:,.1f} MB，文件却只有 {self.size / 1e6:,.1f} MB"
            )

    def _tensor(self, record: Record, whole: torch.UntypedStorage) -> Tensor:
        storage = record.storage
        if storage not in self._own:
            start, num_bytes = self.place(storage), storage.numel * storage.dtype.itemsize
            if start + num_bytes > self.size:
                raise _CannotReadError(f"存储 {shown(storage.key)} 超出文件的末尾")
            own = cast(torch.UntypedStorage, whole[start : start + num_bytes])
            # Arithmetic wants it aligned, which files before 1.6 are not.
            self._own[storage] = own.clone() if start % storage.dtype.itemsize else own
        empty = torch.empty(0, dtype=storage.dtype)
        return empty.set_(self._own[storage], record.offset, record.shape, record.stride)


class _ZipReader(_Reader):
    """Of PyTorch 1.6 and later: `NAME/data.pkl`, and each storage as `NAME/data/KEY`."""

    def payload(self) -> Any:
        with zipfile.ZipFile(self.file) as archive:
            members = archive.infolist()
        self._members = {info.filename: info for info in members}
        pickles = [info for info in members if info.filename.endswith("/data.pkl")]
        if len(pickles) != 1 or len(self._members) < len(members):
            raise _CannotReadError("压缩包里不是 torch.save 写的内容")
        self._prefix = pickles[0].filename.removesuffix("data.pkl")
        if self._read(f"{self._prefix}byteorder", b"little").strip() != b"little":
            raise _CannotReadError("数按大端次序写成，不支持")
        return self.unpickle(io.BytesIO(self._read(pickles[0].filename)))

    def place(self, storage: _Storage) -> int:
        info = self._members.get(f"{self._prefix}data/{storage.key}")
        if info is None:
            raise _CannotReadError(f"没有存储 {shown(storage.key)}")
        if info.file_size != storage.numel * storage.dtype.itemsize:
            raise _CannotReadError(
                f"存储 {shown(storage.key)} 称有 {storage.numel} 个数，却有 {info.file_size} 字节"
            )
        return self._start(info)

    def _read(self, name: str, default: bytes | None = None) -> bytes:
        info = self._members.get(name)
        if info is None:
            if default is None:
                raise _CannotReadError(f"没有 {shown(name)}")
            return default
        if info.file_size > _MAX_PICKLE_BYTES:
            raise _CannotReadError(f"{shown(name)} 称有 {info.file_size / 1e6:,.0f} MB")
        self.file.seek(self._start(info))
        return self.file.read(info.file_size)

    def _start(self, info: zipfile.ZipInfo) -> int:
        """Return a member's first byte, once it is found to lie in the file as it is."""
        if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
            raise _CannotReadError(f"{shown(info.filename)} 是压缩过的，torch.save 不这样写")
        self.file.seek(info.header_offset)
        header = self.file.read(_LOCAL_HEADER.size)
        if len(header) < _LOCAL_HEADER.size or header[:4] != b"PK\x03\x04":
            raise _CannotReadError("压缩包的目录与内容不符")
        fields = _LOCAL_HEADER.unpack(header)
        name = self.file.read(fields[9])
        if name != info.orig_filename.encode("utf-8", "surrogateescape"):
            raise _CannotReadError("压缩包的目录与内容不符")
        start = info.header_offset + _LOCAL_HEADER.size + fields[9] + fields[10]
        if start + info.file_size > self.size:
            raise _CannotReadError(f"{shown(info.filename)} 超出文件的末尾")
        return start


class _OldReader(_Reader):
    """Before 1.6: magic number, protocol, machine and content as pickles, then the storages."""

    def payload(self) -> Any:
        file = _Bounded(self.file, self.size)
        if self.unpickle(file) != _MAGIC or self.unpickle(file) != 1001:
            raise _CannotReadError("不是 torch.save 写的文件")
        machine = self.unpickle(file)
        if not isinstance(machine, dict) or machine.get("little_endian") is not True:
            raise _CannotReadError("数按大端次序写成，不支持")
        payload, keys = self.unpickle(file), self.unpickle(file)
        self._starts: dict[str, int] = {}
        at = self.file.tell()
        for key in keys:
            storage = self.storages[key]
            self.file.seek(at)
            if int.from_bytes(self.file.read(8), "little") != storage.numel:
                raise _CannotReadError(f"存储 {shown(key)} 的大小前后不一")
            self._starts[key] = at + 8
            at += 8 + storage.numel * storage.dtype.itemsize
        return payload

    def place(self, storage: _Storage) -> int:
        if storage != self.storages[storage.key]:
            raise _CannotReadError(f"存储 {shown(storage.key)} 的大小前后不一")
        return self._starts[storage.key]


class _Bounded:
    """A file of which no more is asked than it has."""

    def __init__(self, file: IO[bytes], size: int) -> None:
        self._file, self._size = file, size

    def read(self, count: int) -> bytes:
        left = self._size - self._file.tell()
        if count > min(left, _MAX_PICKLE_BYTES):
            raise EOFError
        return self._file.read(count)

    def readline(self) -> bytes:
        return self._file.readline(_MAX_PICKLE_BYTES)

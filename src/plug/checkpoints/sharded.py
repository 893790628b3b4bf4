"""Sharded checkpoints: every process writes its shards, any number of processes reads them.

The format is PyTorch's (`torch.distributed.checkpoint`): files of tensors from each process and
`.metadata`, which says where each part of each tensor lies. The directory is written by
`plug.files`, whole or not at all. Processes on several hosts need one file system.
"""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint import metadata as torch_metadata
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import (
    FileSystemReader,
    FileSystemWriter,
    _StorageInfo,
)
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.staging import BlockingAsyncStager
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import AsyncSaveResponse, async_save, save
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.tensor import DTensor
from torch.futures import Future as TorchFuture

from plug.checkpoints.weights import TensorSpec, check_finite, writing_reason
from plug.errors import PlugError
from plug.files import plain_errors, replace_directory

METADATA_FILE = ".metadata"  # written last by torch; shows that a directory is such a checkpoint
# Threads, and files, of a process that write beside training. One alone waits most of the time for
# the interpreter's lock, which training holds while a card's queue is full (docs/experiments.md).
_WRITERS = 8
_METADATA_CLASSES = {  # what a pickled `.metadata` may name
    name: getattr(torch_metadata, name)
    for name in (
        *("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties", "_MEM_FORMAT_ENCODING"),
        *("TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata"),
    )
}
_UNREADABLE = (
    *(CheckpointException, OSError, EOFError, RuntimeError, ValueError, KeyError, TypeError),
    *(AttributeError, IndexError, AssertionError, ImportError, pickle.UnpicklingError),
)


def write_sharded(directory: Path, tensors: Mapping[str, Any]) -> None:
    """Write ``tensors`` (nested dicts of sharded or plain tensors); all processes call it together.

    An older checkpoint in ``directory`` is replaced when the new one is whole.

    Raises:
        PlugError: the disk is full, or the directory cannot be written.
    """
    with ExitStack() as stack:
        place = [directory]
        if dist.get_rank() == 0:
            place = [stack.enter_context(replace_directory(directory, METADATA_FILE))]
        dist.broadcast_object_list(place, src=0)
        with _writing_errors(directory):
            save(dict(tensors), storage_writer=FileSystemWriter(place[0]))
        # The block of the first process ends: files are synced, and the directory gets its name.
    dist.barrier()


class Copier(BlockingAsyncStager):
    """Copies tensors to the host's memory in a thread and on a stream beside those of training.

    On a card the memory is pinned and kept for the next copy: to pin it anew takes seconds. Torch's
    `DefaultStager` keeps nothing in torch 2.11.

    Args:
        device: of the tensors.
    """

    def __init__(self, device: torch.device) -> None:
        is_card = device.type == "cuda"
        super().__init__(cache_staged_state_dict=is_card)
        self._thread = ThreadPoolExecutor(1)
        self._stream = torch.cuda.Stream(device) if is_card else None

    def stage(self, state_dict: dict[str, Any]) -> Future[Any]:  # type: ignore[override]
        """Begin to copy what the tensors are when the work that is queued now has ended.

        Returns:
            A future; the tensors may change when it is done.
        """
        ready = None
        if self._stream is not None:
            ready = torch.cuda.Event()
            ready.record()
        return self._thread.submit(self._copy, state_dict, ready)

    def _copy(self, state_dict: dict[str, Any], ready: Any) -> dict[str, Any]:
        if self._stream is None:
            return super().stage(state_dict)
        torch.cuda.set_device(self._stream.device)
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(ready)
            copied = super().stage(state_dict)
            self._stream.synchronize()
        return copied

    def close(self) -> None:
        """Wait for what is being copied, and let go of the memory."""
        self._thread.shutdown()
        self.state_dict_cache = None


class Writing:
    """A checkpoint that threads are copying and writing; see `begin_sharded`."""

    def __init__(self, place: ExitStack, futures: AsyncSaveResponse, directory: Path) -> None:
        self._place, self._directory = place, directory
        self._copied, self._written = futures.staging_completion, futures.upload_completion

    def wait_for_copy(self) -> None:
        """Return when the tensors may change. What went wrong is for `finish` to raise."""
        wait([self._copied, self._written], return_when=FIRST_COMPLETED)

    def finish(self) -> None:
        """Wait until it is on the disk; the first process then gives it its name.

        Raises:
            PlugError: the disk is full, or the directory cannot be written.
        """
        with self._place, _writing_errors(self._directory):
            self._written.result()


def begin_sharded(
    directory: Path,
    tensors: Mapping[str, Any],
    group: dist.ProcessGroup,
    write_beside: Callable[[Path], None],
    copier: Copier,
) -> Writing:
    """Begin to write as `write_sharded` does; all processes call it together.

    The tensors must not change before `Writing.wait_for_copy` returns.

    Args:
        directory: whose name it gets when `Writing.finish` returns.
        tensors: as in `write_sharded`.
        group: over the CPU; nobody else uses it.
        write_beside: given the directory, writes other files into it; in the first process.
        copier: whose last checkpoint has been written.
    """
    with ExitStack() as stack:  # what fails here leaves no directory
        temporary = [directory]
        if dist.get_rank() == 0:
            temporary = [stack.enter_context(replace_directory(directory, METADATA_FILE))]
            write_beside(temporary[0])
        # Not over the cards: that would wait for the work that is queued there.
        dist.broadcast_object_list(temporary, src=0, group=group, device=torch.device("cpu"))
        futures = async_save(
            dict(tensors),
            storage_writer=_Writer(temporary[0]),
            process_group=group,
            async_stager=copier,
        )
        place = stack.pop_all()
    return Writing(place, cast(AsyncSaveResponse, futures), directory)


@contextmanager
def _writing_errors(directory: Path) -> Iterator[None]:
    """Turn what torch raises while it writes into a `PlugError` that names ``directory``."""
    with plain_errors(directory):
        try:
            yield
        except CheckpointException as error:
            raise OSError(None, writing_reason(_first_failure(error))) from error


def read_sharded(directory: Path, tensors: dict[str, Any]) -> None:
    """Fill ``tensors`` in place from a checkpoint that any number of processes wrote.

    Args:
        directory: that `write_sharded` wrote.
        tensors: of the names and shapes that are wanted, sharded as this process needs them. Other
            values are replaced by those saved.

    Raises:
        PlugError: a file is missing or damaged, tensors have other names or shapes, or values are
            NaN or infinite.
    """
    try:
        load(tensors, storage_reader=_Reader(directory))
    except _UNREADABLE as error:
        raise _damaged(directory, error) from None
    check_finite(directory, _flat("", tensors))


def sharded_specs(directory: Path) -> dict[str, TensorSpec]:
    """Return what every tensor of a checkpoint is, by name; other values are left out.

    Raises:
        PlugError: the checkpoint is damaged.
    """
    try:
        found = _Reader(directory).read_metadata().state_dict_metadata
        return {
            name: TensorSpec(each.properties.dtype, tuple(each.size))
            for name, each in found.items()
            if isinstance(each, torch_metadata.TensorStorageMetadata)
        }
    except _UNREADABLE as error:
        raise _damaged(directory, error) from None


def read_whole(directory: Path, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    """Yield tensors of a checkpoint whole, one at a time, in a process that is alone.

    Args:
        directory: that `write_sharded` wrote, in any number of processes.
        names: of its tensors.

    Raises:
        PlugError: the checkpoint is damaged.
    """
    specs, reader = sharded_specs(directory), _Reader(directory)
    for name in names:
        wanted = {name: torch.empty(specs[name].shape, dtype=specs[name].dtype)}
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="torch.distributed is disabled")
                load(wanted, storage_reader=reader, no_dist=True)
        except _UNREADABLE as error:
            raise _damaged(directory, error) from None
        yield name, wanted[name]


class _Writer(FileSystemWriter):
    """Torch's, in several threads.

    What goes wrong in torch's own threads (`thread_count`) is lost, and what is left of the
    checkpoint passes for whole (torch 2.13 and 2.14).
    """

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> TorchFuture[list[WriteResult]]:
        write, prefix = super().write_data, plan.storage_data.prefix
        with ThreadPoolExecutor(_WRITERS) as pool:
            writing = [
                pool.submit(
                    write,
                    replace(
                        plan,
                        items=items,
                        storage_data=replace(plan.storage_data, prefix=f"{prefix}{number}_"),
                    ),
                    planner,
                )
                for number in range(_WRITERS)
                if (items := plan.items[number::_WRITERS])
            ]
        written: TorchFuture[list[WriteResult]] = TorchFuture()
        written.set_result([each for part in writing for each in part.result().wait()])
        return written


class _Reader(FileSystemReader):
    """Torch's, which reads `.metadata` once and runs nothing that its pickle names."""

    _metadata: torch_metadata.Metadata | None = None

    def read_metadata(self, *_args: Any, **_options: Any) -> torch_metadata.Metadata:
        if self._metadata is None:
            with (Path(self.path) / METADATA_FILE).open("rb") as file:
                metadata = _Unpickler(file).load()
            if not isinstance(metadata, torch_metadata.Metadata):
                raise pickle.UnpicklingError(f"{METADATA_FILE} holds something else")
            metadata.storage_meta = torch_metadata.StorageMeta(load_id=self.load_id)
            self._metadata = metadata
        return self._metadata


def _memory_format(cls: Any, name: Any) -> Any:
    """The member of that name of the one enum in a `.metadata`."""
    if cls is not _METADATA_CLASSES["_MEM_FORMAT_ENCODING"] or not isinstance(name, str):
        raise pickle.UnpicklingError(f"{METADATA_FILE} reads {name} of {cls}")
    return cls[name]


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module == torch_metadata.__name__ and name in _METADATA_CLASSES:
            return _METADATA_CLASSES[name]
        if (module, name) == (_StorageInfo.__module__, _StorageInfo.__name__):
            return _StorageInfo
        if (module, name) == ("builtins", "getattr"):  # as Python 3.11.2 pickles enums
            return _memory_format
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if (module, name) == ("torch", "Size"):
            return torch.Size
        if (module, name) == ("torch.serialization", "_get_layout"):
            return torch.serialization._get_layout
        if module.startswith("pathlib"):  # where it was written; nobody reads that
            return PureWindowsPath if "Windows" in name else PurePosixPath
        raise pickle.UnpicklingError(f"{METADATA_FILE} names {module}.{name}")


def _damaged(directory: Path, error: BaseException) -> PlugError:
    return PlugError(
        f"检查点 {directory} 已损坏，或与这个模型的形状不符（{_first_reason(error)}）。"
        "请用训练时的模型和设置，或从更早的检查点继续。"
    )


def is_sharded(directory: Path) -> bool:
    """Return whether ``directory`` holds what `write_sharded` wrote."""
    return (directory / METADATA_FILE).is_file()


def _flat(prefix: str, values: Mapping[str, Any]) -> Any:
    """This process's part of each tensor in nested dicts, with its name."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(f"{prefix}{name}.", value)
        elif isinstance(value, DTensor):
            yield f"{prefix}{name}", value.to_local()
        elif isinstance(value, Tensor):
            yield f"{prefix}{name}", value


def _first_reason(error: BaseException) -> str:
    """What went wrong in the first process that says so, on one line."""
    error = _first_failure(error)
    return str(error).strip().split("\n")[0][:200] or type(error).__name__


def _first_failure(error: BaseException) -> BaseException:
    """What the first process that failed has raised."""
    if isinstance(error, CheckpointException) and error.failures:
        return next(iter(error.failures.values()))[0]
    return error

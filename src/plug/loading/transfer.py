"""Weights from files into the memory of a device, without a copy of them in the host's memory.

Several threads read pieces of the files into page-locked buffers of their own; a device takes a
piece over while its thread reads the next. So what the files, the processor's copies and the bus
can do goes on at the same time, and the host holds a few pieces, whatever the model's size.
"""

from __future__ import annotations

import math
import os
import sys
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import torch
from torch import Tensor

from plug.checkpoints.weights import Place
from plug.errors import PlugError

THREADS = 8
PIECE_BYTES = 16 * 2**20
_BUFFERS = 2  # of a thread: one is filled while the other is taken over


class Part(NamedTuple):
    """A tensor, or a part of one, and where it goes.

    Args:
        place: of the whole tensor.
        target: contiguous, of the part's shape and any float dtype, on any device.
        region: a slice for each of the first one or two dimensions; empty is all of it.
    """

    place: Place
    target: Tensor
    region: tuple[slice, ...] = ()


Begun = Future["torch.cuda.Event | None"]


class _Piece(NamedTuple):
    file: Path
    dtype: torch.dtype
    start: int  # the first byte in the file
    runs: int  # stretches of bytes, one after the other in the target
    run_bytes: int
    stride: int  # from one's first byte to the next's
    target: Tensor  # 1-D


class Transfer:
    """Threads and buffers that fill tensors of one device; a context manager.

    Args:
        device: of every target.
        threads: that read; None is `THREADS`.
        piece_bytes: read at once by each.
    """

    def __init__(
        self,
        device: torch.device,
        threads: int | None = None,
        piece_bytes: int = PIECE_BYTES,
    ) -> None:
        self._device = device
        self._piece_bytes = piece_bytes
        self._pool = ThreadPoolExecutor(threads or THREADS, thread_name_prefix="plug-read")
        self._own = threading.local()
        self._files: dict[Path, int] = {}

    def __enter__(self) -> Transfer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._pool.shutdown(cancel_futures=True)
        for descriptor in self._files.values():
            os.close(descriptor)

    def fill(self, parts: Iterable[Part]) -> None:
        """Read all ``parts``; their values are there when it returns.

        Raises:
            PlugError: a file cannot be read, or ends too early.
        """
        self.finish(self.begin(parts))

    def begin(self, parts: Iterable[Part]) -> list[Begun]:
        """As `fill`, and return at once; targets must not be touched until `finish`."""
        pieces = [piece for part in parts for piece in _pieces(part, self._piece_bytes)]
        for file in {piece.file for piece in pieces} - self._files.keys():
            self._files[file] = os.open(file, os.O_RDONLY)
        ready = None
        if self._device.type == "cuda":  # what was asked of the targets' memory before
            ready = torch.cuda.Event()
            ready.record(torch.cuda.current_stream(self._device))
        return [self._pool.submit(self._read, piece, ready) for piece in pieces]

    def finish(self, begun: list[Begun]) -> None:
        """Wait for what `begin` returned.

        Raises:
            PlugError: as `fill`.
        """
        try:
            for each in begun:
                taken_over = each.result()
                if taken_over is not None:  # what is asked of the device from now on waits for it
                    torch.cuda.current_stream(self._device).wait_event(taken_over)
        finally:
            for each in begun:
                each.cancel()

    @torch.inference_mode()  # which is each thread's own, and targets may come from it
    def _read(self, piece: _Piece, ready: torch.cuda.Event | None) -> torch.cuda.Event | None:
        size = piece.runs * piece.run_bytes
        buffers = self._own_buffers()
        buffer = buffers.take(size)
        view = buffer.numpy().data
        for run in range(piece.runs):
            at = run * piece.run_bytes
            start = piece.start + run * piece.stride
            _read_bytes(self._files[piece.file], start, view[at : at + piece.run_bytes], piece.file)
        values = buffer[:size].view(piece.dtype)
        if ready is None:
            piece.target.copy_(values)
            return None
        with torch.cuda.stream(buffers.stream):
            ready.wait()
            piece.target.copy_(values, non_blocking=True)
            return buffers.give()

    def _own_buffers(self) -> _Buffers:
        """Of the thread that asks."""
        if not hasattr(self._own, "buffers"):
            self._own.buffers = _Buffers(self._device)
        return self._own.buffers


class _Buffers:
    """The host memory of one thread, and the stream on which a device takes it over."""

    def __init__(self, device: torch.device) -> None:
        self._on_cuda = device.type == "cuda"
        self.stream = torch.cuda.Stream(device) if self._on_cuda else None
        self._buffers = [torch.empty(0, dtype=torch.uint8) for _ in range(_BUFFERS)]
        self._taken_over: list[torch.cuda.Event | None] = [None] * _BUFFERS
        self._turn = 0

    def take(self, size: int) -> Tensor:
        """A buffer, (at least ``size``,) uint8, that is free."""
        self._turn = (self._turn + 1) % _BUFFERS
        if (event := self._taken_over[self._turn]) is not None:
            event.synchronize()
        if len(self._buffers[self._turn]) < size:
            self._buffers[self._turn] = torch.empty(
                size, dtype=torch.uint8, pin_memory=self._on_cuda
            )
        return self._buffers[self._turn]

    def give(self) -> torch.cuda.Event:
        """The buffer of the last `take` is free when the event has come, on the current stream."""
        event = torch.cuda.Event()
        event.record()
        self._taken_over[self._turn] = event
        return event


def _read_bytes(descriptor: int, start: int, view: memoryview, file: Path) -> None:
    done = 0
    while done < len(view):
        try:
            if sys.platform == "win32":  # has no `preadv`, and a descriptor's position is shared
                with file.open("rb", buffering=0) as stream:
                    stream.seek(start + done)
                    count = stream.readinto(view[done:])
            else:
                count = os.preadv(descriptor, [view[done:]], start + done)
        except OSError as error:
            raise PlugError(f"读不了 {file}：{error.strerror}。请检查磁盘后重试。") from None
        if not count:
            raise PlugError(f"{file} 已损坏：比应有的短。请重新取得模型。")
        done += count


def _pieces(part: Part, piece_bytes: int) -> Iterator[_Piece]:
    """``part``, cut so that none is larger than ``piece_bytes``, or than one row."""
    (file, start, spec), target = part.place, part.target.view(-1)
    size = spec.dtype.itemsize
    row = math.prod(spec.shape[1:])
    rows, columns = [*part.region, *[slice(None)] * 2][:2]
    first, last, _ = rows.indices(spec.shape[0])
    left, right, _ = columns.indices(row)
    if (left, right) == (0, row):  # whole rows: one stretch
        start, count = start + first * row * size, (last - first) * row
        at_once = piece_bytes // size
        for at in range(0, count, at_once):
            piece = target[at : at + at_once]
            yield _Piece(file, spec.dtype, start + at * size, 1, len(piece) * size, 0, piece)
        return
    width = right - left
    at_once = max(1, piece_bytes // (width * size))
    for at in range(first, last, at_once):
        count = min(at_once, last - at)
        piece = target[(at - first) * width : (at - first + count) * width]
        start_of_piece = start + (at * row + left) * size
        yield _Piece(file, spec.dtype, start_of_piece, count, width * size, row * size, piece)

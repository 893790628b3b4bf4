"""The processes that `torchrun` starts: joining them, agreeing, and failing as one."""

from __future__ import annotations

import os
import pickle
import socket
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _abort_process_group

from plug.device import find_device

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Processes:
    """Who works together: this process's number, how many there are, and its device.

    In training, `tensor` processes with neighbouring numbers compute one share of a batch together;
    there are `data_size` shares.
    """

    rank: int
    world_size: int
    device: torch.device
    tensor: int = 1

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def data_rank(self) -> int:
        return self.rank // self.tensor

    @property
    def data_size(self) -> int:
        return self.world_size // self.tensor


@contextmanager
def start_processes(device: str | None = None, *, joins_alone: bool = False) -> Iterator[Processes]:
    """Join the group that `torchrun` started, or be the only process.

    A process that `torchrun` started alone makes a group of one with ``joins_alone``.

    At the end, what was given to `close_with_group` is closed and the group is destroyed. After an
    error the group is aborted: destroying it would wait for the other processes, which `torchrun`
    ends.
    """
    local_rank, world_size = (
        int(os.environ.get(name, default))
        for name, default in (("LOCAL_RANK", 0), ("WORLD_SIZE", 1))
    )
    if device == "cuda" or (device is None and torch.cuda.is_available()):
        device = f"cuda:{local_rank}"
    chosen = find_device(device)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if world_size == 1 and not (joins_alone and "LOCAL_RANK" in os.environ):
        yield Processes(0, 1, chosen)
        return
    dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    try:
        yield Processes(dist.get_rank(), world_size, chosen)
        if chosen.type == "cuda":
            torch.cuda.synchronize(chosen)  # graphs that are closed must have ended
    except BaseException:
        _close_owners()
        if chosen.type == "cuda":
            with suppress(Exception):  # the error that is being raised matters more
                _abort_process_group()
        raise
    _close_owners()
    dist.destroy_process_group()


class Closable(Protocol):
    """Owns something that must go before the process group does."""

    def close(self) -> None:
        """Free it. May be called more than once."""


_owners: weakref.WeakSet[Closable] = weakref.WeakSet()


def close_with_group(owner: Closable) -> None:
    """Have ``owner.close()`` called before the process group goes, if the owner still exists.

    NCCL waits for CUDA graphs that hold collectives: with one of them alive, destroying the group
    never ends.
    """
    _owners.add(owner)


def _close_owners() -> None:
    for owner in list(_owners):
        owner.close()
    _owners.clear()


class Vote:
    """Called by all processes with a number each, returns the largest to all of them.

    It goes over the CPU: reading a number from a GPU would wait for all work that is queued there.
    """

    def __init__(self, world_size: int) -> None:
        self._group: dist.ProcessGroup | None = None
        self._is_alone = world_size == 1
        if not self._is_alone and dist.get_backend() != "gloo":
            self._group = dist.new_group(backend="gloo")

    def __call__(self, number: int) -> int:
        if self._is_alone:
            return number
        highest = torch.tensor(number)
        dist.all_reduce(highest, dist.ReduceOp.MAX, group=self._group)
        return int(highest)

    def gather(self, values: list[float]) -> list[list[float]]:
        """Return what each process called this with, by its number; over the CPU as well."""
        ours = torch.tensor(values, dtype=torch.float64)
        if self._is_alone:
            return [values]
        theirs = [torch.empty_like(ours) for _ in range(dist.get_world_size())]
        dist.all_gather(theirs, ours, group=self._group)
        return [each.tolist() for each in theirs]


class Line:
    """Brings objects from the first process to the others, in order, over the CPU.

    All processes make one at the same point. Whoever waits may wait for days; it hears at once when
    the other process is gone. The objects are ours: what a client sent is in them as text and
    numbers.
    """

    def __init__(self) -> None:
        self._group = dist.new_group(backend="gloo", timeout=timedelta(days=30))

    def send(self, value: object) -> None:
        """Send ``value`` to all others; from the first process."""
        data = pickle.dumps(value)
        dist.broadcast(torch.tensor(len(data)), 0, self._group)
        dist.broadcast(torch.frombuffer(bytearray(data), dtype=torch.uint8), 0, self._group)

    def receive(self) -> Any:
        """Wait for what the first process sends.

        Raises:
            RuntimeError: it is gone.
        """
        size = torch.tensor(0)
        dist.broadcast(size, 0, self._group)
        data = torch.empty(int(size), dtype=torch.uint8)
        dist.broadcast(data, 0, self._group)
        return pickle.loads(data.numpy().tobytes())


def agree(value: T) -> T:
    """What the first process has."""
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def is_first_to_fail() -> bool:
    """Whether none of the processes has failed before this one: then it tells of it.

    torchrun's agent keeps a store that knows; under the `deepspeed` launcher there is one once the
    processes have joined. Without one each process tells.
    """
    try:
        address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        # `TCPStore` would try for seconds, and print a stack.
        socket.create_connection(address, timeout=5).close()
        store = dist.TCPStore(  # type: ignore[attr-defined]
            *address, is_master=False, timeout=timedelta(seconds=5)
        )
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        return store.add(f"plug/failed/{attempt}", 1) == 1
    except (KeyError, OSError, RuntimeError):  # nobody there to ask
        return True


def is_loss_of_another(error: Exception) -> bool:
    """Whether it says that another process is gone, or does not answer."""
    if isinstance(error, (dist.DistBackendError, dist.DistNetworkError)):
        return True
    return isinstance(error, RuntimeError) and "gloo" in str(error)

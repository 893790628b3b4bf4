"""`OneShot`: all-reduce and all-gather of a few rows, by direct writes over NVLink.

NCCL takes 19 µs in a CUDA graph for the 16 KB that a decoding step reduces. Here every process
writes its rows into the others' memory, which PyTorch's symmetric memory maps, without multicast.
"""

from __future__ import annotations

import os
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from plug.kernels.launch import compile_kernel, launch

_THREADS = 256
_MOST_PROCESSES = 8
# Packets of 8 bytes a process sends at most: 1 MB, above which NCCL is as good.
_CAPACITY = 2**17


class OneShot:
    """The collectives of all processes of the group; all of them call the same in the same order.

    Results are the same to the last bit in all processes.
    """

    def __init__(self, device: torch.device) -> None:
        import torch.distributed._symmetric_memory as symmetric_memory

        # Multicast is not used, and setting it up can fail.
        os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
        self._rank, self._world = dist.get_rank(), dist.get_world_size()
        size = 2 * self._world * _CAPACITY * 16
        self._memory = symmetric_memory.empty(size, dtype=torch.uint8, device=device)
        self._memory.zero_()
        torch.cuda.synchronize(device)
        group = dist.group.WORLD
        assert group is not None, "there is no process group"
        self._handle = symmetric_memory.rendezvous(self._memory, group)
        dist.barrier()  # nobody writes before all have zeros
        self._places = torch.tensor(self._handle.buffer_ptrs, dtype=torch.int64, device=device)
        self._calls = torch.zeros(_CAPACITY // _THREADS, dtype=torch.int32, device=device)

    @classmethod
    def make(cls, device: torch.device) -> OneShot | None:
        """Return the collectives, or None where NCCL has to do: all processes get the same answer.

        It needs up to 8 processes on one machine, whose GPUs reach each other's memory.
        """
        world = dist.get_world_size()
        is_local = int(os.environ.get("LOCAL_WORLD_SIZE", world)) == world
        reaches = (
            device.type == "cuda"
            and is_local
            and 1 < world <= _MOST_PROCESSES
            and torch.cuda.device_count() >= world
            and all(
                other == device.index or torch.cuda.can_device_access_peer(device.index, other)
                for other in range(world)
            )
        )
        answers = [False] * world
        dist.all_gather_object(answers, reaches)
        return cls(device) if all(answers) else None

    def all_reduce(self, x: Tensor) -> Tensor:
        """Return the sum of all processes' ``x`` (rows, size), in half precision, rounded once."""
        out = torch.empty_like(x)
        self._launch(x, out, is_gather=False)
        return out

    def all_gather(self, x: Tensor) -> Tensor:
        """Return all processes' ``x`` (rows, size) side by side, (rows, world * size)."""
        out = x.new_empty(len(x), self._world * x.shape[1])
        self._launch(x, out, is_gather=True)
        return out

    @staticmethod
    def takes(x: Tensor) -> bool:
        """Return whether ``x`` (rows, size) is small enough, and its rows whole packets."""
        row = x.shape[1] * x.element_size()
        return row % 8 == 0 and len(x) * row <= 8 * _CAPACITY and x.is_contiguous()

    def _launch(self, x: Tensor, out: Tensor, *, is_gather: bool) -> None:
        count = x.numel() * x.element_size() // 8
        kernel = _kernel(is_gather, x.dtype == torch.float16, self._world, x.device.index)
        arguments = [x, out, self._places, self._calls]
        launch(
            kernel,
            -(-count // _THREADS),
            _THREADS,
            [*arguments, self._rank, count, count // len(x), _CAPACITY],
        )


@cache
def _kernel(is_gather: bool, is_half: bool, world: int, _device: int) -> Any:
    settings = {"GATHER": int(is_gather), "HALF": int(is_half), "WORLD": world}
    return compile_kernel("one_shot.cu", "one_shot", settings)

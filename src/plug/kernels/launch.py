"""Compile CUDA C++ kernels, and launch kernels so that they overlap with the kernel before them.

Programmatic dependent launch (compute capability 9.0 and above): a kernel launched with it starts
on multiprocessors that the kernel before it has left. It may read what no kernel writes, such as
weights. It then waits (`griddepcontrol.wait`, Triton's `gdc_wait`) until all earlier kernels have
ended and their results are visible. CUDA graphs keep this.

Every kernel launched so must wait before it reads results, and before it writes: memory that it
writes may still be read by a kernel before it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from typing import Any, cast

import torch
from torch import Tensor

_PROGRAMMATIC_STREAM_SERIALIZATION = 6  # of CUlaunchAttributeID


class _Attribute(ctypes.Structure):  # CUlaunchAttribute; its value is a union of 64 bytes
    _fields_ = (("id", ctypes.c_uint), ("pad", ctypes.c_uint), ("value", ctypes.c_uint * 16))


class _Config(ctypes.Structure):  # CUlaunchConfig
    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_memory", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("num_attributes", ctypes.c_uint),
    )


@cache
def overlaps(device: torch.device) -> bool:
    """Return whether kernels on ``device`` may start before the kernel before them has ended."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def overlap(device: torch.device) -> dict[str, bool]:
    """Return the keyword arguments that launch a Triton kernel with an `OVERLAP` parameter."""
    return {"OVERLAP": True, "launch_pdl": True} if overlaps(device) else {"OVERLAP": False}


def compile_kernel(file: str, name: str, settings: dict[str, int]) -> Any:
    """Compile a kernel for the current device, with PyTorch's NVRTC: no compiler is needed.

    Args:
        file: a CUDA C++ file beside this one.
        name: of the kernel in it.
        settings: macros to define.
    """
    defines = "".join(f"#define {key} {value}\n" for key, value in settings.items())
    source = (files("plug.kernels") / file).read_text(encoding="utf-8")
    return torch.cuda._compile_kernel(defines + source, name)


@cache
def _attribute() -> Any:
    """Return the pointer to the attribute that lets a kernel start early."""
    attribute = _Attribute(_PROGRAMMATIC_STREAM_SERIALIZATION, 0)
    attribute.value[0] = 1
    return ctypes.pointer(attribute)


@cache
def _launch_function() -> Any:
    # Kept: PyTorch opens the library anew at each call, which takes 50 µs and more.
    return torch.cuda._utils._get_gpu_runtime_library().cuLaunchKernelEx


def launch(kernel: Any, blocks: int, threads: int, arguments: Sequence[Tensor | int]) -> None:
    """Launch what `compile_kernel` returned on the current stream, overlapping where it can.

    Args:
        kernel: to launch.
        blocks: of the grid.
        threads: of a block.
        arguments: tensors become pointers, integers 32-bit integers; the first is a tensor.
    """
    device = cast(Tensor, arguments[0]).device
    values = [
        ctypes.c_void_p(each.data_ptr()) if isinstance(each, Tensor) else ctypes.c_int(each)
        for each in arguments
    ]
    pointers = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))
    config = _Config(
        (blocks, 1, 1),
        (threads, 1, 1),
        0,
        torch._C._cuda_getCurrentRawStream(device.index),
        _attribute(),
        overlaps(device),
    )
    status = _launch_function()(ctypes.byref(config), kernel.func, pointers, None)
    if status:
        torch.cuda._utils._check_cuda(status)

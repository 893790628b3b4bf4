"""Integers that each decoding step reads, in memory of huge pages.

A file is mapped in pages of 4 KB, and finding where a page lies takes time. From pages of 2 MB two
Xeon cores write 1.15 times as fast with the 27B in 4 bits (docs/experiments.md). Linux has those
for memory, not for files; so these weights are read into memory, and not mapped. All others stay
mapped.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from plug.checkpoints.weights import Place, damaged
from plug.loading.host_memory import limits_addresses

_HUGE = 2**21  # bytes of a page
_LEAST = _HUGE  # of a tensor
_LENT = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_OF_SOURCES = ("cross_attention.k_proj.", "cross_attention.v_proj.")


def read_by_steps(places: Mapping[str, Place]) -> dict[str, Place]:
    """Those of a quantised model's large tensors that a step reads; none where it gains nothing.

    A limit of addresses (``ulimit -v``) counts the mapped file and this memory, so that there all
    stay mapped.
    """
    if sys.platform != "linux" or limits_addresses() or not _are_lent():
        return {}
    integers = {
        name.rpartition(".")[0]
        for name, place in places.items()
        if name.startswith("decoder.layers.") and place.spec.dtype in (torch.int8, torch.uint8)
    }
    return {
        name: place
        for name, place in places.items()
        if name.rpartition(".")[0] in integers
        and not any(part in name for part in _OF_SOURCES)
        and place.spec.num_bytes >= _LEAST
    }


def read(place: Place) -> Tensor:
    """The tensor, in huge pages as far as the system has some.

    Raises:
        PlugError: the file is not what it was when its header was read.
    """
    memory = _new(place.spec.num_bytes)
    left = memoryview(memory)[: place.spec.num_bytes]
    try:
        with place.file.open("rb", buffering=0) as stream:
            stream.seek(place.start)
            while left:
                count = stream.readinto(left)
                if not count:
                    raise damaged(place.file, "文件比它的头部说的短")
                left = left[count:]
    except OSError as error:
        raise damaged(place.file, error.strerror or str(error)) from None
    shape = place.spec.shape
    found = torch.frombuffer(memory, dtype=place.spec.dtype, count=math.prod(shape))
    return found.view(shape)


def copy(tensor: Tensor) -> Tensor:
    """A copy in huge pages; where the system has none, ``tensor`` itself."""
    if sys.platform != "linux" or not _are_lent() or tensor.nbytes < _LEAST:
        return tensor
    memory = _new(tensor.nbytes)
    found = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel())
    return found.view(tensor.shape).copy_(tensor)


def _are_lent() -> bool:
    """Whether Linux gives huge pages to who asks."""
    try:
        return "[never]" not in _LENT.read_text(encoding="utf-8")
    except OSError:
        return False


def _new(size: int) -> mmap.mmap:
    size = -(-size // _HUGE) * _HUGE
    if sys.platform != "linux":
        return mmap.mmap(-1, size)
    else:  # noqa: RET505 (mypy skips it elsewhere)
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with contextlib.suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
        return memory

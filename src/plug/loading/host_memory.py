"""How much memory this process can still have on the host. By the files of Linux; no device."""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path

if sys.platform != "win32":
    import resource


def free_host_memory(root: Path = Path("/")) -> int | None:
    """Return the bytes that can be had without swapping; None where nobody says.

    The least of what the machine has available (the page cache counts, since it gives way), what
    each control group of the process leaves it, and the limit of its address space (`ulimit -v`).

    Args:
        root: where `proc` and `sys` are.
    """
    found = [*_available(root), *_left_by_groups(root), *_left_by_limit(root)]
    return max(0, min(found)) if found else None


def _available(root: Path) -> Iterator[int]:
    if found := re.search(r"^MemAvailable:\s*(\d+) kB", _read(root / "proc/meminfo"), re.MULTILINE):
        yield int(found[1]) * 1024


def _left_by_groups(root: Path) -> Iterator[int]:
    """Of both versions of control groups; inside a container its own group is the top."""
    for line in _read(root / "proc/self/cgroup").splitlines():
        number, controllers, path = line.split(":", 2)
        if number == "0":
            top, names = root / "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            top = root / "sys/fs/cgroup/memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        parts = [part for part in path.split("/") if part not in ("", "..")]
        for depth in range(len(parts) + 1):
            yield from _left_by_group(top.joinpath(*parts[:depth]), *names)


def _left_by_group(group: Path, limit: str, usage: str, reclaimable: str) -> Iterator[int]:
    with contextlib.suppress(ValueError):  # "max", or no such file
        allowed, used = int(_read(group / limit)), int(_read(group / usage))
        found = re.search(rf"^{reclaimable} (\d+)", _read(group / "memory.stat"), re.MULTILINE)
        yield allowed - used + (int(found[1]) if found else 0)


def limits_addresses() -> bool:
    """Whether the address space has a limit (`ulimit -v`), which mapped files count for."""
    if sys.platform == "win32":
        return False
    else:  # noqa: RET505 (mypy skips it there)
        return resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY


def _left_by_limit(root: Path) -> Iterator[int]:
    if sys.platform == "win32":
        yield from ()
    else:
        limit, _ = resource.getrlimit(resource.RLIMIT_AS)
        used = re.search(r"^VmSize:\s*(\d+) kB", _read(root / "proc/self/status"), re.MULTILINE)
        if limit != resource.RLIM_INFINITY and used:
            yield limit - int(used[1]) * 1024


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""

"""`python like_windows.py ARGUMENTS`: `plug ARGUMENTS` on a system that lacks what Windows lacks.

Further commands may follow, each after `then`; the exit status is that of the first that fails.

It is Linux all the same: other libraries are imported first, then what is of POSIX alone goes away,
and open files can be neither removed nor replaced. What Windows does beyond that is not tried here.
"""

from __future__ import annotations

import importlib
import mmap
import os
import signal
import socket
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

# What `plug` imports of others: they look at the system too, and Linux's is the one they find.
LIBRARIES = (
    "asyncio concurrent.futures ctypes multiprocessing subprocess tempfile "
    "numpy torch safetensors.torch tokenizers rich.console typer fastapi uvicorn "
    "uvicorn.protocols.http.httptools_impl"
)
MODULES = {"fcntl", "grp", "posix", "pty", "pwd", "resource", "syslog", "termios", "tty", "uvloop"}
NAMES: dict[Any, str] = {
    os: "fork forkpty register_at_fork preadv pwritev pread pwrite posix_fallocate statvfs fchown "
    "chown lchown getuid geteuid getgid getpgid setsid killpg mkfifo mknod sysconf uname nice sync "
    "sched_getaffinity sched_setaffinity wait3 wait4 RWF_NOWAIT O_DIRECTORY O_NOFOLLOW O_CLOEXEC",
    signal: "SIGKILL SIGHUP SIGBUS SIGALRM SIGUSR1 SIGUSR2 SIGCHLD SIGPIPE SIGQUIT alarm setitimer "
    "pthread_sigmask pause sigwait",
    socket: "AF_UNIX",
    mmap: "MADV_DONTNEED MADV_WILLNEED MAP_SHARED MAP_PRIVATE PROT_READ PROT_WRITE",
}


class NoPosix:
    """A finder that comes first, and says that modules of POSIX do not exist."""

    def find_spec(self, name: str, *_: object) -> None:
        if name in MODULES:
            raise ModuleNotFoundError(f"No module named '{name}'", name=name)


def held_files() -> set[str]:
    """The files that this process has open or mapped."""
    opened = {os.path.realpath(link) for link in Path("/proc/self/fd").iterdir()}
    lines = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    return opened | {line.split(maxsplit=5)[5] for line in lines if line.count("/") > 1}


def refuse_what_is_held(*paths: Any) -> None:
    """Fail as Windows does where one of the paths, or what is below it, is open."""
    for path in paths:
        if isinstance(path, (str, bytes, os.PathLike)):
            real = os.path.realpath(os.fsdecode(path))
            if any(held == real or held.startswith(real + os.sep) for held in held_files()):
                raise PermissionError(13, "used by another process", real)


def refusing(do: Callable[..., Any], given: int) -> Callable[..., Any]:
    """``do``, one of the functions of `os`, but not with its first ``given`` paths if held."""

    def careful(*paths: Any, **options: Any) -> Any:
        if not options.get("dir_fd"):
            refuse_what_is_held(*paths[:given])
        return do(*paths, **options)

    return careful


def opening_no_directory(do: Callable[..., int]) -> Callable[..., int]:
    def careful(path: Any, *arguments: Any, **options: Any) -> int:
        if not options.get("dir_fd") and Path(os.fsdecode(path)).is_dir():
            raise PermissionError(13, "Permission denied", str(path))
        return do(path, *arguments, **options)

    return careful


def become_windows() -> None:
    for name in LIBRARIES.split():
        importlib.import_module(name)
    for name in MODULES:
        sys.modules.pop(name, None)
    sys.meta_path.insert(0, NoPosix())  # type: ignore[arg-type]
    for module, names in NAMES.items():
        for name in names.split():
            if hasattr(module, name):
                delattr(module, name)
    for name, given in {"remove": 1, "unlink": 1, "rmdir": 1, "rename": 2, "replace": 2}.items():
        setattr(os, name, refusing(getattr(os, name), given))
    os.open = opening_no_directory(os.open)
    sysconfig.get_config_vars()  # cached
    sys.platform = "win32"


if __name__ == "__main__":
    become_windows()
    from plug.cli import main

    words = sys.argv[1:]
    while words:
        end = words.index("then") if "then" in words else len(words)
        sys.argv = ["plug", *words[:end]]
        words = words[end + 1 :]
        if status := main():
            sys.exit(status)

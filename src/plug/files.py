"""Files and directories that are written whole or not at all.

Every writer of the project goes through this module. New content gets a hidden name beside its
target, is synced to the disk, and is then renamed, so that a reader sees the old content or the new
content, also after `kill -9`, a full disk or a loss of power.

A killed process may leave these names. The next writer of NAME removes them:

`.NAME.lock`       Tells who writes NAME. It counts only while that process lives.
`.NAME.partial-X`  Content that was not finished.
`.NAME.old-X`      A directory that was being replaced. It goes back to NAME if NAME is missing.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import re
import secrets
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from plug.errors import PlugError, UsageError

if sys.platform != "win32":  # where no lock is taken, so that two writers are not kept apart
    import fcntl

logger = logging.getLogger(__name__)

_LEFTOVER = re.compile(r"\.(.+\.)?(lock|partial-\w+|old-\w+)")
_DRIVE = re.compile(r"([A-Za-z]):[\\/]")
_LONGEST_NAME = 200  # bytes of NAME in a hidden name; file systems allow 255 in all
_held: set[int] = set()  # descriptors of the locks that this process holds


class BusyError(PlugError):
    """Another process writes to the same target."""


# --- one file --------------------------------------------------------------------------------


@contextlib.contextmanager
def new_file(
    path: str | Path, mode: str = "w", *, replaces: bool = True, **options: Any
) -> Iterator[IO[Any]]:
    """Open a stream. What is written becomes the content of ``path`` when the block ends well.

    If the block fails, ``path`` is as it was. The parent directory is made if need be. A device or
    a pipe (`/dev/stdout`) is written to directly.

    Args:
        path: the file.
        mode: "w" (UTF-8 text) or "wb".
        replaces: whether a file that exists may be replaced.
        options: of `open`.

    Raises:
        UsageError: ``path`` is a directory, or a file that may not be replaced.
        BusyError: another process writes the same file.
        PlugError: the disk is full, or the file cannot be written.
    """
    target = _target(path)
    if "b" not in mode:
        options.setdefault("encoding", "utf-8")
    if target.is_dir():
        raise UsageError(f"{target} 是一个目录，不能写成文件。请换一个路径。")
    if target.exists() and not target.is_file():
        with plain_errors(target), target.open(mode, **options) as stream:
            yield stream
        return
    target = target.resolve()
    with plain_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with _lock(_hidden(target, "lock"), target):
            _remove_leftovers(target)
            if target.exists() and not replaces:
                raise UsageError(f"{target} 已存在，不会覆盖。请换一个文件名。")
            temporary = _hidden(target, f"partial-{secrets.token_hex(4)}")
            try:
                with temporary.open(mode.replace("w", "x"), **options) as stream:
                    yield stream
                    stream.flush()
                    os.fsync(stream.fileno())
                temporary.replace(target)
                sync(target.parent)
            finally:
                temporary.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write a UTF-8 file, as `new_file` does."""
    with new_file(path, newline="") as stream:
        stream.write(text)


def write_json(path: str | Path, values: object) -> None:
    """Write an indented JSON file, as `new_file` does."""
    write_text(path, json.dumps(values, ensure_ascii=False, indent=2) + "\n")


# --- one directory ---------------------------------------------------------------------------


def is_used(directory: Path) -> bool:
    """Whether ``directory`` exists and holds more than what a killed process left.

    Raises:
        PlugError: it cannot be looked at, such as a name that is too long.
    """
    with plain_errors(directory, "请检查路径和权限"):
        if not directory.is_dir():
            return directory.exists()
        return any(not _LEFTOVER.fullmatch(path.name) for path in directory.iterdir())


def refuse_used(target: Path) -> None:
    """Raise a `UsageError` unless ``target`` is free to be written."""
    if is_used(target):
        raise UsageError(f"{target} 已经存在，不会覆盖。请换一个目录，或先删去它。")


@contextlib.contextmanager
def new_directory(directory: str | Path) -> Iterator[Path]:
    """Yield an empty directory. It becomes ``directory`` when the block ends well.

    If the block fails, nothing is left.

    Raises:
        UsageError: ``directory`` is there already, and not empty.
        BusyError: another process writes it.
        PlugError: the disk is full, or the directory cannot be written.
    """
    with _place_directory(Path(directory), refuse_used) as temporary:
        yield temporary


@contextlib.contextmanager
def replace_directory(directory: str | Path, marker: str) -> Iterator[Path]:
    """Yield an empty directory. It takes the place of ``directory`` when the block ends well.

    If the block fails, ``directory`` is as it was.

    Args:
        directory: is missing or empty, or holds a file named ``marker``. Anything else is refused.
        marker: the name of a file, such as "config.json", that shows what may be replaced.

    Raises:
        UsageError: ``directory`` is a file, or holds something else.
        BusyError: another process writes it.
        PlugError: the disk is full, or the directory cannot be written.
    """

    def check(target: Path) -> None:
        if target.exists() and not target.is_dir():
            raise UsageError(f"{target} 是一个文件，不能写成目录。请换一个路径。")
        if is_used(target) and not (target / marker).is_file():
            raise UsageError(f"目录 {target} 里有别的东西，不会覆盖。请换一个目录。")

    with _place_directory(Path(directory), check) as temporary:
        yield temporary


@contextlib.contextmanager
def _place_directory(directory: Path, check: Callable[[Path], None]) -> Iterator[Path]:
    target = _target(directory).resolve()
    check(target)
    with plain_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with _lock(_hidden(target, "lock"), target):
            _remove_leftovers(target)
            check(target)  # again: another process may have written it since
            mark = secrets.token_hex(4)
            temporary, old = (_hidden(target, f"{kind}-{mark}") for kind in ("partial", "old"))
            try:
                temporary.mkdir()
                with _told_as(target, temporary):
                    yield temporary
                sync_tree(temporary)
                try:
                    temporary.rename(target)  # where there is none, or an empty one
                except OSError as error:
                    if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                        raise
                    check(target)
                    target.rename(old)
                    temporary.rename(target)
                sync(target.parent)
            finally:
                if old.exists() and not target.exists():  # stopped between the two renames
                    old.rename(target)
                for leftover in (temporary, old):
                    shutil.rmtree(leftover, ignore_errors=True)


def recover(directory: str | Path) -> None:
    """Put ``directory`` back if a process was killed while it replaced it.

    Readers call this where ``directory`` is missing. Nothing happens while a writer is at work.
    """
    target = Path(directory).expanduser().resolve()
    if target.exists() or not any(_leftovers(target, "old-")):
        return
    with (
        contextlib.suppress(OSError, BusyError),
        _lock(_hidden(target, "lock"), target),
    ):
        _remove_leftovers(target)


def remove_directory(directory: Path) -> None:
    """Remove a directory, which is never seen in part: it gets a hidden name first."""
    doomed = _hidden(directory, f"partial-{secrets.token_hex(4)}")
    with contextlib.suppress(FileNotFoundError):
        directory.rename(doomed)
        sync(directory.parent)
        shutil.rmtree(doomed, ignore_errors=True)


# --- a directory that one process fills over a long time -------------------------------------


@contextlib.contextmanager
def hold(directory: str | Path) -> Iterator[None]:
    """Be the only process that writes into ``directory``, which is made if need be.

    What killed processes left in it is removed. If it is still empty at the end, it goes again.

    Raises:
        BusyError: another process holds it.
        PlugError: it cannot be written.
    """
    target = _target(directory).resolve()
    with plain_errors(target):
        is_new = not target.exists()
        target.mkdir(parents=True, exist_ok=True)
        lock = _lock(target / ".lock", target)
        lock.__enter__()
    try:
        for path in target.iterdir():
            if _LEFTOVER.fullmatch(path.name) and ".partial-" in path.name:
                _remove(path)
        yield
    finally:
        lock.__exit__(None, None, None)
        if is_new:
            with contextlib.suppress(OSError):
                target.rmdir()


@contextlib.contextmanager
def add_files(directory: Path, last: str) -> Iterator[Path]:
    """Yield an empty directory. Its files move into ``directory`` when the block ends well.

    ``directory`` may hold other files; those of the same name are replaced. The file named ``last``
    moves last: where it is, all are. The caller holds ``directory``.

    Raises:
        PlugError: the disk is full, or ``directory`` cannot be written.
    """
    with plain_errors(directory):
        temporary = directory / f".files.partial-{secrets.token_hex(4)}"
        try:
            temporary.mkdir()
            with _told_as(directory, temporary):
                yield temporary
            sync_tree(temporary)
            for path in sorted(temporary.iterdir(), key=lambda path: path.name == last):
                if path.name == last:
                    sync(directory)
                path.replace(directory / path.name)
            sync(directory)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


# --- the parts -------------------------------------------------------------------------------


@contextlib.contextmanager
def plain_errors(
    target: Path, advice: str = "原有内容没有改动；请检查磁盘空间和权限后重试"
) -> Iterator[None]:
    """Turn an `OSError` of the block into a `PlugError` that names ``target``."""
    try:
        yield
    except BrokenPipeError:  # nobody reads what we print any more
        raise
    except OSError as error:
        raise PlugError(f"没能写入 {target}：{error.strerror or error}。{advice}。") from error


@contextlib.contextmanager
def _told_as(target: Path, temporary: Path) -> Iterator[None]:
    """Have errors of the block speak of ``target``: nobody knows the name of ``temporary``."""
    try:
        yield
    except PlugError as error:
        error.args = tuple(str(each).replace(str(temporary), str(target)) for each in error.args)
        raise


def sync(path: Path) -> None:
    """Flush one file, or the names in one directory, to the disk. Windows flushes files alone."""
    flags = os.O_RDONLY
    if sys.platform == "win32":
        if path.is_dir():
            return
        flags = os.O_RDWR  # what is open to be read is not flushed there
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    except OSError as error:  # file systems that cannot sync a directory
        if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not path.is_dir():
            raise
    finally:
        os.close(descriptor)


def sync_tree(directory: Path) -> None:
    """Flush every file and directory below ``directory``, and itself, to the disk."""
    for folder, _, names in os.walk(directory, topdown=False):
        for name in names:
            sync(Path(folder, name))
        sync(Path(folder))


def about_windows_path(path: str | Path) -> str:
    """What an error says of a path of Windows on another system; "" for any other path."""
    drive = _DRIVE.match(str(path))
    if drive is None or sys.platform == "win32":
        return ""
    there = f"/mnt/{drive[1].lower()}/" + str(path)[3:].replace("\\", "/")
    return f"{path} 是 Windows 的路径，这里不是 Windows。在 WSL 里应写 {there}。"


def _target(path: str | Path) -> Path:
    """Where to write; a path of Windows would become a name with backslashes in this folder."""
    if advice := about_windows_path(path):
        raise UsageError(advice)
    return Path(path).expanduser()


def _hidden(target: Path, suffix: str) -> Path:
    name = os.fsencode(target.name)
    if len(name) > _LONGEST_NAME:
        digest = hashlib.blake2b(name, digest_size=8).hexdigest()
        return target.with_name(f".{target.name[:40]}-{digest}.{suffix}")
    return target.with_name(f".{target.name}.{suffix}")


def _leftovers(target: Path, kind: str) -> Iterator[Path]:
    prefix = _hidden(target, kind).name
    with contextlib.suppress(FileNotFoundError):
        for path in list(target.parent.iterdir()):
            if path.name.startswith(prefix) and _LEFTOVER.fullmatch(path.name):
                yield path


def _remove_leftovers(target: Path) -> None:
    """Clean up after killed processes. The caller holds the lock, so no living one is at work."""
    old = sorted(_leftovers(target, "old-"), key=lambda path: path.stat().st_mtime)
    if old and not target.exists():
        logger.warning("%s 在替换时被中断，恢复原来的内容。", target)
        old.pop().rename(target)
        sync(target.parent)
    for path in (*old, *_leftovers(target, "partial-")):
        _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


# --- locks -----------------------------------------------------------------------------------


@contextlib.contextmanager
def wait_for(target: str | Path) -> Iterator[None]:
    """Be one of several processes that want to make ``target``: one at a time, the others wait.

    Raises:
        OSError: no file can be written beside ``target``.
    """
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    path = _hidden(target, "turn.lock")
    try:
        lock = _lock(path, target)
        lock.__enter__()
    except BusyError:
        logger.warning("另一个进程正在写 %s，等它完成。", target)
        lock = _lock(path, target, waits=True)
        lock.__enter__()
    try:
        yield
    finally:
        lock.__exit__(None, None, None)


@contextlib.contextmanager
def _lock(path: Path, target: Path, *, waits: bool = False) -> Iterator[None]:
    """Hold a lock file. The system lets go of it when the process dies, in any container.

    It is removed at the end. Its content tells people who holds it, and is read by nobody else.
    """
    descriptor = _acquire(path, waits)
    if descriptor is None:
        raise BusyError(
            f"{target} 正由另一个进程写入（{_holder(path)}）。请等它结束，或换一个路径。"
        )
    _held.add(descriptor)
    try:
        with contextlib.suppress(OSError):  # a full disk need not hinder the lock itself
            os.ftruncate(descriptor, 0)
            os.write(descriptor, _who_we_are())
        yield
    finally:
        if descriptor in _held:  # not in a forked child, which holds nothing
            _held.remove(descriptor)
            if sys.platform == "win32":  # which removes no open file
                os.close(descriptor)
            path.unlink(missing_ok=True)  # still held: nobody else can have it in between
            if sys.platform != "win32":
                os.close(descriptor)


def _acquire(path: Path, waits: bool) -> int | None:
    """The descriptor of the locked file; None if another process has it."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if sys.platform != "win32":
                fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if waits else fcntl.LOCK_NB))
            if _is_at(path, descriptor):
                return descriptor
        except BlockingIOError:
            os.close(descriptor)
            return None
        except OSError as error:
            if error.errno in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                logger.warning("%s 所在的文件系统不支持锁，不能防止两个进程同时写入。", path.parent)
                return descriptor
            os.close(descriptor)
            raise
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # its holder removed the file just now: try the new one


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _who_we_are() -> bytes:
    values = {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        "command": " ".join(sys.argv[:3]),
    }
    return json.dumps(values, ensure_ascii=False).encode(errors="replace")


def _holder(path: Path) -> str:
    try:
        values = json.loads(path.read_bytes())
        return "进程 {pid}，主机 {host}，{since} 开始：{command}".format(**values)
    except (OSError, ValueError, KeyError, TypeError):
        return f"见 {path}"


def _let_go_in_child() -> None:
    """A forked child (a worker that makes batches) must not keep its parent's locks alive."""
    for descriptor in _held:
        with contextlib.suppress(OSError):
            os.close(descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go_in_child)

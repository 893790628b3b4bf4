"""An original's checkpoint, converted once and kept beside it (`NAME.plug`) for the next time.

Where its parent directory cannot be written, the user's cache takes it. A file in the converted
directory records what it was made from; it is made anew when that has changed, or when one of its
own files is missing or cut off. Processes that start at once wait for the first.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from plug.checkpoints.directory import CONFIG_FILE
from plug.checkpoints.original import Progress, import_original
from plug.checkpoints.original_shards import find_shards
from plug.checkpoints.weights import write_json
from plug.errors import PlugError, UsageError

logger = logging.getLogger(__name__)

RECORD_FILE = "converted_from.json"
FORMAT = 1  # of what `import_original` writes; a higher one makes older directories stale


def converted(source: Path, progress: Callable[[], AbstractContextManager[Progress]]) -> Path:
    """The directory of ours that holds what ``source`` holds; converted now if need be.

    Args:
        source: an original's directory.
        progress: a context manager around a conversion, whose value is told bytes done and in all.

    Raises:
        UsageError: ``source`` is no such checkpoint, or something else has the place of the result.
        PlugError: a shard is damaged, or the disk is full.
    """
    source = source.resolve()
    target = _place(source)
    if _is_current(target, source):
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _lock(target):
            if not _is_current(target, source):
                _convert(source, target, progress)
    except OSError as error:
        raise PlugError(
            f"没能把 {source} 转换到 {target}：{error.strerror or error}。请检查磁盘空间和权限，"
            f"或自己转换：plug convert --from {source} --to 新目录"
        ) from error
    return target


def _place(source: Path) -> Path:
    if os.access(source.parent, os.W_OK):
        return source.with_name(f"{source.name}.plug")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    digest = hashlib.blake2b(str(source).encode(), digest_size=6).hexdigest()
    return cache / "plug" / f"{source.name}-{digest}.plug"


def _lock(target: Path) -> AbstractContextManager[object]:
    """Held by the one process that converts; the system lets go of it when that process dies."""
    lock = FileLock(target.with_name(f".{target.name}.lock"))
    try:
        return lock.acquire(timeout=0)
    except Timeout:
        logger.warning("另一个进程正在转换到 %s，等它完成。", target)
        return lock.acquire()


def _convert(
    source: Path, target: Path, progress: Callable[[], AbstractContextManager[Progress]]
) -> None:
    for leftover in target.parent.glob(f".{target.name}.partial-*"):  # of a process that was killed
        shutil.rmtree(leftover, ignore_errors=True)
    if target.exists():
        if not (target / RECORD_FILE).is_file():
            raise UsageError(
                f"{source} 是原版的权重，要转换到 {target}，那里却有别的东西，不会覆盖。"
                f"请把它移开，或自己转换：plug convert --from {source} --to 新目录"
            )
        logger.warning("%s 与 %s 不符或已损坏，重新转换。", target, source)
        shutil.rmtree(target)
    logger.warning("%s 是原版的权重，转换一次到 %s，以后直接使用。", source, target)
    made_from = _sizes_and_times(source)
    with progress() as advance:
        notes = import_original(source, target, progress=advance)
    for note in notes:
        logger.info(note)
    record = {"format": FORMAT, "source": made_from, "files": _sizes(target)}
    write_json(target / RECORD_FILE, record)


def _is_current(target: Path, source: Path) -> bool:
    try:
        record: dict[str, Any] = json.loads((target / RECORD_FILE).read_text(encoding="utf-8"))
        files = {name: (target / name).stat().st_size for name in record["files"]}
    except (OSError, ValueError, KeyError, TypeError):
        return False
    wanted = {"format": FORMAT, "source": _sizes_and_times(source), "files": files}
    return record == wanted


def _sizes_and_times(source: Path) -> dict[str, list[int]]:
    """Bytes and time of change (ns) of every file that a conversion reads."""
    paths = [source / CONFIG_FILE, source / "vocab.txt", *find_shards(source)]
    found = [(path, path.stat()) for path in paths if path.is_file()]
    return {str(path.relative_to(source)): [one.st_size, one.st_mtime_ns] for path, one in found}


def _sizes(directory: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in directory.iterdir()}

"""An original's checkpoint, converted once and kept beside it (`NAME.plug`) for the next time.

Where its parent directory cannot be written, the user's cache takes it. A file in the converted
directory records what it was made from; it is made anew when that has changed, or when one of its
own files is missing or cut off. The record is written with the rest, so a conversion that was
killed leaves nothing that counts. Processes that start at once wait for the first.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from plug.checkpoints.directory import CONFIG_FILE
from plug.checkpoints.original import OriginalReader, Progress, write_imported
from plug.checkpoints.original_shards import find_shards
from plug.errors import PlugError, UsageError
from plug.files import remove_directory, replace_directory, wait_for, write_json

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
        with wait_for(target):
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


def _convert(
    source: Path, target: Path, progress: Callable[[], AbstractContextManager[Progress]]
) -> None:
    if target.exists():
        if not (target / RECORD_FILE).is_file():
            raise UsageError(
                f"{source} 是原版的权重，要转换到 {target}，那里却有别的东西，不会覆盖。"
                f"请把它移开，或自己转换：plug convert --from {source} --to 新目录"
            )
        logger.warning("%s 与 %s 不符或已损坏，重新转换。", target, source)
        remove_directory(target)  # first: the disk may not hold both
    logger.warning("%s 是原版的权重，转换一次到 %s，以后直接使用。", source, target)
    made_from = _sizes_and_times(source)
    original = OriginalReader(source)
    with replace_directory(target, RECORD_FILE) as temporary, progress() as advance:
        notes = write_imported(original, temporary, progress=advance)
        record = {"format": FORMAT, "source": made_from, "files": _sizes(temporary)}
        write_json(temporary / RECORD_FILE, record)
    for note in notes:
        logger.info(note)


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

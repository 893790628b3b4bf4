"""Read JSON files that may be damaged or made to harm: what is read is what stands there."""

from __future__ import annotations

import json
import math
import stat
from pathlib import Path
from typing import Any, NoReturn

from plug.errors import PlugError

MAX_BYTES = 256 * 2**20


def read_json(path: Path, error: type[PlugError] = PlugError) -> Any:
    """Return the value of a JSON file.

    Args:
        path: of the file.
        error: raised where it cannot be read.

    Raises:
        PlugError: the file is missing, no regular file, larger than `MAX_BYTES`, not UTF-8 or not
            JSON; it nests too deeply, has a key twice in one object, or holds NaN or Infinity.
    """
    return parse_json(read_bytes(path, error), path, error)


def read_bytes(path: Path, error: type[PlugError] = PlugError, limit: int = MAX_BYTES) -> bytes:
    """Return the bytes of a regular file of at most ``limit`` bytes; raise ``error`` otherwise."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for a writer
            raise error(f"{path} 不是普通文件（是目录、管道或设备）。请换成真正的文件。")
        if status.st_size > limit:
            raise error(
                f"{path} 有 {status.st_size / 1e6:,.0f} MB，超过这类文件的上限"
                f" {limit / 1e6:,.0f} MB。请检查它是不是放错了的文件。"
            )
        return path.read_bytes()
    except OSError as reason:
        raise error(f"读不了 {path}：{reason.strerror or reason}。请检查路径和权限。") from None


def parse_json(content: bytes, source: object, error: type[PlugError] = PlugError) -> Any:
    """Return the value of JSON text; ``source`` names it in messages. Raises as `read_json`."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise error(f"{source} 里同一个对象有两个键 {twice[:80]!r}。请删去其中一个。")
        return values

    def constant(text: str) -> NoReturn:
        raise error(f"{source} 里有 {text[:80]}，它不是有限的数。请改正它。")

    def number(text: str) -> float:
        value = float(text)
        return value if math.isfinite(value) else constant(text)

    try:
        return json.loads(
            content.decode("utf-8"),
            object_pairs_hook=unique,
            parse_constant=constant,
            parse_float=number,
        )
    except RecursionError:
        raise error(f"{source} 的嵌套太深，不是正常的 JSON 文件。请重新取得它。") from None
    except ValueError as reason:  # also UnicodeDecodeError, and integers of thousands of digits
        raise error(f"{source} 不是有效的 JSON：{str(reason)[:200]}。") from None


def shown(value: object) -> str:
    """Return what a message shows of a value from a file: its `repr`, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}……"

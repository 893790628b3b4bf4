"""Texts in traditional characters: converted on request, and warned of where nobody asked.

The vocabulary of `plug-mini-zh` holds simplified characters. It cuts traditional ones into bytes,
and the model has learnt nothing about them.
"""

from __future__ import annotations

import functools
import logging
import threading
from typing import Any

from plug.errors import UsageError, install

logger = logging.getLogger(__name__)

# On 1,675 lines of 37 files no simplified text has so many, and of the same lines converted to
# traditional characters 97% do (the others are a few characters long).
_LEAST_COUNT = 2
_LEAST_SHARE = 0.1
_LOOKED_AT = 1000  # characters
_LAST_FREQUENT_BYTE = 0xC6  # Big5's first level, the 5,401 frequent characters, ends in this row

_lock = threading.Lock()  # converters of some packages keep state
_has_warned = threading.Event()


def as_read(text: str, simplify: bool) -> str:
    """Return a user's text as the model shall read it, in simplified characters if asked.

    Where it is not asked and the text is mostly traditional, a warning says so, once a process.

    Raises:
        UsageError: ``simplify`` is asked and OpenCC is not installed, or is broken.
    """
    if simplify:
        return to_simplified(text)
    if not _has_warned.is_set() and is_mostly_traditional(text):
        _has_warned.set()
        logger.warning(
            "文字多是繁体，模型只学过简体，结果会很差。请加 --simplify（Python：simplify=True）"
            "先转成简体。"
        )
    return text


def to_simplified(text: str) -> str:
    """Return ``text`` in simplified characters, by OpenCC; the layout stays as it is.

    Raises:
        UsageError: OpenCC is not installed, or is broken.
    """
    with _lock:
        return str(_converter().convert(text))


def is_mostly_traditional(text: str) -> bool:
    """Whether at least 2 and a tenth of the Chinese characters exist in traditional form alone.

    Text with kana is Japanese and never counts. The first 1,000 characters decide.
    """
    head = text[:_LOOKED_AT]
    if any("\u3041" <= character <= "\u30ff" for character in head):
        return False
    chinese = [character for character in head if "\u4e00" <= character <= "\u9fff"]
    found = sum(map(is_traditional_alone, chinese))
    return found >= max(_LEAST_COUNT, _LEAST_SHARE * len(chinese))


@functools.lru_cache(maxsize=4096)
def is_traditional_alone(character: str) -> bool:
    """Whether it is frequent in Taiwan's standard (Big5) and not in the mainland's (GB 2312)."""
    try:
        character.encode("gb2312")
    except UnicodeEncodeError:
        encoded = character.encode("big5", errors="ignore")
        return len(encoded) == 2 and encoded[0] <= _LAST_FREQUENT_BYTE
    return False


@functools.cache
def _converter() -> Any:
    try:
        import opencc
    except ImportError:
        raise UsageError(f"转成简体要用 OpenCC。请先安装：{install('opencc')}") from None
    try:
        return opencc.OpenCC("t2s")
    except Exception as error:  # the two packages overwrite each other's files
        raise UsageError(
            f"OpenCC 不能用（{error}）。OpenCC 和 opencc-python-reimplemented 会互相覆盖："
            "请都卸载，再装其中一个。"
        ) from None

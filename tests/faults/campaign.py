"""Try a reader with many damaged files, and count what it does with them."""

from __future__ import annotations

import collections
import signal
import traceback
from collections.abc import Callable, Iterable
from types import FrameType

from plug.errors import PlugError

LOADED, REFUSED = "loaded", "refused"
TRACEBACK, HANG, WRONG = "traceback", "hang", "wrong"


class WrongAnswerError(Exception):
    """A damaged file was taken for another valid one without a word."""


class _TooLongError(BaseException):
    pass


class Counts(collections.Counter[str]):
    """How many files had each outcome; ``faults`` tells of those that must not be, by number."""

    def __init__(self) -> None:
        super().__init__()
        self.faults: list[tuple[int, str]] = []


def campaign(
    copies: Iterable[bytes], read: Callable[[bytes], object], seconds: float = 10
) -> Counts:
    """Count the outcomes of ``read`` on each of ``copies``.

    Args:
        copies: from `mutate`.
        read: raises a `PlugError` to refuse a file, a `WrongAnswerError` if it was taken wrongly.
        seconds: a file that takes longer is a hang.
    """

    def stop(_signal: int, _frame: FrameType | None) -> None:
        raise _TooLongError

    counts = Counts()
    before = signal.signal(signal.SIGALRM, stop)
    try:
        for number, copy in enumerate(copies):
            outcome, told = _outcome(copy, read, seconds)
            counts[outcome] += 1
            if outcome not in (LOADED, REFUSED):
                counts.faults.append((number, told))
    finally:
        signal.signal(signal.SIGALRM, before)
    return counts


def _outcome(copy: bytes, read: Callable[[bytes], object], seconds: float) -> tuple[str, str]:
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        read(copy)
    except PlugError as error:
        message = str(error)
        is_sentence = "\n" not in message and "\x1b" not in message and len(message) < 1500
        return (REFUSED, "") if is_sentence else (TRACEBACK, f"no sentence: {message[:500]!r}")
    except WrongAnswerError as error:
        return WRONG, str(error)
    except _TooLongError:
        return HANG, traceback.format_exc(limit=-3)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException:  # also a panic of a library in Rust
        return TRACEBACK, traceback.format_exc(limit=-3)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    return LOADED, ""

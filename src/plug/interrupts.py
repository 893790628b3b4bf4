"""Ctrl-C and SIGTERM while a long run is at work: it saves what it has, and ends."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any


class Interrupted(KeyboardInterrupt):
    """A run was interrupted and saved. The message says where, and how to go on.

    Args:
        message: for the user.
        number: of the signal.
    """

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + number  # as shells count: 130 for Ctrl-C, 143 for SIGTERM


class Interrupts:
    """While the block runs, the first Ctrl-C or SIGTERM is noted in `asked`, and nothing else.

    A second Ctrl-C raises KeyboardInterrupt at once. Handlers that the caller's program has set
    stay, and so does everything where the block does not run in the main thread.
    """

    def __init__(self) -> None:
        self.asked: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                handler = signal.getsignal(number)
                if handler in (signal.SIG_DFL, signal.default_int_handler):
                    self._before[number] = handler
                    signal.signal(number, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.asked == signal.SIGINT:
            raise KeyboardInterrupt
        if self.asked is None and os.environ.get("RANK", "0") == "0":
            told = "正在保存检查点，然后结束。" + (
                "再按一次 Ctrl-C 立即结束。" if number == signal.SIGINT else ""
            )
            os.write(2, f"\n{told}\n".encode())  # `print` may be at work when the signal comes
        self.asked = self.asked or number


def ignore_signals(_worker: int = 0) -> None:
    """Let a worker process leave Ctrl-C and SIGTERM to its parent, which they reach as well."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)

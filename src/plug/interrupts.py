"""Ctrl-C and SIGTERM while a long run is at work: it saves what it has, and ends. And SIGBUS."""

from __future__ import annotations

import ctypes
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


def end_on_bus_errors() -> None:
    """Have SIGBUS end this process with a sentence and status 1, where nobody else handles it.

    It comes when a mapped file loses its end while weights are read from it, or its disk fails. A
    handler of Python's own would never run: the instruction that failed is tried again before it.
    So the C library calls this one at once, in the thread that reads.
    """
    number = getattr(signal, "SIGBUS", None)
    if number is None or signal.getsignal(number) != signal.SIG_DFL:  # Windows has none
        return
    ctypes.CDLL(None).signal(int(number), _ON_BUS_ERROR)


def _on_bus_error(_number: int) -> None:
    told = "读不到模型的文件了：它在使用中被截短或替换，或磁盘出错。请检查模型目录，然后重试。\n"
    os.write(2, told.encode())
    os._exit(1)


_ON_BUS_ERROR = ctypes.CFUNCTYPE(None, ctypes.c_int)(_on_bus_error)  # as C calls it; kept for ever

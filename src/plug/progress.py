"""Progress on standard error: a bar on a terminal, nothing or a line now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

LINES_EVERY = 15.0  # seconds between the lines of `StepProgress` where there is no terminal


@contextmanager
def counter(total: int) -> Iterator[Callable[[int], None]]:
    """Yield a function that is told how many of ``total`` are done."""
    console = Console(stderr=True)
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task("", total=total)
        yield lambda done: bar.update(task, completed=done)


@contextmanager
def byte_counter(title: str) -> Iterator[Callable[[int, int], None]]:
    """Yield a function that is told how many bytes are done, and how many there are."""
    console = Console(stderr=True)
    columns = (TextColumn(title), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task("")
        yield lambda done, total: bar.update(task, completed=done, total=total)


class StepProgress:
    """Show a training run's step, time left, tokens a second and losses.

    Args:
        steps: of the whole run.
        done: those done before, by a run that is resumed.
        shown: False in all processes but one.
    """

    def __init__(self, steps: int, done: int, shown: bool) -> None:
        self.steps, self.done, self.shown = steps, done, shown
        self.console = Console(stderr=True)
        self._began, self._first, self._last_line = time.perf_counter(), done, 0.0
        self._bar = Progress(
            TextColumn("{task.completed:.0f}/{task.total:.0f} 步"),
            BarColumn(),
            TextColumn("{task.description}"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not (shown and self.console.is_terminal),
        )
        self._task = self._bar.add_task("", total=steps, completed=done)

    def __enter__(self) -> StepProgress:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def update(self, done: int, tokens_per_second: float, losses: dict[str, float]) -> None:
        described = " ".join(f"{name} {value:.3f}" for name, value in losses.items())
        described += f"  {tokens_per_second:,.0f} 词元/秒"
        self._bar.update(self._task, completed=done, description=described)
        now = time.perf_counter()
        due = now - self._last_line >= LINES_EVERY or done == self.steps
        if self.shown and not self.console.is_terminal and due:
            self._last_line = now
            left = (now - self._began) / (done - self._first) * (self.steps - done)
            self.console.print(
                f"{done}/{self.steps} 步  {described}  剩余 {left:.0f} 秒", soft_wrap=True
            )

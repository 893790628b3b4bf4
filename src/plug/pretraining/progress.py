"""How far a run is: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from types import TracebackType

from rich import progress as bars
from rich.console import Console

LINES_EVERY = 15.0  # seconds between lines where there is no terminal


class Progress:
    """Shows step, time left, tokens/s and losses on standard error."""

    def __init__(self, steps: int, done: int, shown: bool) -> None:
        self.steps, self.done, self.shown = steps, done, shown
        self.console = Console(stderr=True)
        self._began, self._first, self._last_line = time.perf_counter(), done, 0.0
        self._bar = bars.Progress(
            bars.TextColumn("{task.completed:.0f}/{task.total:.0f} 步"),
            bars.BarColumn(),
            bars.TextColumn("{task.description}"),
            bars.TimeRemainingColumn(),
            console=self.console,
            disable=not (shown and self.console.is_terminal),
        )
        self._task = self._bar.add_task("", total=steps, completed=done)

    def __enter__(self) -> Progress:
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

"""Progress is a bar on a terminal, and lines now and then elsewhere."""

from __future__ import annotations

import pytest

import plug.progress as progress_module
from plug.progress import StepProgress, byte_counter, counter


def test_lines_come_now_and_then_and_at_the_end(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    seconds = iter([100.0, *(100.0 + 10 * step for step in range(1, 7))])
    monkeypatch.setattr(progress_module.time, "perf_counter", lambda: next(seconds))
    with StepProgress(8, 2, shown=True) as progress:  # resumed at step 2; 10 seconds a step
        for done in range(3, 9):
            progress.update(done, 12345.6, {"lm": 1.23456, "mlm": 2.0})
    lines = capfd.readouterr().err.splitlines()
    assert lines == [
        "3/8 步  lm 1.235 mlm 2.000  12,346 词元/秒  剩余 50 秒",
        "5/8 步  lm 1.235 mlm 2.000  12,346 词元/秒  剩余 30 秒",
        "7/8 步  lm 1.235 mlm 2.000  12,346 词元/秒  剩余 10 秒",
        "8/8 步  lm 1.235 mlm 2.000  12,346 词元/秒  剩余 0 秒",
    ]


def test_other_processes_are_silent(capfd: pytest.CaptureFixture[str]) -> None:
    with StepProgress(3, 0, shown=False) as progress:
        progress.update(3, 1.0, {"lm": 1.0})
    assert capfd.readouterr().err == ""


def test_counters_are_silent_where_there_is_no_terminal(
    capfd: pytest.CaptureFixture[str],
) -> None:
    with counter(3) as advance, byte_counter("转换") as tell:
        advance(2)
        tell(1, 2)
    assert capfd.readouterr() == ("", "")

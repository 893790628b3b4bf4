"""What a run tells of itself: log.csv, the plot, lines where there is no terminal."""

from __future__ import annotations

from pathlib import Path

import pytest

from plug.pretraining import progress as progress_module
from plug.pretraining.progress import Progress
from plug.pretraining.record import FIELDS, Record, plot_losses, read_rows


def row(step: int) -> dict[str, float]:
    return dict.fromkeys(FIELDS, 0.5) | {"step": step, "tokens": 100 * step, "seconds": 2 * step}


def test_rows_are_there_as_they_come(tmp_path: Path) -> None:
    record = Record(tmp_path / "log.csv", ["lm", "mlm"], 0)
    for step, losses in ((1, {"lm": 2.0, "mlm": 1.0}), (2, {"lm": 1.5})):
        record.add(row(step) | losses)
        assert len(read_rows(tmp_path / "log.csv")) == step
    first, second = read_rows(tmp_path / "log.csv")
    assert first == row(1) | {"lm": 2.0, "mlm": 1.0}
    assert second == row(2) | {"lm": 1.5}  # no mlm: an empty cell
    assert (tmp_path / "log.csv").read_text().count("\n") == 3


def test_resuming_keeps_the_rows_up_to_the_checkpoint(tmp_path: Path) -> None:
    record = Record(tmp_path / "log.csv", ["lm"], 0)
    for step in range(1, 6):
        record.add(row(step) | {"lm": 1.0})
    again = Record(tmp_path / "log.csv", ["lm"], 3)
    assert [kept["step"] for kept in read_rows(tmp_path / "log.csv")] == [1, 2, 3]
    assert again.seconds_before == 6
    assert Record(tmp_path / "log.csv", ["lm"], 0).seconds_before == 0
    assert read_rows(tmp_path / "log.csv") == []


def test_a_plot_of_losses_that_end_early(tmp_path: Path) -> None:
    record = Record(tmp_path / "log.csv", ["lm", "mlm"], 0)
    for step in range(1, 4):
        record.add(row(step) | {"lm": 1 / step} | ({"mlm": 2.0} if step < 2 else {}))
    plot_losses(tmp_path / "log.csv", tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "loss.png").stat().st_size > 5000


def test_lines_come_now_and_then_and_at_the_end(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    seconds = iter([100.0, *(100.0 + 10 * step for step in range(1, 7))])
    monkeypatch.setattr(progress_module.time, "perf_counter", lambda: next(seconds))
    with Progress(8, 2, shown=True) as progress:  # resumed at step 2; 10 seconds a step
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
    with Progress(3, 0, shown=False) as progress:
        progress.update(3, 1.0, {"lm": 1.0})
    assert capfd.readouterr().err == ""

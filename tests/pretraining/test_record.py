"""What a run tells of itself: log.csv, the plot, lines where there is no terminal."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest

from plug.pretraining.record import FIELDS, Record, loss_curves, plot_losses, read_rows


def row(step: int) -> dict[str, float]:
    return dict.fromkeys(FIELDS, 0.5) | {"step": step, "tokens": 100 * step, "seconds": 2 * step}


def test_rows_are_there_as_they_come(tmp_path: Path) -> None:
    record = Record(tmp_path / "log.csv", [*FIELDS, "lm", "mlm"], 0)
    for step, losses in ((1, {"lm": 2.0, "mlm": 1.0}), (2, {"lm": 1.5})):
        record.add(row(step) | losses)
        assert len(read_rows(tmp_path / "log.csv")) == step
    first, second = read_rows(tmp_path / "log.csv")
    assert first == row(1) | {"lm": 2.0, "mlm": 1.0}
    assert second == row(2) | {"lm": 1.5}  # no mlm: an empty cell
    assert (tmp_path / "log.csv").read_text().count("\n") == 3


def test_resuming_keeps_the_rows_up_to_the_checkpoint(tmp_path: Path) -> None:
    record = Record(tmp_path / "log.csv", [*FIELDS, "lm"], 0)
    for step in range(1, 6):
        record.add(row(step) | {"lm": 1.0})
    again = Record(tmp_path / "log.csv", [*FIELDS, "lm"], 3)
    assert [kept["step"] for kept in read_rows(tmp_path / "log.csv")] == [1, 2, 3]
    assert again.seconds_before == 6
    assert Record(tmp_path / "log.csv", [*FIELDS, "lm"], 0).seconds_before == 0
    assert read_rows(tmp_path / "log.csv") == []


@pytest.mark.usefixtures("drawn")
def test_a_plot_of_losses_that_end_early(tmp_path: Path) -> None:
    record = Record(tmp_path / "log.csv", [*FIELDS, "lm", "mlm"], 0)
    for step in range(1, 4):
        record.add(row(step) | {"lm": 1 / step} | ({"mlm": 2.0} if step < 2 else {}))
    plot_losses(tmp_path / "log.csv", tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "loss.png").stat().st_size > 5000


@pytest.mark.usefixtures("drawn")
def test_curves_leave_out_steps_that_were_skipped(tmp_path: Path) -> None:
    """An infinite loss was a traceback at the end of the run; a large one flattened the curves."""
    record = Record(tmp_path / "log.csv", [*FIELDS, "lm"], 0)
    losses = [math.inf, 3.0, 4567.0, math.nan, 2.0]
    for step, loss in enumerate(losses, start=1):
        record.add(row(step) | {"lm": loss})
    rows = read_rows(tmp_path / "log.csv")
    curves = loss_curves(rows, skipped=[2])
    assert [loss for _, loss in curves["lm"]] == [3.0, 2.0]
    plot_losses(tmp_path / "log.csv", tmp_path / "loss.png", skipped=[2])
    assert loss_curves(rows[:1]) == {}


def test_a_row_cut_off_by_a_kill_is_passed_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It stopped a resumption: its last cells were missing, or no numbers."""
    path = tmp_path / "log.csv"
    record = Record(path, [*FIELDS, "lm"], 0)
    for step in (1, 2):
        record.add(row(step) | {"lm": 1.0})
    whole = path.read_text()
    line = "3,300,6,0.5,0.5,0.5,1.25\n"
    for length in range(len(line)):
        path.write_text(whole + line[:length])
        assert [each["step"] for each in read_rows(path)] == [1, 2]
    assert not caplog.records
    path.write_text(whole + "oh,no\n" + line)
    assert [each["step"] for each in read_rows(path)] == [1, 2, 3]
    assert "有 1 行读不懂" in caplog.text
    Record(path, [*FIELDS, "lm"], 2)
    assert len(path.read_text().splitlines()) == 3


def test_a_kill_while_the_log_is_cut_back_loses_no_row(
    tmp_path: Path, kill: Callable[..., bool]
) -> None:
    path = tmp_path / "log.csv"
    number, alive = 0, False
    while not alive:
        number += 1
        record = Record(path, [*FIELDS, "lm"], 0)
        for step in range(1, 61):
            record.add(row(step) | {"lm": 1.0})
        alive = not kill(lambda: Record(path, [*FIELDS, "lm"], 50), number)
        assert len(read_rows(path)) in (60, 50)

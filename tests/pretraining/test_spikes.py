"""Which steps are passed over, against medians by NumPy; and what a run does with them."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from plug.errors import PlugError
from plug.loading.load import load
from plug.pretraining import loop, spikes
from plug.pretraining.gradients import Gradients
from plug.pretraining.record import read_rows
from plug.pretraining.run import pretrain
from plug.pretraining.settings import RunConfig
from plug.pretraining.spikes import FEWEST, MOST_IN_A_ROW, REMEMBERED, check_skipped, is_spike

Settings = Callable[..., RunConfig]


def test_a_spike_is_far_above_the_median_of_what_was_applied() -> None:
    rng = np.random.default_rng(0)
    norms: list[float] = []
    applied: list[float] = []
    for number in range(300):
        norm = float(rng.uniform(0.5, 1.5)) * (9.0 if number % 37 == 0 else 1.0)
        expected = len(applied) >= FEWEST and norm > 4 * np.median(applied[-REMEMBERED:])
        assert is_spike(norm, norms, 4.0) == expected, number
        if not expected:
            applied.append(norm)
    assert norms == applied[-REMEMBERED:]


def test_what_is_no_number_is_a_spike_from_the_beginning() -> None:
    norms: list[float] = []
    assert is_spike(math.nan, norms, 2.0)
    assert is_spike(math.inf, norms, 2.0)
    assert norms == []


def test_many_in_a_row_are_no_spikes() -> None:
    skipped = [3, *range(10, 10 + MOST_IN_A_ROW - 1)]
    check_skipped(skipped, skipped[-1])
    skipped.append(skipped[-1] + 1)
    with pytest.raises(PlugError, match=f"连续 {MOST_IN_A_ROW} 步"):
        check_skipped(skipped, skipped[-1])


@pytest.fixture
def broken_batches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Gradients of the batches of these steps are 1000 times too large."""
    steps: list[int] = []
    take_step, finish = loop.take_step, Gradients.finish
    now: list[int] = []

    def take(*arguments: Any) -> Any:
        now[:] = [arguments[-1]]
        return take_step(*arguments)

    def spoil(gradients: Gradients, max_norm: float) -> torch.Tensor:
        if now[0] in steps:
            for bucket in gradients._buckets:
                bucket.flat.mul_(1000)
        return finish(gradients, max_norm)

    monkeypatch.setattr(loop, "take_step", take)
    monkeypatch.setattr(Gradients, "finish", spoil)
    monkeypatch.setattr(spikes, "FEWEST", 3)
    return steps


def test_a_skipped_step_changes_nothing_and_is_logged(
    settings: Settings,
    tmp_path: Path,
    broken_batches: list[int],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The same weights as where that step's batch is passed over by its number."""
    broken_batches.append(4)
    made = {"steps": 7, "clip_grad_norm": 1e9}
    by_norm = settings(output=str(tmp_path / "norm"), skip_spikes=20.0, **made)
    pretrain(1, by_norm, device="cpu")
    assert "第 5 步的梯度范数" in caplog.text
    by_number = settings(output=str(tmp_path / "number"), skip_steps=[5], **made)
    pretrain(1, by_number, device="cpu")
    ours, theirs = (load(tmp_path / n / "model").state_dict() for n in ("norm", "number"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    for name, steps in (("norm", [1, 2, 3, 4, 5, 6, 7]), ("number", [1, 2, 3, 4, 6, 7])):
        rows = read_rows(tmp_path / name / "log.csv")
        assert [row["step"] for row in rows] == steps
        assert [row["skipped"] for row in rows if row["step"] > 5] == [1, 1]
        assert "| 5 |" in (tmp_path / name / "report" / "report.md").read_text()


def test_a_resumed_run_skips_as_an_unbroken_one(
    settings: Settings, tmp_path: Path, broken_batches: list[int]
) -> None:
    broken_batches += [3, 6]
    made = {"steps": 8, "checkpoint_every": 5, "skip_spikes": 20.0, "optimizer": "muon"}
    whole = settings(output=str(tmp_path / "whole"), **made)
    pretrain(1, whole, device="cpu")
    expected = load(tmp_path / "whole" / "model").state_dict()
    state = torch.load(tmp_path / "whole" / "checkpoint" / "training_state.pt")
    assert state["skipped"] == [3]
    assert len(state["norms"]) == 4
    (tmp_path / "whole" / "model").rename(tmp_path / "first")
    pretrain(1, whole, resume=True, device="cpu")
    ours = load(tmp_path / "whole" / "model").state_dict()
    assert all(torch.equal(ours[name], expected[name]) for name in expected)
    assert read_rows(tmp_path / "whole" / "log.csv")[-1]["skipped"] == 2


def test_resuming_where_the_source_is_clean(settings: Settings, tmp_path: Path) -> None:
    """The masked-LM head takes no steps there; its count of steps is no damage."""
    config = settings(steps=8, shapes=[[16, 16, 1.0]], mlm_fraction=0.5, checkpoint_every=6)
    pretrain(2, config, device="cpu")
    (tmp_path / "run" / "model").rename(tmp_path / "whole")
    pretrain(2, config, resume=True, device="cpu")
    ours, theirs = (load(tmp_path / n).state_dict() for n in ("run/model", "whole"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)

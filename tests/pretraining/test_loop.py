"""When checkpoints are saved: by steps, by time, and when a signal comes."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import plug.pretraining.loop as loop
from plug.interrupts import Interrupted
from plug.loading.load import load
from plug.pretraining.record import read_rows
from plug.pretraining.run import pretrain
from plug.pretraining.settings import RunConfig
from plug.pretraining.state import State

Settings = Callable[..., RunConfig]


@pytest.fixture
def saved_steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The steps at which checkpoints were saved."""
    steps: list[int] = []
    save = State.save

    def note(state: State, *arguments: Any) -> None:
        steps.append(state.step)
        save(state, *arguments)

    monkeypatch.setattr(State, "save", note)
    return steps


def test_a_checkpoint_is_due_after_minutes(
    settings: Settings, saved_steps: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clock is looked at once to begin with, once a step, and once after each checkpoint."""
    clock = iter(range(0, 10**6, 20))
    monkeypatch.setattr(loop, "monotonic", lambda: next(clock))
    pretrain(1, settings(steps=6, checkpoint_every=100, checkpoint_minutes=0.6), device="cpu")
    assert saved_steps == [2, 4]  # after 40 seconds each; the last step leaves the model instead


def test_without_minutes_steps_alone_count(settings: Settings, saved_steps: list[int]) -> None:
    pretrain(1, settings(steps=6, checkpoint_every=4, checkpoint_minutes=0.0), device="cpu")
    assert saved_steps == [4]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_signal_saves_and_the_resumed_run_is_the_unbroken_one(
    number: int, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = {"steps": 6, "dropout": 0.1, "log_every": 2, "workers": 1}
    whole = settings(output=str(tmp_path / "whole"), **made)
    pretrain(1, whole, device="cpu")
    broken = settings(**made)
    take_step = loop.take_step

    def interrupt(*arguments: Any) -> Any:
        if arguments[-1] == 2:  # the step
            os.kill(os.getpid(), number)
        return take_step(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "take_step", interrupt)
        with pytest.raises(Interrupted, match=r"第 3 步的检查点.*--resume") as caught:
            pretrain(1, broken, device="cpu")
    assert caught.value.exit_code == 128 + number
    assert not (tmp_path / "run" / "model").exists()

    pretrain(1, broken, resume=True, device="cpu")
    ours, theirs = (load(tmp_path / name / "model").state_dict() for name in ("run", "whole"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    for name in ("run", "whole"):
        assert [row["step"] for row in read_rows(tmp_path / name / "log.csv")] == [2, 4, 6]


def test_parts_of_a_batch_are_all_of_it() -> None:
    batch = {"input_ids": torch.arange(70).view(10, 7), "labels": torch.arange(10)}
    parts = list(loop.split(batch, 21))
    assert [len(part["labels"]) for part in parts] == [3, 3, 3, 1]
    for name, tensor in batch.items():
        assert torch.cat([part[name] for part in parts]).equal(tensor)
    assert len(list(loop.split(batch, 1))) == 10

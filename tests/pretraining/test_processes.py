"""Whole commands in processes of their own: two of them as one, Ctrl-C, what a user reads."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from plug.pretraining.record import read_rows
from plug.pretraining.run import pretrain
from plug.pretraining.settings import RunConfig
from plug.pretraining.watching import PROCESS_FIELDS

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
TWO_PROCESSES = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "plug"]

Command = Callable[..., list[str]]


@pytest.fixture
def command(settings: Callable[..., RunConfig], tmp_path: Path) -> Command:
    """Arguments for Python that run a stage with the given settings."""

    def make(stage: int, *options: str, launcher: list[str] | None = None, **changes: Any) -> Any:
        path = tmp_path / "settings.toml"
        values = {k: v for k, v in asdict(settings(**changes)).items() if not isinstance(v, dict)}
        lines = (f"{name} = {json.dumps(value)}" for name, value in values.items())
        path.write_text("\n".join(lines), encoding="utf-8")
        launcher = launcher or ["-m", "plug"]
        arguments = ["pretrain", f"stage{stage}", "--config", str(path), "--device", "cpu"]
        return [sys.executable, *launcher, *arguments, *options]

    return make


def run(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        arguments, env=ENVIRONMENT, capture_output=True, text=True, timeout=120, check=False
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "shapes", "optimizer"),
    [(1, [[32, 1.0]], "adamw"), (2, [[24, 16, 1.0], [16, 16, 1.0]], "muon")],
)
def test_two_processes_are_one(
    stage: int,
    shapes: list[list[float]],
    optimizer: str,
    command: Command,
    settings: Callable[..., RunConfig],
    run_together: Callable[..., list[Any]],
    tmp_path: Path,
) -> None:
    """Batches of 7 and of 6 or 8 rows, so that shares are uneven; losses to 1e-5."""
    made = {"shapes": shapes, "batch_tokens": 255, "checkpoint_every": 4, "mlm_fraction": 0.6}
    made["optimizer"] = optimizer
    made["skip_spikes"] = 50.0
    pretrain(stage, settings(output=str(tmp_path / "one"), **made), device="cpu")
    _, _, _, *words = command(stage, output=str(tmp_path / "two"), **made)  # after "python -m plug"
    two = run_together(2, "command", arguments=words)
    assert [each["status"] for each in two] == [0, 0], two
    assert [each["err"].count("6/6 步") for each in two] == [1, 0]  # the first alone tells of it

    ours, theirs = (read_rows(tmp_path / name / "log.csv") for name in ("one", "two"))
    assert len(ours) == len(theirs) == 6
    for one, other in zip(ours, theirs, strict=True):
        assert one.keys() == other.keys()
        for name in one.keys() - {"seconds", "tokens_per_second", "data_wait"}:
            assert other[name] == pytest.approx(one[name], rel=1e-5), name
    processes = read_rows(tmp_path / "two" / "processes.csv", PROCESS_FIELDS)
    assert [(row["step"], row["process"]) for row in processes] == [
        (step, process) for step in range(1, 7) for process in (0, 1)
    ]
    assert "各进程" in (tmp_path / "two" / "report" / "report.md").read_text()
    for part in ("checkpoint/training_state.pt", "model/model.safetensors", "loss.png"):
        assert (tmp_path / "two" / part).is_file()

    # The checkpoint that two processes left, finished by one: the same run, as nothing is dropped.
    (tmp_path / "two" / "model").rename(tmp_path / "theirs")
    pretrain(stage, settings(output=str(tmp_path / "two"), **made), resume=True, device="cpu")
    last, theirs_last = read_rows(tmp_path / "two" / "log.csv")[-1], theirs[-1]
    assert {name: last[name] for name in ("step", "tokens")} == {
        "step": 6,
        "tokens": ours[-1]["tokens"],
    }
    assert last["mlm" if stage == 1 else "lm"] == pytest.approx(
        theirs_last["mlm" if stage == 1 else "lm"], rel=1e-5
    )


@pytest.mark.slow
def test_an_error_ends_all_processes(command: Command, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine").touch()
    ended = run(command(1, launcher=TWO_PROCESSES))
    assert ended.returncode != 0
    assert "错误：输出目录" in ended.stderr
    assert "in pretrain" not in ended.stderr  # no traceback of ours
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["mine"]


@pytest.mark.slow
def test_ctrl_c_then_resume(command: Command, tmp_path: Path) -> None:
    changes = {"steps": 4000, "checkpoint_every": 3, "workers": 1}
    state = tmp_path / "run" / "checkpoint" / "training_state.pt"
    process = subprocess.Popen(
        command(1, **changes),
        env=ENVIRONMENT,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # a terminal sends Ctrl-C to workers as well
        # What a shell runs in the background ignores Ctrl-C, and so would its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        deadline = time.monotonic() + 60
        while not state.is_file() and time.monotonic() < deadline:
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stderr.close()  # type: ignore[union-attr]
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert "正在保存检查点" in errors
    assert re.search(r"已中断，第 \d+ 步的检查点在 .*--resume", errors)
    assert state.is_file()

    again = run(command(1, "--resume", "--set", "steps=5", **changes))
    assert again.returncode == 2
    assert "不同之处：steps" in again.stderr


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_torchrun_saves_for_both_processes(
    number: int, command: Command, tmp_path: Path
) -> None:
    """`torchrun` hands it on to its processes, which stop at the same step."""
    changes = {"steps": 4000, "checkpoint_every": 4000, "batch_tokens": 255, "workers": 1}
    log = tmp_path / "run" / "log.csv"
    process = subprocess.Popen(
        command(1, launcher=TWO_PROCESSES, **changes),
        env=ENVIRONMENT,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        deadline = time.monotonic() + 90
        while time.monotonic() < deadline and len(read_rows(log)) < 3:
            time.sleep(0.1)
        os.kill(process.pid, number)
        _, errors = process.communicate(timeout=90)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stderr.close()  # type: ignore[union-attr]
    assert process.returncode != 0
    assert errors.count("已中断，第") == 1, errors
    state = torch.load(tmp_path / "run" / "checkpoint" / "training_state.pt")
    assert state["step"] == read_rows(log)[-1]["step"] >= 3
    assert state["world_size"] == 2


def test_a_user_reads_one_line(command: Command, tmp_path: Path) -> None:
    ended = run(command(1, "--set", "learning_rate=1e30", "--set", "clip_grad_norm=1e30"))
    assert ended.returncode == 1
    lines = ended.stderr.strip().split("\n")
    assert lines[-1].startswith("错误：第 ")
    assert all("步  mlm" in line for line in lines[:-1])
    assert "\x1b" not in ended.stderr  # no bar, no colours: this is no terminal
    assert not (tmp_path / "run" / "model").exists()

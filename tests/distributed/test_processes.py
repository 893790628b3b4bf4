"""The command line in several processes: one speaks, and one failing ends all."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from plug.distributed.processes import is_first_to_fail
from plug.generation.generator import generate

Run = Callable[..., list[Any]]


def arguments(model: Path) -> list[str]:
    options = ["--device", "cpu", "--seed", "3", "--out-length", "9"]
    return ["generate", "山上有座庙，", "--model", str(model), *options]


def test_the_first_alone_prints(model_directory: Path, run_together: Run) -> None:
    first, second = run_together(2, "command", arguments=[*arguments(model_directory), "-v"])

    expected = generate(
        "山上有座庙，", model=model_directory, device="cpu", seed=3, out_length=9
    ).text
    assert first["out"] == expected + "\n"
    assert (first["status"], second) == (0, {"status": 0, "out": "", "err": ""})


@pytest.mark.parametrize("failing_rank", [0, 1])
def test_one_that_fails_ends_all_with_one_message(
    failing_rank: int, model_directory: Path, run_together: Run
) -> None:
    answers = run_together(
        2, "command", arguments=arguments(model_directory), failing_rank=failing_rank
    )

    assert [answer["status"] for answer in answers] == [1, 1]
    assert answers[failing_rank]["err"] == "错误：显存用完了。\n"
    assert answers[1 - failing_rank]["err"] == ""


def test_wrong_use_is_told_once(model_directory: Path, run_together: Run) -> None:
    answers = run_together(2, "command", arguments=[*arguments(model_directory), "--file", "-"])

    assert [answer["status"] for answer in answers] == [2, 2]
    assert "".join(answer["err"] for answer in answers).count("错误：") == 1


def test_a_model_that_cannot_be_shared_out_is_told_of_once(
    model_directory: Path, run_together: Run
) -> None:
    answers = run_together(3, "command", arguments=arguments(model_directory))

    assert [answer["status"] for answer in answers] == [2, 2, 2]
    said = "".join(answer["err"] for answer in answers)
    assert said.startswith("错误：num_attention_heads=4 不能被进程数 3 整除")
    assert said.count("\n") == 1


@pytest.mark.parametrize("fails", [False, True])
def test_what_keeps_the_group_alive_is_closed_first(fails: bool, run_together: Run) -> None:
    answers = run_together(2, "close", fails=fails)

    # After an error the group is not destroyed, which would wait for the others.
    assert answers == [{"saw": [True], "is_left": fails}] * 2


def test_without_a_store_to_ask_each_process_tells_at_once(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as taken:  # a port that nobody listens on
        taken.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", str(taken.getsockname()[1]))
        began = time.monotonic()
        assert is_first_to_fail()
    assert time.monotonic() - began < 4  # `TCPStore` tries for 5 seconds
    assert capfd.readouterr().err == ""


@pytest.mark.slow
def test_torchrun_starts_them(model_directory: Path) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}

    done = subprocess.run(
        [*launcher, "-m", "plug", *arguments(model_directory)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )

    expected = generate(
        "山上有座庙，", model=model_directory, device="cpu", seed=3, out_length=9
    ).text
    assert done.stdout == expected + "\n"

"""A fine-tuning run that is killed, interrupted or out of disk goes on as if it had not been."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from plug import files
from plug.errors import PlugError
from plug.finetuning.checkpoints import SYNCED_FILE, check_checkpoint, last_checkpoint
from plug.finetuning.predict import Predictor
from plug.finetuning.run import finetune
from plug.finetuning.settings import FinetuneSettings
from plug.interrupts import Interrupted

Make = Callable[..., FinetuneSettings]


class SignalAt(TrainerCallback):
    """Sends this process a signal within a step."""

    def __init__(self, step: int, number: int = signal.SIGINT) -> None:
        self.step, self.number = step, number

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        if state.global_step + 1 == self.step:
            os.kill(os.getpid(), self.number)


def same_weights(first: str, second: str) -> None:
    actual, expected = (load_file(f"{output}/model.safetensors") for output in (first, second))
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("step", "number"), [(1, signal.SIGINT), (6, signal.SIGTERM), (8, signal.SIGINT)]
)
def test_a_signal_saves_and_the_resumed_run_ends_as_an_unbroken_one(
    step: int,
    number: int,
    settings: Make,
    data: Callable[..., Path],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """In the first step, amid the second epoch, and at its end."""
    options = {"epochs": 3.0, "batch_size": 5, "child_tuning": 0.5}
    whole = settings("classification", data("classification"), **options)
    finetune(whole, device="cpu")
    broken = settings("classification", data("classification"), output=f"{tmp_path}/2", **options)
    handlers = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(Interrupted, match=rf"第 {step} 步的检查点.*--resume") as caught:
        finetune(broken, device="cpu", callbacks=[SignalAt(step, number)])
    assert caught.value.exit_code == 128 + number
    assert "正在保存检查点" in capfd.readouterr().err
    assert handlers == [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]

    finetune(broken, device="cpu", resume=True)
    same_weights(broken.output, whole.output)
    assert not (tmp_path / "2" / "checkpoints").exists()


def test_a_second_ctrl_c_ends_at_once(settings: Make, data: Callable[..., Path]) -> None:
    run = settings("classification", data("classification"), batch_size=5)
    with pytest.raises(KeyboardInterrupt) as caught:
        finetune(run, device="cpu", callbacks=[SignalAt(1), SignalAt(1)])
    assert not isinstance(caught.value, Interrupted)


class Stop(TrainerCallback):
    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        if state.global_step == state.max_steps:
            raise KeyboardInterrupt


def test_a_run_killed_anywhere_in_its_final_save_is_resumed(
    settings: Make,
    data: Callable[..., Path],
    tmp_path: Path,
    kill: Callable[..., bool],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("plug.evaluation.report.find_spec", lambda _: None)  # plots take seconds
    run = settings("classification", data("classification"))
    with pytest.raises(KeyboardInterrupt):
        finetune(run, device="cpu", callbacks=[Stop()])
    output = Path(run.output)
    output.rename(tmp_path / "saved")
    number, alive, metrics = -10, False, []
    while not alive:
        number += 13  # of some 100 events; `tests/faults/kills.py` tries all
        shutil.copytree(tmp_path / "saved", output)
        alive = not kill(lambda: finetune(run, device="cpu", resume=True), number)
        if (output / "config.json").is_file():  # what counts as finished is whole
            Predictor(output, "cpu")
        if not alive and not (
            (output / "config.json").is_file() and not (output / "checkpoints").exists()
        ):
            metrics.append(finetune(run, device="cpu", resume=True).metrics)
        assert not (output / "checkpoints").exists()
        Predictor(output, "cpu")
        shutil.rmtree(output)
    assert number > 30
    assert all(each == metrics[0] for each in metrics)


@pytest.mark.parametrize("limit", [20_000, 250_000])
def test_a_full_disk_is_one_line_and_the_run_goes_on(
    limit: int,
    settings: Make,
    data: Callable[..., Path],
    full_disk: Callable[[int], AbstractContextManager[None]],
) -> None:
    """The limit strikes the model's weights, or the optimiser's state."""
    run = settings("classification", data("classification"))
    with full_disk(limit), pytest.raises(PlugError, match=r"没能写入 .*--resume") as caught:
        finetune(run, device="cpu")
    assert "\n" not in str(caught.value)
    finetune(run, device="cpu", resume=True)
    assert not (Path(run.output) / "checkpoints").exists()


def test_a_second_run_with_the_same_output_is_refused(
    settings: Make, data: Callable[..., Path]
) -> None:
    run = settings("classification", data("classification"))
    with files.hold(run.output), pytest.raises(PlugError, match="正由另一个进程写入"):
        finetune(run, device="cpu")


def test_which_checkpoint_counts(tmp_path: Path) -> None:
    assert last_checkpoint(tmp_path / "none") is None
    contents = {2: "{}", 4: "{}", 10: "{}", 12: "", 14: '{"epo'}
    for step, state in contents.items():
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(state)
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-10"
    (tmp_path / "checkpoint-4" / SYNCED_FILE).touch()
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-4"


def test_a_damaged_checkpoint_is_a_sentence(tmp_path: Path) -> None:
    torch.save({"a": 1}, tmp_path / "optimizer.pt")
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    check_checkpoint(tmp_path)

    save_file({"a": torch.tensor([float("nan")])}, tmp_path / "model.safetensors")
    with pytest.raises(PlugError, match="NaN"):
        check_checkpoint(tmp_path)

    for name in ("model.safetensors", "optimizer.pt"):
        save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
        file = tmp_path / name
        file.write_bytes(file.read_bytes()[:-3])
        with pytest.raises(PlugError, match=f"{name} 已损坏"):
            check_checkpoint(tmp_path)

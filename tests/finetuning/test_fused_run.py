"""`finetune` with steps inside the backward pass: it learns, resumes exactly, and refuses early."""

from __future__ import annotations

import importlib.util
import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from plug.errors import UsageError
from plug.finetuning import run
from plug.finetuning.predict import Predictor
from plug.finetuning.run import finetune
from plug.finetuning.settings import FinetuneSettings
from plug.hf.base import PlugPreTrainedModel
from plug.loading.save import save
from plug.model.configuration import PlugConfig
from plug.model.plug import Plug
from plug.quantization.convert import quantize_directory
from plug.tokenization import PlugTokenizer

Make = Callable[..., FinetuneSettings]


@pytest.fixture
def dropping_base(config: PlugConfig, tiny_tokenizer: PlugTokenizer, tmp_path: Path) -> Path:
    """A model with dropout."""
    torch.manual_seed(0)
    save(Plug(config), tmp_path / "dropping", tokenizer=tiny_tokenizer)
    return tmp_path / "dropping"


def log(settings: FinetuneSettings) -> list[dict[str, Any]]:
    """Losses, rates and scores; the last line has times, and a loss since the run was resumed."""
    lines = Path(settings.output, "log.jsonl").read_text().splitlines()
    return list(map(json.loads, lines[:-1]))


@pytest.mark.parametrize(
    ("task", "times"),
    [("classification", 25), pytest.param("generation", 40, marks=pytest.mark.slow)],
)
def test_twenty_examples_are_learnt_in_bfloat16(
    task: str, times: int, settings: Make, data: Callable[..., Path]
) -> None:
    once = data(task)
    options = {"eval": str(once), "epochs": 3.0, "optimizer": "adafactor"}
    made = settings(task, data(task, times), **options)
    result = finetune(made, device="cpu")

    assert result.metrics["accuracy" if task == "classification" else "exact_match"] == 1.0
    weights = load_file(result.directory / "model.safetensors")
    assert {each.dtype for each in weights.values()} == {torch.bfloat16}
    assert not any("grad_norm" in row for row in log(made))
    predictor = Predictor(result.directory, "cpu")
    examples = predictor.read(once)
    scores = predictor.kind.evaluate(examples, predictor(examples, batch_size=7)).metrics
    assert scores == pytest.approx(result.metrics, abs=0.05)


class StopAt(TrainerCallback):
    """What a kill looks like: the run ends after the first checkpoint from ``step`` on."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        if state.global_step >= self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize("optimizer", ["adafactor", "adamw8bit_fused"])
def test_a_resumed_run_ends_as_an_unbroken_one(
    optimizer: str, dropping_base: Path, settings: Make, data: Callable[..., Path], tmp_path: Path
) -> None:
    train = data("classification")
    options: dict[str, Any] = {
        "epochs": 3.0, "batch_size": 5, "layer_decay": 0.9, "optimizer": optimizer,
        "model": str(dropping_base), "gradient_checkpointing": True,
    }  # fmt: skip
    whole = settings("classification", train, **options)
    finetune(whole, device="cpu")
    broken = settings("classification", train, output=f"{tmp_path}/2", **options)
    with pytest.raises(KeyboardInterrupt):
        finetune(broken, device="cpu", callbacks=[StopAt(8)])
    finetune(broken, device="cpu", resume=True)

    assert log(broken) == log(whole)
    expected, actual = (load_file(f"{run.output}/model.safetensors") for run in (whole, broken))
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


# As the second checkpoint is saved: its weights are there, its optimizer's state is half there.
KILLED = """
import json, os, signal, sys
import torch
from plug.finetuning.run import finetune
from plug.finetuning.settings import FinetuneSettings

save = torch.save

def killed(value, path, *args, **options):
    save(value, path, *args, **options)
    if "checkpoint-8" in str(path) and "optimizer" in str(path):
        os.truncate(path, os.path.getsize(path) // 2)
        os.kill(os.getpid(), signal.SIGKILL)

torch.save = killed
torch.set_num_threads(1)
finetune(FinetuneSettings(**json.loads(sys.argv[1])), device="cpu")
"""


@pytest.mark.slow
def test_a_run_killed_in_the_middle_of_a_save_ends_as_an_unbroken_one(
    dropping_base: Path, settings: Make, data: Callable[..., Path], tmp_path: Path
) -> None:
    train = data("classification")
    options: dict[str, Any] = {
        "epochs": 3.0, "batch_size": 5, "optimizer": "adafactor", "model": str(dropping_base),
    }  # fmt: skip
    broken = settings("classification", train, output=f"{tmp_path}/2", **options)
    command = [sys.executable, "-c", KILLED, json.dumps(broken.to_dict())]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == -signal.SIGKILL, ran.stderr
    checkpoints = Path(broken.output, "checkpoints")
    assert (checkpoints / "checkpoint-8" / "model.safetensors").is_file()
    finetune(broken, device="cpu", resume=True)

    whole = settings("classification", train, **options)
    finetune(whole, device="cpu")
    assert log(broken) == log(whole)
    expected, actual = (load_file(f"{run.output}/model.safetensors") for run in (whole, broken))
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_layer_rates_and_weight_decay_are_adamw_s(
    settings: Make, data: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    groups = {}
    original = run.FinetuneTrainer.create_optimizer

    def kept(self: Any, *args: Any) -> Any:
        optimizer = original(self, *args)
        names = {id(each): name for name, each in self.model.named_parameters()}
        groups[self.settings.optimizer] = {
            (group["lr"], group["weight_decay"]): [names[id(each)] for each in group["params"]]
            for group in optimizer.param_groups
        }
        return optimizer

    monkeypatch.setattr(run.FinetuneTrainer, "create_optimizer", kept)
    for optimizer in ("adamw", "adafactor", "adamw8bit_fused"):
        options: dict[str, Any] = {"optimizer": optimizer, "output": f"{tmp_path}/{optimizer}"}
        train = data("classification")
        finetune(settings("classification", train, layer_decay=0.5, **options), device="cpu")
    assert groups["adafactor"] == groups["adamw8bit_fused"] == groups["adamw"]
    assert len(groups["adamw"]) > 4


def test_the_weights_stay_silent_about_small_steps(
    settings: Make,
    data: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Stochastic rounding does not lose them; nothing is ever in another dtype."""
    seen = set()
    original = PlugPreTrainedModel.run_encoder

    def looked_at(self: Any, *args: Any) -> Any:
        seen.update(each.dtype for each in self.parameters())
        return original(self, *args)

    monkeypatch.setattr(PlugPreTrainedModel, "run_encoder", looked_at)
    finetune(
        settings("classification", data("classification"), optimizer="adafactor"), device="cpu"
    )
    assert seen == {torch.bfloat16}
    assert "会被舍去" not in caplog.text


@pytest.mark.parametrize("processes", [2, 4])
def test_several_processes_are_refused(
    processes: int, settings: Make, data: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    with pytest.raises(
        UsageError, match=f"各进程（{processes} 个）的梯度来不及相加。请只用一个进程"
    ):
        finetune(settings("classification", data("classification"), optimizer="adafactor"))


def test_several_processes_do_not_keep_a_copy_each(
    settings: Make, data: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    made = settings(
        "classification", data("classification"), optimizer="adamw8bit_fused",
        parallel={"sharding": "none"},
    )  # fmt: skip
    with pytest.raises(UsageError, match=r"或去掉 parallel\.sharding=none"):
        finetune(made)


def test_a_quantised_model_is_refused(
    base_model: Path, settings: Make, data: Callable[..., Path], tmp_path: Path
) -> None:
    quantize_directory(base_model, tmp_path / "small", bits=8)
    made = settings(
        "classification", data("classification"), model=str(tmp_path / "small"),
        memory="full", optimizer="adafactor",
    )  # fmt: skip
    with pytest.raises(
        UsageError, match=r"的权重是 8 位整数，不能训练每个权重。请用 --memory qlora"
    ):
        finetune(made, device="cpu")
    assert not Path(made.output, "finetuning.json").exists()


@pytest.mark.parametrize("changes", [{"optimizer": "adafactor"}, {"fgm": 1.0}])
def test_auto_does_not_drop_what_a_quantised_model_cannot_do(
    changes: dict[str, Any],
    base_model: Path,
    settings: Make,
    data: Callable[..., Path],
    tmp_path: Path,
) -> None:
    quantize_directory(base_model, tmp_path / "small", bits=8)
    made = settings("classification", data("classification"), model=f"{tmp_path}/small", **changes)
    with pytest.raises(UsageError, match="模型的权重是 8 位整数，不能训练每个权重"):
        finetune(made, device="cpu")


def test_adamw_with_states_in_8_bits_needs_torchao(
    settings: Make, data: Callable[..., Path]
) -> None:
    made = settings("classification", data("classification"), optimizer="adamw8bit")
    if importlib.util.find_spec("torchao") is None:
        with pytest.raises(UsageError, match=r"要用 torchao.*pip install \"plug-zh\[adamw8bit\]\""):
            finetune(made, device="cpu")
    else:
        run.check_optimizer(made)

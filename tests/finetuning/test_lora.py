"""`finetune --memory lora|qlora`: it learns, resumes, leaves its base alone, and predicts."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from plug.errors import UsageError
from plug.finetuning.predict import Predictor
from plug.finetuning.run import finetune
from plug.finetuning.settings import FinetuneSettings
from plug.loading.load import load
from plug.loading.save import save
from plug.model.configuration import PRESETS
from plug.model.plug import Plug
from plug.quantization.convert import quantize_directory
from plug.tokenization import PlugTokenizer

peft = pytest.importorskip("peft")
pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.gradient_checkpointing:FutureWarning"),
]

Make = Callable[..., FinetuneSettings]
LORA = {"memory": "lora", "lora_rank": 8, "lora_dropout": 0.0}


@pytest.fixture
def small_base(base_model: Path, tmp_path: Path) -> Path:
    """A model in 8 bits, without dropout."""
    quantize_directory(base_model, tmp_path / "small", bits=8)
    return tmp_path / "small"


@pytest.fixture
def dropping_base(tiny_tokenizer: PlugTokenizer, tmp_path: Path) -> Path:
    """A model in 4 bits, with dropout."""
    torch.manual_seed(0)
    config = replace(PRESETS["test"], hidden_size=128, intermediate_size=256)
    save(Plug(config), tmp_path / "dropping", tokenizer=tiny_tokenizer)
    quantize_directory(tmp_path / "dropping", tmp_path / "dropping-4", bits=4)
    return tmp_path / "dropping-4"


def losses(output: Path) -> list[float]:
    rows = map(json.loads, (output / "log.jsonl").read_text().splitlines())
    return [row["loss"] for row in rows if "loss" in row]


@pytest.mark.parametrize(
    ("task", "mode"),
    [
        ("classification", "lora"),
        ("classification", "qlora"),
        ("labelling", "qlora"),
        ("reading", "lora"),
        ("generation", "qlora"),
    ],
)
def test_it_learns_leaves_its_base_alone_and_predicts(
    task: str,
    mode: str,
    settings: Make,
    data: Callable[..., Path],
    base_model: Path,
    small_base: Path,
) -> None:
    once, base = data(task), {"lora": base_model, "qlora": small_base}[mode]
    before = {path.name: path.read_bytes() for path in base.iterdir()}
    options: dict[str, Any] = LORA | {
        "memory": mode, "model": str(base), "eval": str(once), "lora_alpha": 64.0,
        "epochs": 2.0, "learning_rate": 5e-3,
    }  # fmt: skip

    result = finetune(settings(task, data(task, 15), **options), device="cpu")

    found = losses(result.directory)
    assert found[-1] < (0.96 if task == "generation" else 0.8) * found[0]
    assert {path.name: path.read_bytes() for path in base.iterdir()} == before
    written = {path.name for path in result.directory.iterdir()}
    assert written >= {"adapter_model.safetensors", "adapter_config.json", "finetuning.json"}
    assert written.isdisjoint({"model.safetensors", "checkpoints", "README.md", "config.json"})
    for arguments in ({"directory": result.directory}, {"directory": base, "adapter": "it"}):
        if "adapter" in arguments:
            arguments["adapter"] = result.directory
        predictor = Predictor(device="cpu", **arguments)
        examples = predictor.read(once)
        scores = predictor.kind.evaluate(examples, predictor(examples, batch_size=7)).metrics
        # 8 bits: predictions round activations too, as training does not.
        assert scores == pytest.approx(result.metrics, abs=0.15 if mode == "qlora" else 1e-9)


class StopAfterEpoch(TrainerCallback):
    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        if round(state.epoch) == 1:
            raise KeyboardInterrupt


@pytest.mark.parametrize("mode", ["lora", "qlora"])
def test_a_resumed_run_ends_as_an_unbroken_one(
    mode: str, settings: Make, data: Callable[..., Path], dropping_base: Path, tmp_path: Path
) -> None:
    base = dropping_base if mode == "qlora" else dropping_base.with_name("dropping")
    options = LORA | {
        "memory": mode, "model": str(base), "epochs": 2.0, "batch_size": 5, "lora_dropout": 0.1,
        "layer_decay": 0.9, "dora": True, "rslora": True,
    }  # fmt: skip
    runs = [
        settings("classification", data("classification"), output=f"{tmp_path}/{n}", **options)
        for n in "ab"
    ]
    finetune(runs[0], device="cpu")
    with pytest.raises(KeyboardInterrupt):
        finetune(runs[1], device="cpu", callbacks=[StopAfterEpoch()])
    with pytest.raises(UsageError, match=r"没有完成的训练.*--resume"):
        finetune(runs[1], device="cpu")

    finetune(runs[1], device="cpu", resume=True)

    expected, actual = (load_file(f"{run.output}/adapter_model.safetensors") for run in runs)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    assert losses(tmp_path / "a") == losses(tmp_path / "b") != []
    with pytest.raises(UsageError, match="已有一次完成的训练"):
        finetune(runs[1], device="cpu", resume=True)


@pytest.mark.parametrize("mode", ["full", "lora", "qlora"])
def test_accumulated_and_recomputed_gradients_are_those_of_the_whole_batch(
    mode: str,
    settings: Make,
    data: Callable[..., Path],
    base_model: Path,
    small_base: Path,
    tmp_path: Path,
) -> None:
    base = small_base if mode == "qlora" else base_model
    options = LORA | {"memory": mode, "model": str(base), "learning_rate": 1e-3}
    several = {"batch_size": 5, "gradient_accumulation_steps": 2, "gradient_checkpointing": True}
    runs = [
        settings("generation", data("generation"), output=f"{tmp_path}/{n}", **options | more)
        for n, more in (("a", {"batch_size": 10}), ("b", several))
    ]
    for run in runs:
        finetune(run, device="cpu")

    # The order of the examples is by length within a few batches, so the steps have the same ones.
    for one, other in zip(*map(losses, (tmp_path / "a", tmp_path / "b")), strict=True):
        assert one == pytest.approx(other, rel=2e-3)


def test_text_of_an_adapted_generator_is_written_by_plug_load_too(
    settings: Make, data: Callable[..., Path], base_model: Path
) -> None:
    run = settings("generation", data("generation"), **LORA)
    finetune(run, device="cpu")

    adapted, plain = load(base_model, adapter=run.output), load(base_model)

    layer = "decoder.layers.0.feed_forward.fc1"
    assert not torch.equal(adapted.get_submodule(layer).weight, plain.get_submodule(layer).weight)
    other = load_file(f"{run.output}/adapter_model.safetensors")
    assert not any("classifier" in name for name in other)


def test_modes_that_do_not_fit_the_model_are_refused_before_anything_is_written(
    settings: Make, data: Callable[..., Path], small_base: Path, tmp_path: Path
) -> None:
    train = data("classification")
    for changes, match in (
        ({"model": str(small_base), "memory": "full"}, "不能训练每个权重.*qlora"),
        ({"model": str(small_base), "memory": "lora"}, "要未量化的模型.*qlora"),
        ({"memory": "qlora"}, "没有量化.*plug quantize"),
    ):
        with pytest.raises(UsageError, match=match):
            finetune(settings("classification", train, **changes), device="cpu")
        assert not (tmp_path / "output").exists() or not list((tmp_path / "output").iterdir())
    for changes, match in (
        ({"memory": "full", "dora": True}, "rslora 和 dora"),
        ({"memory": "lora", "fgm": 1.0}, "fgm"),
        ({"memory": "lora", "from_scratch": True}, "from_scratch"),
        ({"memory": "half"}, "memory='half'"),
        ({"lora_rank": 0}, "lora_rank"),
    ):
        with pytest.raises(UsageError, match=match):
            settings("classification", train, **changes)

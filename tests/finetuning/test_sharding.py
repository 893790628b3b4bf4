"""Fine-tuning of which no process holds the whole model: as one process with all of it."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from safetensors.torch import load_file

from plug.distributed.settings import ParallelSettings
from plug.errors import UsageError
from plug.finetuning.predict import Predictor
from plug.finetuning.run import finetune
from plug.finetuning.settings import FinetuneSettings
from plug.finetuning.sharded_state import check_engine
from plug.finetuning.sharding import read_deepspeed, zero_stage
from plug.loading.from_checkpoint import convert_checkpoint

Make = Callable[..., FinetuneSettings]
Together = Callable[..., list[Any]]
FSDP = {"sharding": "fsdp"}


def losses(output: str) -> list[float]:
    lines = Path(output, "log.jsonl").read_text(encoding="utf-8").splitlines()
    return [entry["loss"] for entry in map(json.loads, lines) if "loss" in entry]


def numbers(output: str, key: str) -> list[float]:
    lines = Path(output, "log.jsonl").read_text(encoding="utf-8").splitlines()
    return [entry[key] for entry in map(json.loads, lines) if key in entry]


@pytest.mark.slow
@pytest.mark.parametrize("memory", ["full", "lora"])
@pytest.mark.parametrize("task", ["generation", "classification"])
def test_one_two_and_four_processes_learn_as_one_that_holds_all(
    task: str,
    memory: str,
    settings: Make,
    data: Callable[..., Path],
    run_together: Together,
    tmp_path: Path,
) -> None:
    """Losses, gradient norms and scores of every epoch; then each tensor that is saved.

    Steps have 8, 8 and 4 of twenty examples, so that two of four processes have none in the last.
    Four alone of those that classify: they differ in their head.
    """
    if memory == "lora":
        pytest.importorskip("peft")
    options = {"epochs": 2.0, "memory": memory, "num_beams": 2, "clip_grad_norm": 0.5}
    options |= {"lora_dropout": 0.0, "target_length": 6}
    one = settings(task, data(task), batch_size=8, output=f"{tmp_path}/one", **options)
    expected = finetune(one, device="cpu")
    name = "model.safetensors" if memory == "full" else "adapter_model.safetensors"
    weights = load_file(f"{one.output}/{name}")
    for count in (1, 2, 4) if task == "generation" else (4,):
        output = f"{tmp_path}/{count}"
        shared = settings(
            task, data(task), batch_size=8 // count, output=output, parallel=FSDP, **options
        )
        answers = run_together(count, "finetune", settings=asdict(shared))
        assert answers[0]["metrics"] == pytest.approx(expected.metrics, abs=1e-5)
        assert losses(output) == pytest.approx(losses(one.output), abs=1e-5)
        assert numbers(output, "grad_norm") == pytest.approx(
            numbers(one.output, "grad_norm"), rel=1e-4
        )
        found = load_file(f"{output}/{name}")
        assert found.keys() == weights.keys()
        for key, tensor in found.items():
            assert tensor.abs().sum() > 0 or not weights[key].any(), key
            torch.testing.assert_close(tensor, weights[key], rtol=1e-4, atol=1e-5)
        held = [answer["held"] for answer in answers]
        assert max(held) < 1.2 * sum(held) / count  # each holds its share
        files = {path.name for path in Path(output).iterdir()}
        assert files == {path.name for path in Path(one.output).iterdir()}
        if memory == "full":
            ours, theirs = (Path(x, "config.json").read_text() for x in (output, one.output))
            assert ours == theirs


@pytest.mark.parametrize("half", [True, False])
def test_two_processes_step_in_the_backward_pass_bit_for_bit_as_one(
    half: bool, run_together: Together, tmp_path: Path
) -> None:
    """Both have the same batch, so that the mean of their gradients is exact; then one goes on."""
    folders = {name: tmp_path / name for name in ("whole", "one", "two")}
    for folder in folders.values():
        folder.mkdir()

    def run(count: int, name: str, steps: list[int], **options: bool) -> list[Any]:
        options["half"] = half
        return run_together(
            count, "step_in_backward", folder=str(folders[name]), steps=steps, **options
        )

    run(1, "whole", [0, 1, 2], sharded=False)
    run(1, "one", [0, 1, 2])
    seen = run(2, "two", [0, 1])
    run(1, "two", [2], resume=True)
    whole, one, two = (torch.load(folder / "weights.pt") for folder in folders.values())
    assert one.keys() == whole.keys()
    for name, weight in one.items():
        assert torch.equal(two[name], weight), name
        # FSDP2 adds up the gradients of what layers share in another order.
        apart = (whole[name].float() - weight.float()).abs()
        assert apart.max() < (1e-3 if half else 1e-6), name
    for each in seen:
        assert each["shards"] == 1  # at a time, of all weights
        assert each["whole"]  # such as the word table, which both ends of the step use
        assert not [name for name in each["whole"] if ".layers." in name]


@pytest.mark.gpu
@pytest.mark.multi_gpu
def test_two_gpus_step_in_the_backward_pass_as_one(run_together: Together, tmp_path: Path) -> None:
    """The steps are taken on the stream of the reductions; the next pass has to wait for them."""
    found = []
    for count in (1, 2):
        folder = tmp_path / str(count)
        folder.mkdir()
        run_together(
            count, "step_in_backward", folder=str(folder), steps=list(range(20)), half=False,
            sharded=count == 2, kind="cuda",
        )  # fmt: skip
        found.append(torch.load(folder / "weights.pt"))
    for name, weight in found[0].items():
        # Twenty steps of 1e-3; a moment near the limit of two codes gets the one or the other.
        assert (found[1][name] - weight).norm() < 2e-2 * 20e-3 * weight.numel() ** 0.5, name


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "count"), [("fp32", 1), ("fp32", 4), ("bf16", 2)])
def test_steps_in_the_backward_pass_of_shards_are_those_of_whole_weights(
    precision: str,
    count: int,
    settings: Make,
    data: Callable[..., Path],
    run_together: Together,
    tmp_path: Path,
) -> None:
    """In float32 they learn as one process that has all weights; nearly so in bfloat16."""
    options = {"epochs": 2.0, "memory": "full", "optimizer": "adamw8bit_fused", "target_length": 6}
    options |= {"learning_rate": 1e-3, "precision": precision, "recomputed_layers": 1}
    one = settings(
        "generation", data("generation"), batch_size=4, output=f"{tmp_path}/one", **options
    )
    expected = finetune(one, device="cpu")
    weights = load_file(f"{one.output}/model.safetensors")
    output = f"{tmp_path}/{count}"
    shared = settings(
        "generation", data("generation"), batch_size=4 // count, output=output, parallel=FSDP,
        **options,
    )  # fmt: skip
    answers = run_together(count, "finetune", settings=asdict(shared))
    found = load_file(f"{output}/model.safetensors")
    assert found.keys() == weights.keys()
    # A moment that is near the limit of two codes gets the one or the other.
    assert losses(output) == pytest.approx(losses(one.output), abs=1e-3)
    assert answers[0]["metrics"] == pytest.approx(expected.metrics, abs=1e-5)
    for name, tensor in found.items():
        assert tensor.dtype == weights[name].dtype
        torch.testing.assert_close(tensor, weights[name], rtol=2**-7, atol=2e-3)
    held = [answer["held"] for answer in answers]
    assert max(held) < 1.2 * sum(held) / count  # each holds its share


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"memory": "full"},
        {"memory": "lora", "lora_dropout": 0.0, "recomputed_layers": 1},
        {"memory": "lora", "lora_dropout": 0.0, "parallel": FSDP | {"cpu_offload": True}},
    ],
    ids=["full", "lora", "offloaded"],
)
def test_layers_in_bfloat16_learn_as_in_float32(
    options: dict[str, Any],
    settings: Make,
    data: Callable[..., Path],
    run_together: Together,
    tmp_path: Path,
) -> None:
    """What a GPU runs: frozen weights in bfloat16 beside adapters in float32, our own passes."""
    options = {"epochs": 1.0, "target_length": 6, "parallel": FSDP} | options
    found = {}
    for count, in_half in ((1, False), (1, True), (2, True)):
        output = f"{tmp_path}/{count}{in_half}"
        shared = settings(
            "generation", data("generation"), batch_size=4 // count, output=output, **options
        )
        run_together(count, "finetune", settings=asdict(shared), in_half=in_half)
        found[count, in_half] = losses(output)
    assert found[2, True] == pytest.approx(found[1, True], rel=2e-3)  # 2^-9 a rounding
    assert found[1, True] == pytest.approx(found[1, False], rel=2e-2)
    assert found[1, True] != found[1, False]


@pytest.mark.slow
@pytest.mark.parametrize("memory", ["full", "lora"])
def test_two_processes_of_zero_3_learn_as_one_that_holds_all(
    memory: str,
    settings: Make,
    data: Callable[..., Path],
    run_together: Together,
    tmp_path: Path,
) -> None:
    pytest.importorskip("deepspeed", reason="needs deepspeed: pip install plug-zh[deepspeed]")
    options = {"epochs": 2.0, "memory": memory, "num_beams": 2, "lora_dropout": 0.0}
    options |= {"target_length": 6}
    one = settings("generation", data("generation"), batch_size=4, **options)
    expected = finetune(one, device="cpu")
    file = tmp_path / "zero3.json"
    auto = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_clipping")
    values = {"zero_optimization": {"stage": 3}, "zero_allow_untested_optimizer": True}
    file.write_text(json.dumps(values | dict.fromkeys(auto, "auto")))
    two = settings(
        "generation", data("generation"), batch_size=2, output=f"{tmp_path}/two",
        parallel={"deepspeed": str(file)}, **options,
    )  # fmt: skip
    answers = run_together(2, "finetune_by_deepspeed", settings=asdict(two))
    assert answers[0]["metrics"] == pytest.approx(expected.metrics, abs=1e-5)
    assert answers[0]["facts"]["sharding"] == "ZeRO-3"
    assert losses(two.output) == pytest.approx(losses(one.output), abs=1e-5)
    name = "model.safetensors" if memory == "full" else "adapter_model.safetensors"
    found, weights = load_file(f"{two.output}/{name}"), load_file(f"{one.output}/{name}")
    torch.testing.assert_close(found, weights, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("memory", "optimizer", "apart"),
    [("full", "adamw", 1e-5), ("lora", "adamw", 1e-5), ("full", "adamw8bit_fused", 1e-3)],
)
def test_a_run_that_is_killed_in_a_save_goes_on_with_other_processes(
    memory: str,
    optimizer: str,
    apart: float,
    settings: Make,
    data: Callable[..., Path],
    run_together: Together,
    tmp_path: Path,
) -> None:
    """Two processes die while the second epoch's checkpoint is written; one or four go on.

    That one goes on from two, of steps in the backward pass, is tried bit for bit above.
    """
    if memory == "lora":
        pytest.importorskip("peft")
    options = {"epochs": 3.0, "memory": memory, "lora_dropout": 0.0, "parallel": FSDP}
    options |= {"optimizer": optimizer, "precision": "fp32"}

    def of(name: str, batch_size: int, task: str = "classification") -> FinetuneSettings:
        output = f"{tmp_path}/{name}"
        return settings(task, data(task), batch_size=batch_size, output=output, **options)

    run_together(1, "finetune", settings=asdict(of("whole", 4)))
    run_together(2, "finetune", dies=True, settings=asdict(of("broken", 2)), kill_at=4)
    broken, kept = tmp_path / "broken", tmp_path / "kept"
    assert not (broken / "config.json").exists()
    shutil.copytree(broken, kept)
    for count in (1, 4) if optimizer == "adamw" else (4,):
        with pytest.raises(UsageError, match="原来是 4，现在是 3（batch_size 3"):
            finetune(of("broken", 3), device="cpu", resume=True)
        run_together(count, "finetune", settings=asdict(of("broken", 4 // count)), resume=True)
        assert losses(f"{broken}") == pytest.approx(losses(f"{tmp_path}/whole"), abs=apart)
        assert not (broken / "checkpoints").exists()
        shutil.rmtree(broken)
        shutil.copytree(kept, broken)
    unsharded = replace(of("broken", 4), parallel=ParallelSettings(sharding="none"))
    with pytest.raises(
        UsageError, match=r"是用 parallel.sharding=fsdp 训练的，现在是 parallel.sharding=none"
    ):
        finetune(unsharded, device="cpu", resume=True)

    (checkpoint,) = broken.glob("checkpoints/checkpoint-5")
    if memory == "lora":
        with pytest.raises(UsageError, match="只有适配器"):
            convert_checkpoint(broken, tmp_path / "converted")
    else:
        convert_checkpoint(broken, tmp_path / "converted")
        names = {path.name for path in (tmp_path / "converted").iterdir()}
        assert names == {
            *("config.json", "configuration.json", "finetuning.json", "model.safetensors"),
            *("tokenizer.json", "tokenizer_config.json"),
        }
        answer = Predictor(tmp_path / "converted", device="cpu").predict_text("今天天气很好")
        assert answer
    for file in checkpoint.glob("weights/*.distcp"):
        file.write_bytes(file.read_bytes()[:100])
    told = run_together(2, "failing", settings=asdict(of("broken", 2)), resume=True)
    assert all(each.startswith(f"检查点 {checkpoint}/weights 已损坏") for each in told)


def test_sharding_needs_a_launcher(
    settings: Make, data: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    asked = settings("classification", data("classification"), parallel=FSDP)
    with pytest.raises(UsageError, match=r"torchrun --nproc-per-node"):
        finetune(asked, device="cpu")
    away = settings("classification", data("classification"), parallel={"cpu_offload": True})
    with pytest.raises(UsageError, match=r"parallel.cpu_offload 要由 torchrun 启动"):
        finetune(away, device="cpu")
    assert not Path(asked.output).exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"memory": "full", "optimizer": "adafactor"}, "optimizer=adafactor"),
        ({"memory": "lora", "dora": True}, "dora"),
        ({"memory": "full", "fgm": 1.0}, "fgm"),
        ({"memory": "full", "from_scratch": True}, "from_scratch"),
        ({"memory": "full", "child_tuning": 0.5}, "child_tuning"),
    ],
)
def test_what_needs_whole_weights_is_not_sharded(
    changes: dict[str, Any],
    message: str,
    settings: Make,
    data: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "0")
    asked = settings("classification", data("classification"), parallel=FSDP, **changes)
    with pytest.raises(UsageError, match=f"{message}.*不能与 parallel.sharding=fsdp 一起用"):
        finetune(asked, device="cpu")
    assert not Path(asked.output).exists()


def test_deepspeed_needs_gpus(
    settings: Make, data: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setattr("plug.finetuning.sharding.read_deepspeed", lambda _: {})
    asked = settings("classification", data("classification"), parallel={"deepspeed": "x.json"})
    with pytest.raises(UsageError, match=r"要有 GPU，这里用的是 CPU.*parallel.sharding=fsdp"):
        finetune(asked, device="cpu")
    assert not Path(asked.output).exists()


@pytest.mark.parametrize(
    ("files", "engine", "processes", "message"),
    [
        (["latest"], "fsdp", 2, "是用 parallel.deepspeed 训练的，现在是 parallel.sharding=fsdp"),
        (["weights/.metadata"], "deepspeed", 2, "请用原来的 parallel.sharding=fsdp 接着训练"),
        (["model.safetensors"], "fsdp", 2, "是用 parallel.sharding=none 训练的"),
        (
            ["latest", *(f"global_step9/bf16_zero_pp_rank_{n}_mp_rank_00_optim_states.pt"
                         for n in range(4))],
            "deepspeed", 2, "DeepSpeed 的 4 个进程写的，它只能由 4 个进程接着训练，现在是 2 个",
        ),
    ],
)  # fmt: skip
def test_checkpoints_that_this_run_cannot_go_on_from(
    files: list[str], engine: str, processes: int, message: str, tmp_path: Path
) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    with pytest.raises(UsageError, match=message):
        check_engine(tmp_path, engine, processes)


def test_checkpoints_of_the_same_engine_and_number_are_taken(tmp_path: Path) -> None:
    check_engine(tmp_path, "none", 1)
    for rank in range(2):
        file = tmp_path / "global_step9" / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        file.parent.mkdir(exist_ok=True)
        file.touch()
    (tmp_path / "latest").touch()
    check_engine(tmp_path, "deepspeed", 2)


def test_a_configuration_of_deepspeed_that_makes_no_sense(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UsageError, match=r"pip install .plug-zh\[deepspeed\]"):
        read_deepspeed("zero3.json")
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: object())
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pytest.raises(UsageError, match=r"deepspeed --num_gpus"):
        read_deepspeed("zero3.json")
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(UsageError, match="找不到"):
        read_deepspeed(str(tmp_path / "zero3.json"))
    for text in ("[]", '{"zero_optimization": 3}', '{"zero_optimization": {"stage": 4}}'):
        (tmp_path / "zero3.json").write_text(text)
        with pytest.raises(UsageError, match="stage 应是 0 到 3"):
            read_deepspeed(str(tmp_path / "zero3.json"))
    shipped = Path(__file__).parents[2] / "configs" / "zero3-offload.json"
    assert zero_stage(read_deepspeed(str(shipped))) == 3


def test_a_schedule_of_deepspeed_is_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: object())
    monkeypatch.setenv("LOCAL_RANK", "0")
    file = tmp_path / "zero2.json"
    file.write_text('{"zero_optimization": {"stage": 2}}')
    read_deepspeed(str(file))
    assert not caplog.records
    file.write_text('{"zero_optimization": {"stage": 2}, "scheduler": {"type": "WarmupLR"}}')
    read_deepspeed(str(file))
    assert "warmup_fraction 和线性下降不起作用" in caplog.text

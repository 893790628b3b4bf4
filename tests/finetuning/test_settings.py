"""Settings of a fine-tuning run: what they accept, where they come from, how they are shown."""

from __future__ import annotations

import math
import shlex
from pathlib import Path
from typing import Any

import pytest

from plug.cli.options import options_from
from plug.distributed.settings import ParallelSettings
from plug.errors import UsageError
from plug.finetuning.settings import FLAGS, FinetuneSettings
from plug.finetuning.tasks import TASKS
from plug.options import markdown_table, merge_tables, options_of, parse_assignments, read_toml

NEEDED = {"task": "tnews", "train": "a", "eval": "b", "output": "c"}


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"task": "tnew"}, "没有任务 'tnew'"),
        ({"batch_size": -1}, "batch_size=-1 应在 0 到 65536 之间"),
        ({"learning_rate": math.nan}, "learning_rate=nan 应在 1e-30 到 1e\\+30 之间"),
        ({"epochs": "3"}, "epochs='3' 应是一个数"),
        ({"layer_decay": 1.5}, "layer_decay=1.5 应在 0.01 到 1 之间"),
        ({"patience": -1}, "patience=-1 应在 0 到 10000 之间"),
        ({"task": "cmrc2018", "r_drop": 1.0}, "r_drop 只用于分类任务"),
        ({"task": "cmrc2018", "label_smoothing": 0.1}, "label_smoothing 不能用于阅读理解"),
        ({"label_smoothing": 1.5}, "label_smoothing=1.5 应在 0 到 1 之间"),
        ({"fgm": -1.0}, "fgm=-1.0 应在 0 到 1000 之间"),
        (
            {"optimizer": "sgd"},
            "optimizer='sgd' 只能是 'adamw' 或 'adamw8bit' 或 'adamw8bit_fused' 或 'adafactor'",
        ),
        (
            {"optimizer": "adafactor", "gradient_accumulation_steps": 4},
            "gradient_accumulation_steps=4 要累积梯度。请去掉它，或用 --optimizer adamw",
        ),
        (
            {"optimizer": "adamw8bit_fused", "gradient_accumulation_steps": 4},
            "optimizer=adamw8bit_fused 在反向传播中逐个更新权重，不留梯度，"
            "而 gradient_accumulation_steps=4 要累积梯度",
        ),
        (
            {"optimizer": "adamw8bit_fused", "parallel": {"cpu_offload": True}},
            "optimizer=adamw8bit_fused 在显卡上更新权重，不能与 parallel.cpu_offload 一起用",
        ),
        ({"optimizer": "adafactor", "fgm": 1.0}, "fgm=1.0 要第二份梯度"),
        ({"optimizer": "adafactor", "clip_grad_norm": 2.0}, "clip_grad_norm=2.0 要全部梯度的范数"),
        ({"optimizer": "adafactor", "child_tuning": 0.5}, "child_tuning=0.5 要全部梯度"),
        (
            {"optimizer": "adafactor", "memory": "lora"},
            "optimizer=adafactor 用于训练每个权重，不能与 --memory lora 一起用",
        ),
        (
            {"optimizer": "adamw8bit", "memory": "qlora"},
            "optimizer=adamw8bit 用于训练每个权重，不能与 --memory qlora 一起用",
        ),
        ({"precision": "fp16"}, "precision='fp16' 只能是 'bf16' 或 'fp32'"),
    ],
)
def test_settings_that_make_no_sense(changes: dict[str, Any], complaint: str) -> None:
    values = {"task": "tnews", "train": "a", "eval": "b", "output": "c"}
    with pytest.raises(UsageError, match=complaint):
        FinetuneSettings(**values | changes)


def test_what_a_task_decides_is_filled_in() -> None:
    found = FinetuneSettings(**NEEDED, epochs=2)
    task = TASKS["tnews"]
    assert (found.epochs, found.batch_size) == (2.0, task.batch_size)
    assert (found.source_length, found.target_length) == (task.source_length, task.target_length)


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"task": "tnews"}, "缺少 --train、--eval、--output。"),
        ({"train": "a", "eval": "b", "output": "c"}, "缺少 任务名。"),
        (NEEDED | {"epoch": 3}, "没有选项 epoch。是否想用 epochs？"),
        (NEEDED | {"epochs": 0}, "epochs=0 应大于 0。要用任务的默认值，请不写它"),
        (NEEDED | {"batch_size": 0}, "batch_size=0 应大于 0"),
        (NEEDED | {"train": 3}, "train=3 应是至多 4096 个字的文字"),
    ],
)
def test_mappings_that_make_no_settings(values: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint):
        FinetuneSettings.of(values)


def test_the_command_in_the_report_is_the_run_s() -> None:
    run = FinetuneSettings(
        task="tnews", train="a b.json", eval="d.json", output="o", seed=3, from_scratch=True, fgm=1
    )
    assert run.command() == (
        "plug finetune tnews --train 'a b.json' --eval d.json --output o --set fgm=1.0 --seed 3"
        " --from-scratch"
    )


def test_a_command_gives_the_settings_that_it_was_made_from() -> None:
    changes: dict[str, Any] = {
        "epochs": 2.5, "batch_size": 7, "eval_batch_size": 9, "learning_rate": 1e-5,
        "warmup_fraction": 0.2, "weight_decay": 0.0, "clip_grad_norm": 2.0, "layer_decay": 0.9,
        "r_drop": 1.0, "label_smoothing": 0.1, "fgm": 0.5, "child_tuning": 0.3,
        "source_length": 99, "target_length": 9, "num_beams": 3, "patience": 2, "seed": 5,
        "precision": "fp32", "from_scratch": True, "model": "a model",
        "gradient_accumulation_steps": 2, "gradient_checkpointing": True, "recomputed_layers": 2,
        "lora_rank": 3,
        "lora_alpha": 4.0, "lora_dropout": 0.2, "quantized_products": "bf16",
        "optimizer": "adamw8bit",
        "parallel": ParallelSettings(sharding="fsdp", cpu_offload=True),
    }  # fmt: skip
    of_lora = {"memory", "rslora", "dora"}  # they exclude others of these
    assert NEEDED.keys() | changes.keys() | of_lora == options_of(FinetuneSettings).keys()
    run = FinetuneSettings(**NEEDED | {"task": "classification"}, **changes)
    words = shlex.split(run.command())[3:]
    values: dict[str, Any] = {"task": "classification"}
    while words:
        name = words.pop(0).removeprefix("--").replace("-", "_")
        if name == "set":
            values = merge_tables(values, parse_assignments([words.pop(0)]))
        elif name == "from_scratch":
            values[name] = True
        else:
            kind = options_of(FinetuneSettings)[name][1].kind
            values[name] = kind.word_type(words.pop(0))
    assert FinetuneSettings.of(values) == run


def test_flags_are_fields() -> None:
    assert set(FLAGS) < options_of(FinetuneSettings).keys()
    assert callable(options_from(FinetuneSettings, FLAGS))


def test_the_documentation_has_the_table_that_the_fields_make() -> None:
    page = Path(__file__).parents[2] / "docs" / "finetuning.md"
    assert markdown_table(FinetuneSettings) in page.read_text(encoding="utf-8")
    assert markdown_table(ParallelSettings) in page.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("parallel", "message"),
    [
        ({"sharding": "zero"}, "sharding='zero' 只能是"),
        ({"shards": 2}, "没有选项 shards"),
        ("fsdp", r"parallel='fsdp' 应是一个表，如 \[parallel\]"),
        ({"sharding": "none", "cpu_offload": True}, "cpu_offload 只用于"),
        ({"deepspeed": "zero3.json", "cpu_offload": True}, "cpu_offload 只用于"),
        ({"tensor": 2}, "没有张量并行：请去掉 parallel.tensor=2"),
        ({"sharding": "fsdp", "deepspeed": "zero3.json"}, "只能用其中一个"),
    ],
)
def test_a_layout_that_makes_no_sense(parallel: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        FinetuneSettings(**NEEDED, parallel=parallel)


def test_the_original_s_settings_are_those_of_its_task() -> None:
    """The task `dureader_robust_qg` has them too; 8 processes take 32 examples a step."""
    file = Path(__file__).parents[2] / "configs" / "finetune-27b-original.toml"
    run = FinetuneSettings.of(read_toml(file))
    assert run.batch_size * 8 == 32
    assert (run.learning_rate, run.epochs, run.warmup_fraction) == (1e-5, 5, 0.01)
    assert (run.source_length, run.target_length) == (384, 30)
    assert run.parallel == ParallelSettings(sharding="fsdp")

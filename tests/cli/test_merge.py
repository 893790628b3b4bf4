"""LoRA as typed: trained, used beside its model, merged, used alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("peft")


def test_from_training_to_a_merged_quantised_model(
    run_plug: Callable, model_directory: Path, tmp_path: Path
) -> None:
    rows = [{"src_txt": "山上有花", "tgt_txt": "花"}, {"src_txt": "今天天气", "tgt_txt": "天"}] * 4
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    adapter, merged = tmp_path / "adapter", tmp_path / "merged"

    ran = run_plug(
        *("finetune", "generation", "--model", model_directory, "--train", data, "--eval", data),
        *("--output", adapter, "--source-length", 16, "--target-length", 4, "--epochs", 1),
        *("--device", "cpu", "--memory", "lora", "--lora-rank", 2, "--set", "rslora=true"),
    )
    assert ran.status == 0, ran.err
    ran = run_plug("merge", "--adapter", adapter, "--to", merged)
    assert ran.status == 0, ran.err
    assert f"已写入 {merged}" in ran.out
    assert "logits 最多变了最大值的 0.00%" in ran.out

    write = ("generate", "山上", "--out-length", 4, "--seed", 3, "--json", "--device", "cpu")
    texts = [
        json.loads(run_plug(*write, *with_).out)["token_ids"]
        for with_ in (("--model", model_directory, "--adapter", adapter), ("--model", merged))
    ]
    assert texts[0] == texts[1]
    for with_ in (("--adapter", adapter), ("--model", merged)):
        scored = run_plug("evaluate", "generation", *with_, "--data", data, "--json")
        assert json.loads(scored.out)["examples"] == 8
        told = run_plug("predict", *with_, "山上有花")
        assert json.loads(told.out)["src_txt"] == "山上有花"
    quantised = run_plug("merge", "--adapter", adapter, "--to", tmp_path / "small", "--bits", 8)
    assert quantised.status == 0, quantised.err
    assert json.loads((tmp_path / "small" / "config.json").read_text())["quantization"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--bits", "5", "--adapter", "."], "--bits 5 只能是 8 或 4"),
        (["--adapter", ".", "--model", "plug-mini-zh"], ". 不是适配器的目录"),
        (["--adapter", "nowhere"], "nowhere"),
    ],
)
def test_wrong_use_is_explained(
    arguments: list[str], says: str, run_plug: Callable, tmp_path: Path
) -> None:
    done = run_plug("merge", "--to", tmp_path / "merged", *arguments)

    assert done.status == 2
    assert says in done.err
    assert not (tmp_path / "merged").exists()


def test_a_prediction_needs_a_model_or_an_adapter(run_plug: Callable) -> None:
    done = run_plug("predict", "山上有花")

    assert done.status == 2
    assert "--adapter" in done.err

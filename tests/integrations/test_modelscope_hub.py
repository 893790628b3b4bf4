"""`configuration.json` beside every model, and `plug convert --to-modelscope`."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from plug.checkpoints.hub import write_finetuned_configuration
from plug.checkpoints.original import export_original
from plug.errors import PlugError
from plug.integrations.modelscope_hub import write_hub_directory
from plug.loading.load import load
from plug.loading.save import save
from plug.model.configuration import PlugConfig
from plug.model.plug import Plug


def configuration(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "configuration.json").read_text())


def head(directory: Path) -> list[str]:
    """The lines of the model card's head."""
    first, text, _ = (directory / "README.md").read_text().split("---\n", 2)
    assert first == ""
    return text.splitlines()


def test_a_model_directory_tells_modelscope_its_task_and_sampling(model_directory: Path) -> None:
    assert configuration(model_directory) == {
        "framework": "pytorch",
        "task": "text-generation",
        "model": {
            "type": "plug", "mode": "plug", "top_p": 0.0, "temperature": 0.9, "top_k": 20
        },
        "pipeline": {"type": "plug-generation"},
    }  # fmt: skip


def test_an_encoder_alone_fills_masks(
    config: PlugConfig, make_model: Callable[[PlugConfig], Plug], tmp_path: Path
) -> None:
    save(make_model(replace(config, num_decoder_layers=0)), tmp_path / "encoder", tokenizer=None)
    assert configuration(tmp_path / "encoder")["task"] == "fill-mask"


@pytest.mark.parametrize(
    ("kind", "task"),
    [
        ("classification", "text-classification"),
        ("labelling", "token-classification"),
        ("generation", "text-generation"),
    ],
)
def test_a_fine_tuned_model_has_the_task_of_its_kind(kind: str, task: str, tmp_path: Path) -> None:
    write_finetuned_configuration(tmp_path, kind, num_beams=3)
    assert configuration(tmp_path)["task"] == task


def test_reading_has_no_task_and_no_file(tmp_path: Path) -> None:
    write_finetuned_configuration(tmp_path, "reading", num_beams=1)
    assert list(tmp_path.iterdir()) == []


def test_a_model_becomes_a_hub_directory(
    run_plug: Callable[..., Any], model_directory: Path, tmp_path: Path
) -> None:
    private = {"settings": {"task": "generation", "train": "/home/me/secret/train.jsonl",
                            "eval": "/home/me/eval.jsonl", "output": "/home/me/runs/x",
                            "model": "plug-mini-zh"}}  # fmt: skip
    (model_directory / "finetuning.json").write_text(json.dumps(private))
    (model_directory / "predictions.jsonl").write_text("what the user asked")
    ran = run_plug("convert", "--from", model_directory, "--to", tmp_path / "hub",
                   "--to-modelscope")  # fmt: skip

    assert ran.status == 0
    assert "许可证" in ran.out
    hub = tmp_path / "hub"
    assert {path.name for path in hub.iterdir()} == {
        "config.json", "configuration.json", "generation_config.json", "model.safetensors",
        "tokenizer.json", "tokenizer_config.json", "finetuning.json", "README.md",
    }  # fmt: skip
    assert "/home" not in (hub / "finetuning.json").read_text()
    assert configuration(hub)["train"]["optimizer"]["lr"] == 5e-4
    assert head(hub) == [
        "tasks: [text-generation]", "domain: [nlp]", "language: [zh]", "frameworks: [pytorch]",
    ]  # fmt: skip
    torch.testing.assert_close(load(hub).state_dict(), load(model_directory).state_dict())


def test_a_card_that_is_there_keeps_its_words(
    run_plug: Callable[..., Any], model_directory: Path, tmp_path: Path
) -> None:
    card = "---\nlanguage: zh\nlicense: mit\n---\n\n# 我的模型\n---\n正文\n"
    (model_directory / "README.md").write_text(card)
    ran = run_plug("convert", "--from", model_directory, "--to", tmp_path / "hub",
                   "--to-modelscope")  # fmt: skip
    assert "许可证" not in ran.out
    assert head(tmp_path / "hub") == [
        "tasks: [text-generation]", "domain: [nlp]", "frameworks: [pytorch]",
        "language: zh", "license: mit",
    ]  # fmt: skip
    assert (tmp_path / "hub" / "README.md").read_text().endswith("\n\n# 我的模型\n---\n正文\n")


def test_an_original_becomes_one_with_the_originals_training(
    run_plug: Callable[..., Any], tiny_model: Plug, tmp_path: Path
) -> None:
    save(tiny_model, tmp_path / "ours", tokenizer=None)
    export_original(tmp_path / "ours", tmp_path / "original", 2)
    ran = run_plug("convert", "--from", tmp_path / "original", "--to", tmp_path / "hub",
                   "--to-modelscope")  # fmt: skip
    assert ran.status == 0
    content = configuration(tmp_path / "hub")
    assert content["model"]["mode"] == "original"
    assert content["train"]["optimizer"]["lr"] == 1e-5
    assert content["train"]["max_epochs"] == 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--dtype", "float16"), "--dtype 只用于原版"),
        (("--to-original", "2"), "只能给一个"),
    ],
)
def test_options_that_do_not_go_together(
    run_plug: Callable[..., Any],
    model_directory: Path,
    tmp_path: Path,
    options: tuple[str, ...],
    message: str,
) -> None:
    ran = run_plug("convert", "--from", model_directory, "--to", tmp_path / "hub",
                   "--to-modelscope", *options)  # fmt: skip
    assert ran.status == 2
    assert message in ran.err
    assert not (tmp_path / "hub").exists()


def test_a_model_without_a_task_is_refused(
    run_plug: Callable[..., Any], model_directory: Path, tmp_path: Path
) -> None:
    (model_directory / "configuration.json").unlink()
    ran = run_plug("convert", "--from", model_directory, "--to", tmp_path / "hub",
                   "--to-modelscope")  # fmt: skip
    assert ran.status == 2
    assert "没有 configuration.json" in ran.err


@pytest.mark.parametrize("name", ["finetuning.json", "configuration.json"])
@pytest.mark.parametrize("content", ["[1]", "{", '{"settings": 3}'])
def test_damaged_files_are_a_sentence(
    name: str, content: str, model_directory: Path, tmp_path: Path
) -> None:
    (model_directory / name).write_text(content)
    with pytest.raises(PlugError, match=name):
        write_hub_directory(model_directory, tmp_path / "hub")
    assert not (tmp_path / "hub").exists()

"""A fine-tuned directory at work: what `finetuning.json` must say, and lines of `.txt` files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from plug import traditional
from plug.checkpoints.directory import RUN_FILE
from plug.errors import PlugError, UsageError
from plug.finetuning import plain
from plug.finetuning.predict import Predictor, kind_of, prediction_line, read_run
from plug.finetuning.run import finetune
from plug.model.configuration import PRESETS


@pytest.fixture
def tuned(settings: Callable[..., Any], data: Callable[..., Path]) -> Path:
    return finetune(settings("labelling", data("labelling")), device="cpu").directory


def test_a_line_of_a_text_file_is_taken_as_it_stands(tuned: Path, tmp_path: Path) -> None:
    path = tmp_path / "in.txt"
    path.write_text("\ufeff\u3000今天天气\r\n\n \n今天天气", encoding="utf-8")
    predictor = Predictor(tuned, "cpu")
    examples = predictor.read(path)
    assert ["".join(each.tokens) for each in examples] == ["\u3000今天天气", "今天天气"]
    predictions = predictor(examples)
    assert predictions[0] == ("O", *predictions[1])
    records = [
        json.loads(prediction_line(predictor.kind, example, prediction))
        for example, prediction in zip(examples, predictions, strict=True)
    ]
    assert [record["line"] for record in records] == [1, 4]
    path.write_text("今天\t天气\n", encoding="utf-8")
    with pytest.raises(UsageError, match=r"in\.txt 第 1 行：这个任务要给一段文字，却给了 2 段"):
        predictor.read(path)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"labels": ["O"]}, "labels 与 config.json 的 id2label 不同"),
        ({"labels": ["O", "O"]}, "labels 有重复"),
        ({"labels": "O"}, "labels 应是文字的列表"),
        ({"labels": []}, "与任务 labelling 不符"),
        ({"label_names": {"x": "y"}}, "label_names 应是各标签的名字"),
        ({"pairs": 1}, "pairs 应是 true、false 或 null"),
        ({"settings": {"task": "labelling"}}, "settings 里应有 task、source_length"),
        ({"settings": 3}, "settings 里应有"),
    ],
)
def test_a_damaged_run_file_is_refused(change: dict[str, Any], complaint: str, tuned: Path) -> None:
    run = json.loads((tuned / RUN_FILE).read_text())
    (tuned / RUN_FILE).write_text(json.dumps(run | change))
    with pytest.raises(PlugError, match=complaint):
        kind_of(tuned)


@pytest.mark.parametrize(
    ("name", "value", "complaint"),
    [
        (
            "source_length",
            10**6,
            r"json 与模型 .* 不符：source_length=1000000 应在 16 到 96 之间",
        ),
        ("source_length", 0, "source_length=0 不是训练时的值"),
        ("source_length", 1.5, "source_length=1.5 应是整数"),
        ("num_beams", 2**70, "num_beams=.* 应在 1 到 64 之间"),
        ("task", ["labelling"], "task=.* 应是"),
        ("spare", 1, "多出 .'spare'."),
    ],
)
def test_damaged_settings_are_refused(
    name: str, value: object, complaint: str, tuned: Path
) -> None:
    run = json.loads((tuned / RUN_FILE).read_text())
    run["settings"][name] = value
    (tuned / RUN_FILE).write_text(json.dumps(run))
    with pytest.raises(PlugError, match=complaint):
        kind_of(tuned)


def test_a_run_from_before_there_was_an_option_is_read(tuned: Path) -> None:
    run = json.loads((tuned / RUN_FILE).read_text())
    del run["settings"]["parallel"]["tensor"], run["settings"]["patience"]
    (tuned / RUN_FILE).write_text(json.dumps(run))
    assert read_run(tuned) == run
    run["settings"]["parallel"]["cards"] = 8  # of a later version
    (tuned / RUN_FILE).write_text(json.dumps(run))
    with pytest.raises(PlugError, match="cards"):
        read_run(tuned)


def test_texts_in_place_of_examples_are_refused(tuned: Path) -> None:
    with pytest.raises(UsageError, match="predict_text"):
        Predictor(tuned)(["今天天气很好"])


def test_what_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="不是微调过的模型"):
        read_run(tmp_path)
    (tmp_path / RUN_FILE).write_text("[1]")
    with pytest.raises(PlugError, match="已损坏：不是一个 JSON 对象"):
        read_run(tmp_path)


def test_traditional_characters_are_converted_on_request(
    tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(traditional, "to_simplified", lambda text: text.replace("氣", "气"))
    path = tmp_path / "in.txt"
    path.write_text("今天天氣\n", encoding="utf-8")
    predictor = Predictor(tuned, "cpu")

    assert ["".join(each.tokens) for each in predictor.read(path, simplify=True)] == ["今天天气"]
    assert ["".join(each.tokens) for each in predictor.read(path)] == ["今天天氣"]
    with pytest.raises(UsageError, match="--simplify 只用于"):
        predictor.read(tmp_path / "in.jsonl", simplify=True)


@pytest.mark.parametrize(("free", "dtype"), [(200, torch.float32), (80, None)])
def test_a_model_too_large_for_float32_is_used_as_it_is_saved(
    free: int, dtype: torch.dtype | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(PRESETS["27b"].to_dict()))
    monkeypatch.setattr(plain, "free_memory", lambda _device: free * 10**9)
    assert plain._float32_if_it_fits(tmp_path, torch.device("cuda")) is dtype
    assert plain._float32_if_it_fits(tmp_path, torch.device("cpu")) is torch.float32

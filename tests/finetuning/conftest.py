"""Twenty examples of each kind of task, and a model small enough to learn them by heart."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from plug.finetuning.settings import FinetuneSettings
from plug.loading.save import save
from plug.model.configuration import PlugConfig
from plug.model.plug import Plug
from plug.tokenization import PlugTokenizer

pytest.importorskip("transformers")

CHARACTERS = "今天气很好，我们去公园看花。山上有座庙"


@pytest.fixture(autouse=True)
def quick(request: pytest.FixtureRequest) -> None:
    """Pictures are not drawn, but where a test asks for `drawn`."""
    request.getfixturevalue("undrawn")


@pytest.fixture
def base_model(config: PlugConfig, tiny_tokenizer: PlugTokenizer, tmp_path: Path) -> Path:
    """The directory of a model as initialisation leaves it; without dropout it learns sooner."""
    torch.manual_seed(0)
    config = replace(config, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    save(Plug(config), tmp_path / "base", tokenizer=tiny_tokenizer)
    return tmp_path / "base"


@pytest.fixture
def settings(base_model: Path, tmp_path: Path) -> Callable[..., FinetuneSettings]:
    """`settings(task, train)`: short and fast; evaluated on the same file unless changed."""

    def make(task: str, train: Path, **changes: Any) -> FinetuneSettings:
        values: dict[str, Any] = {
            "task": task,
            "train": str(train),
            "eval": str(train),
            "model": str(base_model),
            "output": str(tmp_path / "output"),
            "epochs": 1.0,
            "batch_size": 10,
            "learning_rate": 5e-3,
            "source_length": 32,
            "target_length": 16,
        }
        return FinetuneSettings(**values | changes)

    return make


def text(number: int) -> str:
    """Six characters, other ones for each number."""
    return "".join(random.Random(number).sample(CHARACTERS, 6))


@pytest.fixture
def write_lines(tmp_path: Path) -> Callable[..., Path]:
    """`write_lines(name, rows)`: a JSON object a line."""

    def write(name: str, rows: list[Any]) -> Path:
        path = tmp_path / name
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return path

    return write


def classification_rows() -> list[dict[str, Any]]:
    return [{"text": text(number), "label": "花山庙"[number % 3]} for number in range(20)]


def labelling_rows() -> list[dict[str, Any]]:
    rows = []
    for number in range(20):
        tags = ["O"] * 6
        tags[number % 4 : number % 4 + 2] = ["B-X", "I-X"] if number % 2 else ["B-Y", "I-Y"]
        rows.append({"tokens": list(text(number)), "tags": tags})
    return rows


def generation_rows() -> list[dict[str, Any]]:
    return [
        {"src_txt": f"花[SEP]{text(number)}", "tgt_txt": text(number)[::-1][:3] + "。"}
        for number in range(20)
    ]


def reading_paragraphs() -> list[dict[str, Any]]:
    return [
        {
            "context": text(number),
            "qas": [
                {
                    "id": f"q{number}",
                    "question": "花有？",
                    "answers": [{"text": text(number)[start : start + 2], "answer_start": start}],
                }
            ],
        }
        for number in range(20)
        for start in [number % 4]
    ]


@pytest.fixture
def data(write_lines: Callable[..., Path]) -> Callable[..., Path]:
    """`data(task, times)`: a file of the task's twenty examples, each so many times."""

    def write(task: str, times: int = 1) -> Path:
        if task == "reading":
            articles = [{"paragraphs": reading_paragraphs() * times}]
            return write_lines(f"reading-{times}.json", [{"data": articles}])
        rows = {
            "classification": classification_rows,
            "labelling": labelling_rows,
            "generation": generation_rows,
        }[task]()
        return write_lines(f"{task}-{times}.jsonl", rows * times)

    return write

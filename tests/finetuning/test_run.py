"""`finetune` itself: it learns, it resumes exactly, and it refuses what makes no sense."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from safetensors.torch import load_file  # noqa: E402
from transformers import TrainerCallback  # noqa: E402

from plug.errors import PlugError, UsageError  # noqa: E402
from plug.finetuning.predict import Predictor  # noqa: E402
from plug.finetuning.run import finetune  # noqa: E402
from plug.finetuning.settings import FinetuneSettings  # noqa: E402

Make = Callable[..., FinetuneSettings]

REPORT = {"report.md", "report.html", "metrics.json", "predictions.jsonl", "log.jsonl"}


@pytest.mark.parametrize(
    ("task", "metric", "times"),
    [
        ("classification", "accuracy", 30),
        ("labelling", "f1", 40),
        ("reading", "exact_match", 40),
        ("generation", "exact_match", 60),
    ],
)
def test_twenty_examples_are_learnt_by_heart(
    task: str, metric: str, times: int, settings: Make, data: Callable[..., Path]
) -> None:
    once = data(task)
    result = finetune(settings(task, data(task, times), eval=str(once), epochs=3.0), device="cpu")

    assert result.metrics[metric] == 1.0
    written = {path.name for path in result.directory.iterdir()}
    assert written >= REPORT | {"config.json", "model.safetensors", "tokenizer.json"}
    assert "checkpoints" not in written

    predictor = Predictor(result.directory, "cpu")
    examples = predictor.read(once)
    scores = predictor.kind.evaluate(examples, predictor(examples, batch_size=7)).metrics
    assert scores == pytest.approx(result.metrics)

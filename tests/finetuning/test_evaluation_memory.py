"""Evaluations amid training take less memory than the training, and no more for more examples."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from plug.finetuning.kind import Collator, Kind, find_kind
from plug.finetuning.settings import FinetuneSettings
from plug.finetuning.tasks import find_task, read_examples
from plug.hf import PlugTransformersConfig
from plug.model.configuration import PlugConfig
from plug.tokenization import PlugTokenizer

TASKS = ["classification", "labelling", "reading", "generation"]
BATCH = 10


def prepared(
    settings: FinetuneSettings, tokenizer: PlugTokenizer
) -> tuple[Kind[Any, Any], list[Any]]:
    task = find_task(settings.task)
    examples = read_examples(task, Path(settings.train), answered=True)
    cls = find_kind(task.kind)
    kind = cls(
        tokenizer,
        task.labels or cls.labels_of(examples, settings.train),
        source_length=32,
        target_length=8,
        **cls.facts_of(examples),
    )
    return kind, examples


def train_step(kind: Kind[Any, Any], model: Any, examples: list[Any]) -> None:
    collate = Collator(kind.tokenizer.pad_token_id)
    model.train()
    model(**collate(kind.features(examples[:BATCH]))).loss.backward()
    model.zero_grad()


@pytest.mark.parametrize("task", TASKS)
def test_an_evaluation_s_peak_is_below_training_s(
    task: str,
    settings: Callable[..., FinetuneSettings],
    data: Callable[..., Path],
    tiny_tokenizer: PlugTokenizer,
    peak_bytes: Callable[..., int],
    kept_bytes: Callable[..., int],
) -> None:
    run = settings(task, data(task, 4))
    kind, examples = prepared(run, tiny_tokenizer)
    model = kind.load_model(Path(run.model))
    weights = list(model.parameters())
    own = sum(weight.nbytes for weight in weights)

    def evaluate(some: list[Any]) -> Any:
        return kind.predict(model, some, batch_size=BATCH)

    evaluate(examples[:BATCH])  # what is made once
    training = peak_bytes(lambda: train_step(kind, model, examples), weights) - own
    few = peak_bytes(lambda: evaluate(examples[:20]), weights) - own
    many = peak_bytes(lambda: evaluate(examples), weights) - own

    assert few < training
    assert many < 1.15 * few  # four times the examples
    assert kept_bytes(lambda: evaluate(examples), weights) < 0.02 * few


@pytest.mark.gpu
@pytest.mark.parametrize("task", TASKS)
def test_on_a_gpu_too(
    task: str,
    settings: Callable[..., FinetuneSettings],
    data: Callable[..., Path],
    tiny_tokenizer: PlugTokenizer,
    config: PlugConfig,
) -> None:
    """By the allocator's own count, with a wider model."""
    from plug import hf

    run = settings(task, data(task, 4))
    kind, examples = prepared(run, tiny_tokenizer)
    wide = replace(config, hidden_size=512, num_attention_heads=8, intermediate_size=2048)
    values = wide.to_dict() | {"num_labels": len(kind.labels) or 2}
    model: Any = getattr(hf, kind.model_class)(PlugTransformersConfig(**values)).cuda()

    def peak(action: Callable[[], object]) -> int:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        action()
        return torch.cuda.max_memory_allocated() - before

    def train() -> None:
        collate = Collator(kind.tokenizer.pad_token_id)
        batch = {n: x.cuda() for n, x in collate(kind.features(examples[:BATCH])).items()}
        model.train()
        with torch.autocast("cuda", torch.bfloat16):
            model(**batch).loss.backward()
        model.zero_grad()

    kind.predict(model, examples[:BATCH], batch_size=BATCH)
    training = peak(train)
    few = peak(lambda: kind.predict(model, examples[:20], batch_size=BATCH))
    many = peak(lambda: kind.predict(model, examples, batch_size=BATCH))
    assert few < training
    assert many < 1.15 * few

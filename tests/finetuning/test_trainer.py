"""What is added to the Trainer's steps, each by itself."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from transformers import TrainingArguments

from plug import (
    PlugForConditionalGeneration,
    PlugForSequenceClassification,
    PlugForTokenClassification,
    PlugTransformersConfig,
)
from plug.finetuning.run import finetune
from plug.finetuning.settings import FinetuneSettings
from plug.finetuning.trainer import (
    ChildTuning,
    FinetuneTrainer,
    filled_up,
    learning_rate_scales,
    moved_uphill,
    symmetric_divergence,
)
from plug.hf.base import IGNORE_INDEX, cross_entropy
from plug.model.configuration import PlugConfig


def test_rates_fall_layer_by_layer_from_the_top(config: PlugConfig) -> None:
    model = PlugForConditionalGeneration(PlugTransformersConfig(**config.to_dict()))
    scales = learning_rate_scales(model, 0.5)
    expected = {  # 3 encoder layers, 2 decoder layers, the top
        "decoder.final_norm.weight": 1,
        "decoder.layers.1.cross_attention.q_proj.weight": 1 / 2,
        "decoder.layers.0.feed_forward.fc1.bias": 1 / 4,
        "encoder.layers.2.attention.q_proj.weight": 1 / 8,
        "encoder.layers.0.attention.q_proj.weight": 1 / 32,
        "embeddings.word_embeddings.weight": 1 / 64,
    }
    assert {name: scales[name] for name in expected} == expected
    assert set(scales) == {name for name, _ in model.named_parameters()}
    assert set(learning_rate_scales(model, 1.0).values()) == {1.0}


def test_the_divergence_is_that_of_the_definition() -> None:
    first, second = torch.randn(2, 4, 3, dtype=torch.float64).float()
    p, q = first.softmax(-1), second.softmax(-1)
    expected = ((p * (p / q).log()).sum(-1) + (q * (q / p).log()).sum(-1)).sum() / 2
    torch.testing.assert_close(symmetric_divergence(first, second), expected)
    assert symmetric_divergence(first, first) == 0


def test_a_smoothed_target_is_partly_the_same_for_all_labels() -> None:
    logits, labels = torch.randn(2, 3, 5), torch.tensor([[4, -100, 0], [1, 2, -100]])
    expected = 0.0
    for row, label in [((0, 0), 4), ((0, 2), 0), ((1, 0), 1), ((1, 1), 2)]:
        target = torch.full((5,), 0.3 / 5)
        target[label] += 0.7
        expected -= float((target * logits[row].log_softmax(-1)).sum()) / 4
    assert float(cross_entropy(logits, labels, label_smoothing=0.3)) == pytest.approx(expected)


@pytest.mark.parametrize("task", ["classification", "labelling"])
def test_the_loss_of_r_drop_is_that_of_two_passes(
    task: str, config: PlugConfig, tmp_path: Path
) -> None:
    """Without dropout both passes are the same, and their divergence is 0."""
    torch.manual_seed(0)
    config = replace(config, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    cls, shape = {
        "classification": (PlugForSequenceClassification, (4,)),
        "labelling": (PlugForTokenClassification, (4, 6)),
    }[task]
    model = cls(PlugTransformersConfig(**config.to_dict(), num_labels=3))
    batch = {"input_ids": torch.randint(10, 30, (4, 6)), "labels": torch.randint(0, 3, shape)}
    if task == "labelling":
        batch["labels"][0, 2:] = IGNORE_INDEX
    items = batch["labels"].ne(IGNORE_INDEX).sum() if task == "labelling" else None
    losses = []
    for changes in ({}, {"label_smoothing": 0.1}, {"r_drop": 5.0}):
        settings = FinetuneSettings(task="classification", train="", eval="", output="", **changes)
        trainer = FinetuneTrainer(
            score=lambda _: {},
            settings=settings,
            model=model,
            args=TrainingArguments(str(tmp_path), use_cpu=True, report_to="none"),
        )
        losses.append(trainer.compute_loss(model, dict(batch), num_items_in_batch=items))
    plain, smoothed, twice = losses
    logits = model(input_ids=batch["input_ids"]).logits
    expected = cross_entropy(logits, batch["labels"], label_smoothing=0.1)
    torch.testing.assert_close(plain, cross_entropy(logits, batch["labels"]))
    torch.testing.assert_close(smoothed, expected)
    torch.testing.assert_close(twice, 2 * plain)


def test_what_fills_up_the_last_batches_is_read_and_not_learnt() -> None:
    tokens = [{"input_ids": [1] * length, "labels": [2] * length} for length in (5, 3, 4)]
    reading = [{"input_ids": [1, 2], "token_type_ids": [0, 1], "start_positions": 1}]
    assert filled_up(tokens, 4) == [*tokens, {"input_ids": [1] * 3, "labels": [IGNORE_INDEX] * 3}]
    assert filled_up(tokens, 3) == tokens
    assert filled_up(reading, 2)[1] == {**reading[0], "start_positions": IGNORE_INDEX}


def test_child_tuning_keeps_a_share_and_the_mean() -> None:
    torch.manual_seed(0)
    model = torch.nn.Linear(200, 100, bias=False)
    model.weight.grad = torch.ones(100, 200)
    ChildTuning(0.25).on_pre_optimizer_step(model=model)
    assert set(model.weight.grad.unique().tolist()) == {0.0, 4.0}
    assert float(model.weight.grad.mean()) == pytest.approx(1.0, abs=0.05)


def test_an_adversarial_step_goes_uphill_and_back() -> None:
    torch.manual_seed(0)
    table = torch.nn.Embedding(7, 5)
    before = table.weight.detach().clone()

    def loss() -> torch.Tensor:
        return table(torch.tensor([1, 3, 3])).pow(2).sum()  # its gradient is 2 x, 4 x, 0 elsewhere

    loss().backward()
    expected = torch.zeros_like(before)
    expected[1], expected[3] = 2 * before[1], 4 * before[3]
    expected *= 0.5 / expected.square().sum().sqrt()
    with moved_uphill(table.weight, 0.5):
        torch.testing.assert_close(table.weight.detach() - before, expected)
        assert loss() > before[[1, 3, 3]].square().sum()
    torch.testing.assert_close(table.weight.detach(), before, rtol=0, atol=0)


def test_an_adversarial_step_without_a_gradient_goes_nowhere() -> None:
    table = torch.nn.Embedding(3, 2)
    before = table.weight.detach().clone()
    table.weight.grad = torch.zeros_like(before)
    with moved_uphill(table.weight, 1.0):
        torch.testing.assert_close(table.weight.detach(), before, rtol=0, atol=0)


@pytest.mark.parametrize("is_terminal", [False, True])
def test_a_run_tells_its_scores_and_no_dictionaries(
    is_terminal: bool,
    settings: Callable[..., FinetuneSettings],
    data: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: is_terminal)
    result = finetune(settings("classification", data("classification")), device="cpu")
    printed = capsys.readouterr()
    assert f"第 1 轮（2/2 步）：accuracy {result.metrics['accuracy']:.4f}" in printed.err
    assert ("2/2 [" in printed.err) == is_terminal
    assert "{" not in printed.out + printed.err


def test_the_norm_of_many_values_is_exact_on_a_cpu() -> None:
    """Torch's own is 1.8e-4 too small here."""
    layer = torch.nn.Linear(2**21, 3, bias=False)
    layer.weight.grad = torch.randn(3, 2**21, generator=torch.Generator().manual_seed(0))
    expected = layer.weight.grad.double()
    arguments: Any = SimpleNamespace(max_grad_norm=1.0, device=torch.device("cpu"))
    trainer: Any = SimpleNamespace(args=arguments, is_sharded=False, is_deepspeed_enabled=False)

    found = FinetuneTrainer._clip_grad_norm(trainer, layer)

    assert float(found) == pytest.approx(float(expected.norm()), rel=1e-6)
    torch.testing.assert_close(layer.weight.grad.double(), expected / expected.norm())

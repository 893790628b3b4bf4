"""What is added to the Trainer's steps, each by itself."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

from plug import PlugForConditionalGeneration, PlugTransformersConfig
from plug.finetuning.trainer import (
    ChildTuning,
    learning_rate_scales,
    symmetric_divergence,
)
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
    expected = ((p * (p / q).log()).sum(-1) + (q * (q / p).log()).sum(-1)).mean() / 2
    torch.testing.assert_close(symmetric_divergence(first, second), expected)
    assert symmetric_divergence(first, first) == 0


def test_child_tuning_keeps_a_share_and_the_mean() -> None:
    torch.manual_seed(0)
    model = torch.nn.Linear(200, 100, bias=False)
    model.weight.grad = torch.ones(100, 200)
    ChildTuning(0.25).on_pre_optimizer_step(model=model)
    assert set(model.weight.grad.unique().tolist()) == {0.0, 4.0}
    assert float(model.weight.grad.mean()) == pytest.approx(1.0, abs=0.05)

"""Layers that are computed again give the losses and gradients of those that are not."""

from __future__ import annotations

import pytest
import torch

from plug.finetuning.recomputation import layers_of, recompute_layers
from plug.hf import PlugForConditionalGeneration, PlugTransformersConfig
from plug.model.configuration import PRESETS


@pytest.mark.parametrize("count", [1, 3, 99])
def test_gradients_are_those_of_layers_that_are_kept(count: int) -> None:
    config = PlugTransformersConfig(**PRESETS["test"].to_dict())
    torch.manual_seed(0)
    model = PlugForConditionalGeneration(config).train()  # with dropout
    ids = torch.randint(5, 100, (3, 17))

    def gradients(recomputed: int) -> list[torch.Tensor]:
        recompute_layers(model, recomputed)
        torch.manual_seed(1)
        model.zero_grad()
        model(input_ids=ids, labels=ids[:, :9]).loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    expected, found = gradients(0), gradients(count)
    assert sum(layer.gradient_checkpointing for layer in layers_of(model)) == min(
        count, len(layers_of(model))
    )
    for a, b in zip(expected, found, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)

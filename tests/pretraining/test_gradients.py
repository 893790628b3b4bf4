"""Gradients in flat buffers against PyTorch's own gradients and clipping."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from plug.model.configuration import PRESETS
from plug.model.plug import Plug
from plug.pretraining import gradients as module
from plug.pretraining.gradients import Gradients


def loss(model: Plug, seed: int) -> torch.Tensor:
    ids = torch.randint(5, 90, (2, 9), generator=torch.Generator().manual_seed(seed))
    hidden = model.encode(ids)
    return model.lm_logits(model.decode(ids, hidden)).square().mean()


@pytest.mark.parametrize("elements", [1, 5000, 2**23])
@pytest.mark.parametrize("max_norm", [1e-3, 1e3])
def test_gradients_and_clipping_are_those_of_torch(
    elements: int, max_norm: float, tiny_model: Plug, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two parts of a batch, twice: nothing is left of the first step in the second."""
    tiny_model.eval()
    for seed in (0, 1):
        loss(tiny_model, seed).backward()
    reached = {name: p.grad for name, p in tiny_model.named_parameters() if p.grad is not None}
    norm = torch.nn.utils.clip_grad_norm_(tiny_model.parameters(), max_norm)
    expected = {name: gradient.clone() for name, gradient in reached.items()}
    for parameter in tiny_model.parameters():
        parameter.grad = None

    monkeypatch.setattr(module, "BUCKET_ELEMENTS", elements)
    gradients = Gradients(tiny_model.named_parameters(), world_size=1)
    for _ in range(2):
        for seed in (0, 1):
            gradients.begin(is_last=seed == 1)
            loss(tiny_model, seed).backward()
        actual_norm = gradients.finish(max_norm)
        torch.testing.assert_close(actual_norm, norm)
        ours = {name: p.grad for name, p in tiny_model.named_parameters() if p.grad is not None}
        assert ours.keys() == expected.keys()  # the heads have no part in this loss
        assert not any("head" in name for name in ours)
        torch.testing.assert_close(ours, expected)
        gradients.clear()
    assert all(parameter.grad is None for parameter in tiny_model.parameters())


def test_many_weights_take_no_more_operations_than_few(
    count_operations: Callable[[Callable[[], object]], int],
) -> None:
    """Beside those of the backward pass itself, of which every operation is waited for."""
    added = []
    for layers in (1, 3):
        model = Plug(replace(PRESETS["test"], num_hidden_layers=layers)).eval()
        alone = count_operations(loss(model, 0).backward)
        for parameter in model.parameters():
            parameter.grad = None
        gradients = Gradients(model.named_parameters(), world_size=1)
        gradients.begin(is_last=True)
        added.append(count_operations(loss(model, 0).backward) - alone)
        added[-1] += count_operations(lambda: gradients.finish(1.0))  # noqa: B023
    assert added[0] == added[1]


def test_frozen_weights_have_no_gradient(tiny_model: Plug) -> None:
    tiny_model.sentence_head.requires_grad_(False)
    Gradients(tiny_model.named_parameters(), world_size=1)
    assert all(p.grad is None for p in tiny_model.sentence_head.parameters())


def test_nothing_is_kept_in_memory_after_the_end() -> None:
    model = Plug(PRESETS["test"])
    gradients = Gradients(model.named_parameters(), world_size=1)
    loss(model, 0).backward()
    gradients.close()
    assert all(p.grad is None for p in model.parameters())
    alive = weakref.ref(model.embeddings.word_embeddings.weight)
    del model, gradients
    gc.collect()
    assert alive() is None

"""Layers that are computed again give the losses and gradients of those that are not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from plug.finetuning.recomputation import (
    is_recomputed,
    layers_of,
    recompute_cheap_parts,
    recompute_layers,
)
from plug.hf import PlugForConditionalGeneration, PlugTransformersConfig
from plug.model.configuration import PRESETS
from plug.model.plug import Plug


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


def small(dtype: torch.dtype, **sizes: int) -> PlugForConditionalGeneration:
    torch.manual_seed(0)
    config = PlugTransformersConfig(**replace(PRESETS["test"], **sizes).to_dict())
    model = PlugForConditionalGeneration(config).train().to(dtype)  # with dropout
    model.warns_of_half_precision = False
    return model


@pytest.mark.parametrize("whole", [0, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cheap_parts_that_are_computed_again_change_no_bit(dtype: torch.dtype, whole: int) -> None:
    ids = torch.randint(5, 100, (3, 17))

    def gradients(cheap: bool) -> list[torch.Tensor]:
        model = small(dtype)
        recompute_layers(model, whole)
        if cheap:
            recompute_cheap_parts(model)
        found = []
        for seed in (1, 2):
            torch.manual_seed(seed)
            model(input_ids=ids, labels=ids[:, :9]).loss.backward()
            found += [p.grad.clone() for p in model.parameters() if p.grad is not None]
        return found

    for a, b in zip(gradients(False), gradients(True), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_cheap_parts_are_not_kept(peak_bytes: Callable[..., int]) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 6}
    ids = torch.randint(5, 100, (4, 64))
    layers, tokens, hidden, inner = sizes["num_hidden_layers"], ids.numel(), 64, 256
    peaks = []
    for cheap in (False, True):
        model = small(torch.bfloat16, **sizes)
        if cheap:
            recompute_cheap_parts(model)
        pass_ = lambda model=model: model(input_ids=ids, labels=ids[:, :4]).loss.backward()  # noqa: E731
        peaks.append(peak_bytes(pass_, list(model.parameters())))
    saved = layers * tokens * (2 * hidden + inner) * 2  # two norms, GELU
    # One layer's are there at a time in any case.
    assert 0.7 * saved <= peaks[0] - peaks[1] <= 1.1 * saved  # and of the decoder's layers


def test_cheap_parts_are_left_alone_without_gradients() -> None:
    model = small(torch.float32).eval()
    ids = torch.randint(5, 100, (3, 17))
    with torch.inference_mode():
        expected = model(input_ids=ids, labels=ids).logits
        recompute_cheap_parts(model)
        assert torch.equal(model(input_ids=ids, labels=ids).logits, expected)
    assert not any(layer.forward.made for layer in layers_of(model))


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_a_plain_model_has_the_same_gradients(dropout: float) -> None:
    torch.manual_seed(0)
    shape = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    model = Plug(replace(PRESETS["test"], **shape)).train()
    ids = torch.randint(5, 100, (3, 17))

    def gradients(count: int) -> list[torch.Tensor]:
        recompute_layers(model, count)
        assert sum(map(is_recomputed, layers_of(model))) == min(count, 5)
        torch.manual_seed(1)
        model.zero_grad()
        model.lm_logits(model.decode(ids[:, :9], model.encode(ids))).logsumexp(-1).sum().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    expected = gradients(0)
    for count in (2, 99, 0, 1):
        for a, b in zip(expected, gradients(count), strict=True):
            assert torch.equal(a, b)


def test_a_plain_layer_keeps_its_input_alone() -> None:
    model = Plug(PRESETS["test"]).train()
    ids = torch.randint(5, 100, (3, 17))

    def kept(count: int) -> int:
        recompute_layers(model, count)
        sizes: dict[int, int] = {}

        def pack(x: torch.Tensor) -> torch.Tensor:
            sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            model.encode(ids)
        weights = {x.untyped_storage().data_ptr() for x in model.parameters()}
        return sum(size for place, size in sizes.items() if place not in weights)

    whole, part, nothing = kept(0), kept(2), kept(3)
    assert whole > 2 * part > 3 * nothing

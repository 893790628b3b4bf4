"""Layers with a backward pass of their own, against peft's layers under PyTorch's autograd."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from plug.finetuning import adapted_products
from plug.finetuning.adapted_layers import adapt_layers
from plug.finetuning.lora import adapt
from plug.finetuning.recomputation import recompute_layers
from plug.finetuning.settings import FinetuneSettings
from plug.hf import PlugForConditionalGeneration, PlugForTokenClassification, PlugTransformersConfig
from plug.model.configuration import PRESETS
from plug.quantization.linear import QuantizedLinear
from plug.quantization.scheme import Scheme

pytest.importorskip("peft")
pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.gradient_checkpointing:FutureWarning"),
]

LAYERS = PRESETS["test"].num_hidden_layers + PRESETS["test"].num_decoder_layers
DROPOUT = {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.2}
NONE = dict.fromkeys(DROPOUT, 0.0)
CLOSE = {"rtol": 2e-4, "atol": 2e-5}


def made(cls: Any, bits: int, dropout: dict[str, float] = NONE, **settings: Any) -> Any:
    """A model with adapters that are not zero, on random weights of so many bits."""
    torch.manual_seed(0)
    config = replace(
        PRESETS["test"], hidden_size=128, intermediate_size=256, initializer_range=0.05, **dropout
    )
    entry = {} if bits == 16 else {"quantization": Scheme.of(bits).to_dict()}
    model = cls(PlugTransformersConfig(**config.to_dict(), **entry, num_labels=3))
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            weight = 0.05 * torch.randn(module.out_features, module.in_features)
            for name, tensor in module.scheme.quantize(weight).items():
                setattr(module, name, tensor)
            module.bias = 0.05 * torch.randn(module.out_features)
    run = FinetuneSettings(
        task="cmrc2018_qg", train="", eval="", output="",
        **{"memory": "lora", "lora_rank": 5, "lora_dropout": 0.0, **settings},
    )  # fmt: skip
    adapted = adapt(model, run)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return adapted.train()


def batch(padded: bool) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(5, 100, (3, 17), generator=generator)
    mask = torch.ones_like(ids)
    if padded:
        mask[1, 11:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids[:, :9] % 3}


def gradients(model: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss, and the gradients of all that is trained."""
    model.zero_grad()
    torch.manual_seed(7)
    loss = model(**inputs).loss
    loss.backward()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert all(p.grad is not None for p in trained.values())
    return loss.detach(), {n: p.grad.clone() for n, p in trained.items()}


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("bits", [16, 8, 4])
def test_losses_and_gradients_are_those_of_peft(bits: int, padded: bool) -> None:
    model = made(PlugForConditionalGeneration, bits)
    inputs = batch(padded)
    expected_loss, expected = gradients(model, inputs)

    assert adapt_layers(model, in_fp8=False) == LAYERS
    for recomputed in (0, 99):
        recompute_layers(model, recomputed)
        loss, found = gradients(model, inputs)
        torch.testing.assert_close(loss, expected_loss, **CLOSE)
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, **CLOSE, msg=name)


@pytest.mark.parametrize("in_fp8", [False, True])
def test_recomputed_layers_repeat_their_dropout(in_fp8: bool) -> None:
    model = made(PlugForConditionalGeneration, 4, DROPOUT, lora_dropout=0.3)
    adapt_layers(model, in_fp8=in_fp8)
    expected_loss, expected = gradients(model, batch(padded=True))
    recompute_layers(model, 2)
    loss, found = gradients(model, batch(padded=True))
    assert torch.equal(loss, expected_loss)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_gradients_with_dropout_are_those_of_the_loss() -> None:
    """The same masks in both passes: the loss changes along a gradient as it says."""
    model = made(PlugForConditionalGeneration, 16, DROPOUT, lora_dropout=0.3).double()
    adapt_layers(model, in_fp8=False)
    inputs = batch(padded=True)
    _, found = gradients(model, inputs)
    length = sum(g.double().square().sum() for g in found.values()).sqrt()
    losses = []
    for step in (1e-3, -1e-3):  # the loss is in float32
        moved = {n: p for n, p in model.named_parameters() if p.requires_grad}
        for name, parameter in moved.items():
            parameter.data += step * found[name] / length
        losses.append(gradients(model, inputs)[0])
        for name, parameter in moved.items():
            parameter.data -= step * found[name] / length
    assert ((losses[0] - losses[1]) / 2e-3).item() == pytest.approx(length.item(), rel=1e-3)


@pytest.mark.parametrize("bits", [8, 4])
def test_gradients_in_fp8_point_where_float32_s_do(bits: int) -> None:
    model = made(PlugForConditionalGeneration, bits)
    expected_loss, expected = gradients(model, batch(padded=False))
    adapt_layers(model, in_fp8=True)
    loss, found = gradients(model, batch(padded=False))
    assert loss.item() == pytest.approx(expected_loss.item(), rel=0.02)
    for name in expected:
        cosine = torch.cosine_similarity(found[name].flatten(), expected[name].flatten(), dim=0)
        assert cosine > 0.96, name


@pytest.mark.parametrize("bits", [8, 4])
def test_weights_may_be_unpacked_in_pieces(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = made(PlugForConditionalGeneration, bits)
    adapt_layers(model, in_fp8=True)
    expected = gradients(model, batch(padded=False))[1]
    monkeypatch.setattr(adapted_products, "_ELEMENTS_AT_ONCE", 1)
    found = gradients(model, batch(padded=False))[1]
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, **CLOSE, msg=name)


def test_a_classifier_s_head_is_trained_too() -> None:
    model = made(PlugForTokenClassification, 8)
    inputs = {**batch(padded=True), "labels": batch(padded=False)["input_ids"] % 3}
    expected_loss, expected = gradients(model, inputs)
    assert adapt_layers(model, in_fp8=False) == PRESETS["test"].num_hidden_layers
    loss, found = gradients(model, inputs)
    torch.testing.assert_close(loss, expected_loss, **CLOSE)
    assert any("classifier" in name for name in found)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, **CLOSE, msg=name)


def test_only_recomputed_layers_multiply_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model = made(PlugForConditionalGeneration, 16)
    adapt_layers(model, in_fp8=False)
    seen: list[Any] = []
    base = adapted_products.Products.base

    def spy(self: Any, x: Tensor, *args: Any, **options: Any) -> Any:
        seen.append(x.shape[0])
        return base(self, x, *args, **options)

    monkeypatch.setattr(adapted_products.Products, "base", spy)
    loss = model(**batch(padded=False)).loss
    seen.clear()
    loss.backward()
    assert not seen

    recompute_layers(model, 99)
    loss = model(**batch(padded=False)).loss
    seen.clear()
    loss.backward()
    # All but fc2 of each layer, and keys and values of the source.
    encoder, decoder = PRESETS["test"].num_hidden_layers, PRESETS["test"].num_decoder_layers
    assert len(seen) == 3 * encoder + 5 * decoder


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_training_moves_the_adapters_alone(bits: int) -> None:
    model = made(PlugForConditionalGeneration, bits, DROPOUT, lora_dropout=0.1)
    adapt_layers(model, in_fp8=bits < 16)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for step in range(6):
        recompute_layers(model, step)
        loss, _ = gradients(model, batch(padded=False))
        losses.append(loss.item())
        optimizer.step()
    assert losses[-1] < 0.9 * losses[0]
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) == ("lora_" not in name), name


@pytest.mark.parametrize("change", [{"dora": True}, {"lora_rank": 4}, {"lora_rank": 86}])
def test_layers_that_are_not_plain_lora_stay_as_they_are(change: dict[str, Any]) -> None:
    model = made(PlugForConditionalGeneration, 16, **change)
    if change == {"lora_rank": 4}:
        model.add_adapter("second", model.peft_config["default"])
    assert adapt_layers(model, in_fp8=False) == 0


def test_evaluation_and_attentions_are_those_of_peft() -> None:
    model = made(PlugForConditionalGeneration, 16)
    inputs = batch(padded=True)
    expected = model(**inputs, output_attentions=True)
    with torch.no_grad():
        evaluated = model.eval()(**inputs).logits
    adapt_layers(model, in_fp8=False)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, evaluated)
    found = model.train()(**inputs, output_attentions=True)
    torch.testing.assert_close(found.encoder_attentions, expected.encoder_attentions)
    torch.testing.assert_close(found.cross_attentions, expected.cross_attentions)


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [16, 8, 4])
def test_on_a_gpu_gradients_are_those_of_the_cpu(bits: int) -> None:
    expected = gradients(made(PlugForConditionalGeneration, bits), batch(padded=True))[1]
    for in_fp8 in (False, True) if bits < 16 else (False,):
        model = made(PlugForConditionalGeneration, bits)
        for parameter in model.parameters():
            if not parameter.requires_grad:
                parameter.data = parameter.data.bfloat16()
        for module in model.modules():
            if isinstance(module, QuantizedLinear):
                module.bias = module.bias.bfloat16()
        adapt_layers(model.cuda(), in_fp8=in_fp8)
        for recomputed in (0, 99):
            recompute_layers(model, recomputed)
            inputs = {name: value.cuda() for name, value in batch(padded=True).items()}
            found = gradients(model, inputs)[1]
            for name, gradient in expected.items():
                flat = found[name].cpu().float().flatten()
                assert torch.cosine_similarity(flat, gradient.flatten(), dim=0) > 0.95, name

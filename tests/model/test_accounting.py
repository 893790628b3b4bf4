from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from plug.model import accounting
from plug.model.configuration import PRESETS, PlugConfig
from plug.model.plug import Plug

ENCODER_ALONE = dataclasses.replace(PRESETS["test"], num_decoder_layers=0)
CONFIGS = [*PRESETS.values(), ENCODER_ALONE]
NAMES = [*PRESETS, "encoder alone"]


def on_meta(config: PlugConfig) -> Plug:
    """The model without its numbers: the 27B fits as well."""
    with torch.device("meta"):
        return Plug(config).eval()


def parameters_of(*modules: nn.Module | None) -> list[nn.Parameter]:
    return [each for module in modules if module is not None for each in module.parameters()]


@pytest.mark.parametrize("config", CONFIGS, ids=NAMES)
def test_parameters_by_part_are_those_of_the_modules(config: PlugConfig) -> None:
    model = on_meta(config)
    modules = {
        "embeddings": parameters_of(model.embeddings),
        "encoder": parameters_of(model.encoder),
        "decoder": parameters_of(model.decoder),
        "heads": parameters_of(model.mlm_head, model.sentence_head),
    }
    counted = {name: sum(p.numel() for p in part) for name, part in modules.items()}
    assert {n: part.parameters for n, part in accounting.parts(config).items()} == counted
    assert accounting.total(config).parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", ["mini", "27b"])
@pytest.mark.parametrize("length", [17, 512])
def test_encoder_operations_are_those_torch_counts(name: str, length: int) -> None:
    model = on_meta(PRESETS[name])
    input_ids = torch.zeros(1, length, dtype=torch.long, device="meta")
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        model.encode(input_ids)
    assert accounting.encoder_flops(model.config, length) == counter.get_total_flops()


@pytest.mark.parametrize("name", ["mini", "27b"])
def test_cross_projection_operations_are_those_torch_counts(name: str) -> None:
    model = on_meta(PRESETS[name])
    assert model.decoder is not None
    encoded = torch.zeros(1, 96, model.config.hidden_size, device="meta")
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        model.decoder.project_encoder(encoded)
    assert accounting.cross_projection_flops(model.config, 96) == counter.get_total_flops()


class FullCache:
    """A cache in which ``length`` positions are already written, and which counts its bytes."""

    def __init__(self, config: PlugConfig, length: int) -> None:
        self.shape = (1, config.num_attention_heads, length, config.head_dim)
        self.bytes_added = 0

    def update(self, key: Tensor, value: Tensor, _layer_index: int) -> tuple[Tensor, Tensor]:
        self.bytes_added += key.nbytes + value.nbytes
        old = torch.zeros(self.shape, dtype=key.dtype, device="meta")
        return torch.cat([old, key], dim=2), torch.cat([old, value], dim=2)


@pytest.mark.parametrize("name", ["mini", "27b"])
@torch.inference_mode()
def test_operations_and_cache_of_one_step_are_those_torch_counts(name: str) -> None:
    model = on_meta(PRESETS[name]).bfloat16()
    assert model.decoder is not None
    encoded = torch.zeros(1, 512, model.config.hidden_size, dtype=torch.bfloat16, device="meta")
    projected = model.decoder.project_encoder(encoded)
    token = torch.zeros(1, 1, dtype=torch.long, device="meta")
    cache = FullCache(model.config, length=63)
    mask = torch.ones(1, 64, dtype=torch.bool, device="meta")
    with FlopCounterMode(display=False) as counter:
        hidden = model.decoder(model.embeddings(token), projected, None, mask, cache)
        model.lm_logits(hidden)
    assert accounting.step_flops(model.config, 512, position=64) == counter.get_total_flops()
    assert accounting.cache_bytes(model.config) == cache.bytes_added
    source_bytes = sum(key.nbytes + value.nbytes for key, value in projected)
    assert accounting.cache_bytes(model.config) * 512 == source_bytes


def test_the_27b_costs_what_the_specification_says() -> None:
    """Spec section 7, which leaves attention's own products out of the operations."""
    config = PRESETS["27b"]
    assert round(accounting.step_weights(config) / 1e9, 2) == 5.81
    assert round(2 * accounting.step_weights(config) / 1e9, 1) == 11.6
    assert accounting.cache_bytes(config) == 196_608
    attention = 24 * 4 * config.hidden_size * 512**2
    assert round((accounting.encoder_flops(config, 512) - attention) / 1e12, 1) == 19.8


def test_an_encoder_alone_writes_nothing() -> None:
    assert accounting.step_weights(ENCODER_ALONE) == 0
    assert accounting.step_flops(ENCODER_ALONE, 512, 64) == 0
    assert accounting.cache_bytes(ENCODER_ALONE) == 0


@pytest.mark.parametrize("every_parameter", [True, False])
def test_training_operations_are_those_torch_counts(every_parameter: bool) -> None:
    model = on_meta(PRESETS["mini"])
    for name, parameter in model.named_parameters():
        # Norms' gradients take no operations, and need those of all layers' inputs.
        parameter.requires_grad_(every_parameter or "embeddings.layer_norm" in name)
    ids = torch.zeros(1, 64, dtype=torch.long, device="meta")
    target = torch.zeros(1, 1, dtype=torch.long, device="meta")
    with FlopCounterMode(display=False) as counter:
        model.lm_logits(model.decode(target, model.encode(ids))).sum().backward()
    counted = counter.get_total_flops()
    found = accounting.training_flops(model.config, 64, 1, every_parameter=every_parameter)
    # Attention's products have no weights: their backward is twice the forward in both cases.
    assert found == pytest.approx(counted, rel=0.02)

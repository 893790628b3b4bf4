"""Error feedback against rounding to the nearest, on inputs that a layer really gets."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from plug.errors import UsageError
from plug.model.configuration import PlugConfig
from plug.model.plug import Plug
from plug.quantization.calibration import Example, calibrated, fit_scale, quantize_with_moments
from plug.quantization.scheme import Scheme

FOUR = Scheme.of(4)


def output_error(weight: torch.Tensor, tensors: dict[str, torch.Tensor], x: torch.Tensor) -> float:
    return float((x @ (FOUR.dequantize(tensors, torch.float32) - weight).T).square().mean())


def test_correlated_inputs_lose_less_than_by_rounding_to_the_nearest() -> None:
    torch.manual_seed(0)
    weight = torch.randn(64, 256)
    x = torch.randn(2000, 32) @ torch.randn(32, 256) + 0.1 * torch.randn(2000, 256)

    found = quantize_with_moments(weight, x.T @ x)

    nearest = FOUR.quantize(weight)
    assert output_error(weight, found, x) < 0.3 * output_error(weight, nearest, x)
    assert {key: (v.dtype, v.shape) for key, v in found.items()} == {
        key: (v.dtype, v.shape) for key, v in nearest.items()
    }


def test_independent_inputs_lose_no_more_than_by_rounding_to_the_nearest() -> None:
    torch.manual_seed(0)
    weight = torch.randn(64, 256)

    found = quantize_with_moments(weight, torch.eye(256))

    x = torch.randn(2000, 256)
    assert output_error(weight, found, x) <= 1.01 * output_error(weight, FOUR.quantize(weight), x)


@pytest.mark.parametrize("moments", [torch.zeros(256, 256), torch.ones(256, 256)])
def test_inputs_that_never_vary_are_no_harm(moments: torch.Tensor) -> None:
    weight = torch.randn(8, 256)

    restored = FOUR.dequantize(quantize_with_moments(weight, moments), torch.float32)

    assert restored.isfinite().all()
    assert (restored - weight).abs().max() < 1.5


def test_a_group_of_equal_weights_is_exact() -> None:
    group = torch.full((3, 128), 0.5)

    scale, center = fit_scale(group, torch.ones(128))

    assert scale.tolist() == [0, 0, 0]
    assert center.tolist() == [0.5, 0.5, 0.5]


@pytest.fixture
def wide_config(config: PlugConfig) -> PlugConfig:
    return PlugConfig.from_dict(
        config.to_dict() | {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4}
    )


def test_every_layer_comes_once_and_the_model_becomes_what_the_integers_stand_for(
    wide_config: PlugConfig, make_model: Callable[[PlugConfig], Plug]
) -> None:
    model = make_model(wide_config)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 100, (20, 12), generator=generator).tolist()
    before = {name: each.clone() for name, each in model.named_parameters()}

    found = dict(calibrated(model, [Example(row[:7], row[7:]) for row in ids]))

    linears = {name.removesuffix(".weight") for name in before if ".layers." in name}
    linears = {name for name in linears if isinstance(_module(model, name), torch.nn.Linear)}
    assert found.keys() == linears
    for name, tensors in found.items():
        weight = model.get_submodule(name).get_parameter("weight")
        torch.testing.assert_close(weight, FOUR.dequantize(tensors, torch.float32))
        assert not torch.equal(weight, before[f"{name}.weight"])


def _module(model: Plug, name: str) -> torch.nn.Module | None:
    return dict(model.named_modules()).get(name)


def test_too_few_texts_and_an_encoder_alone_are_refused(
    wide_config: PlugConfig, make_model: Callable[[PlugConfig], Plug]
) -> None:
    with pytest.raises(UsageError, match="至少要 8 段"):
        list(calibrated(make_model(wide_config), [Example([5, 6], [7, 8])] * 3))
    alone = PlugConfig.from_dict(wide_config.to_dict() | {"num_decoder_layers": 0})
    with pytest.raises(UsageError, match="只有编码器"):
        list(calibrated(make_model(alone), [Example([5, 6], [7, 8])] * 20))

"""The kernels of training against the same functions in plain PyTorch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("triton", reason="needs triton, which PyTorch for CUDA brings along")

from plug.finetuning import plain_training as plain
from plug.kernels import training as kernels
from plug.quantization.scheme import Scheme

CLOSE = {"rtol": 2e-5, "atol": 2e-5}
ROWS, SIZE, RANK = 67, 130, 5


def check_fp8(found: torch.Tensor, expected: torch.Tensor) -> None:
    """A quotient between two values may fall on either side; the interpreter rounds badly."""
    if found.is_cuda:
        torch.testing.assert_close(found.float(), expected.float(), rtol=0.13, atol=0.01)
        assert (found.float() != expected.float()).float().mean() < 0.01
    else:
        error = (found.float() - expected.float()).norm() / expected.float().norm()
        assert error < 0.3


@pytest.fixture
def x(generator: torch.Generator) -> torch.Tensor:
    return torch.randn(ROWS, SIZE + 6, generator=generator)[:, :SIZE]  # with strides


@pytest.mark.parametrize("options", [{}, {"rate": 0.3, "seed": 1234567}])
def test_thin_products(
    options: dict[str, Any], x: torch.Tensor, generator: torch.Generator
) -> None:
    a = torch.randn(SIZE, RANK, generator=generator).t()
    u = torch.randn(ROWS, RANK + 2, generator=generator)[:, :RANK]

    for name, first in (("project", (x, a)), ("outer", (u, x))):
        found = getattr(kernels, name)(*first, alpha=1.5, **options)
        expected = getattr(plain, name)(*first, alpha=1.5, **options)
        torch.testing.assert_close(found, expected, **CLOSE)

    turned = kernels.outer(u, x, transposed=True, **options)
    torch.testing.assert_close(turned, plain.outer(u, x, transposed=True, **options), **CLOSE)


def test_thin_products_in_parts(generator: torch.Generator) -> None:
    u, x = torch.randn(700, 16, generator=generator), torch.randn(700, 3000, generator=generator)
    torch.testing.assert_close(kernels.outer(u, x), u.t() @ x, rtol=1e-4, atol=1e-4)
    a = torch.randn(16, 3000, generator=generator)
    torch.testing.assert_close(kernels.project(x, a), x @ a.t(), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("rank", [33, 85, 255])
def test_thin_products_of_larger_ranks(rank: int, generator: torch.Generator) -> None:
    u, x = torch.randn(40, rank, generator=generator), torch.randn(40, 300, generator=generator)
    a = torch.randn(rank, 300, generator=generator)
    wide = {"rtol": 1e-4, "atol": 1e-3}
    torch.testing.assert_close(kernels.project(x, a), x @ a.t(), **wide)
    torch.testing.assert_close(kernels.outer(u, x), u.t() @ x, **wide)
    torch.testing.assert_close(kernels.expand_(x.clone(), u, a), x + u @ a, **wide)
    options = {"alpha": 0.5, "rate": 0.1, "seed": 3}
    found = kernels.through_gelu_(x.clone(), u, a, a, wants_gelu=False, **options)[0]
    expected = plain.through_gelu_(x.clone(), u, a, a, wants_gelu=False, **options)[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-2)
    back = [
        module.back_through_gelu_(x.clone(), x, u, a, u, **options) for module in (kernels, plain)
    ]
    torch.testing.assert_close(*back, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("rate", [0.0, 0.4])
def test_adding_a_thin_product(
    rate: float, with_residual: bool, x: torch.Tensor, generator: torch.Generator
) -> None:
    u = torch.randn(ROWS, RANK, generator=generator)
    b = torch.randn(SIZE, RANK, generator=generator).t()
    residual = torch.randn(ROWS, SIZE, generator=generator) if with_residual else None
    options: dict[str, Any] = {"alpha": 0.5, "rate": rate, "seed": 99, "residual": residual}

    expected = plain.expand_(x.clone(), u, b, **options)
    torch.testing.assert_close(kernels.expand_(x, u, b, **options), expected, **CLOSE)


@pytest.mark.parametrize("wants_gelu", [False, True])
@pytest.mark.parametrize("rate", [0.0, 0.4])
def test_between_two_layers_there_and_back(
    rate: float, wants_gelu: bool, generator: torch.Generator
) -> None:
    y, gradient = torch.randn(2, ROWS, SIZE, generator=generator)
    u, after = (torch.randn(ROWS, rank, generator=generator) for rank in (RANK, 19))
    b = torch.randn(SIZE, RANK, generator=generator).t()
    a = torch.randn(19, SIZE, generator=generator)
    options: dict[str, Any] = {"alpha": 0.5, "rate": rate, "seed": 2**31 - 5}
    there: list[Any] = []
    back: list[Any] = []
    for module in (kernels, plain):
        own, own_gradient = y.clone(), gradient.clone()
        there.append((*module.through_gelu_(own, u, b, a, wants_gelu=wants_gelu, **options), own))
        found = module.back_through_gelu_(own_gradient, own, after, a, u, **options)
        back.append((*found, own_gradient))
    for one, other in (there, back):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rate", [0.0, 0.4])
def test_dropout(rate: float, generator: torch.Generator) -> None:
    x = torch.randn(70, 90, generator=generator)
    expected = plain.dropped(x, rate=rate, seed=5)
    torch.testing.assert_close(kernels.dropped(x, rate=rate, seed=5), expected, **CLOSE)


def test_dropout_keeps_its_share_and_another_share_with_another_seed() -> None:
    ones = torch.ones(200, 500)
    kept = [kernels.dropped(ones, rate=0.3, seed=seed) > 0 for seed in (1, 2, 2**31 + 7)]
    for each in kept:
        assert each.float().mean().item() == pytest.approx(0.7, abs=0.01)
        assert each[:, 1:].float().corrcoef().fill_diagonal_(0).abs().max() < 0.25
    both = (kept[0] & kept[1]).float().mean().item()
    assert both == pytest.approx(0.49, abs=0.01)


def test_norms(generator: torch.Generator) -> None:
    value, gradient, residual = torch.randn(3, 9, 96, generator=generator)
    layer = nn.LayerNorm(96)
    layer.weight.data = 1 + 0.1 * torch.randn(96, generator=generator)
    layer.bias.data = torch.randn(96, generator=generator)
    torch.testing.assert_close(kernels.norm(value, layer), plain.norm(value, layer), **CLOSE)
    expected = plain.norm_backward_(gradient.clone(), value, layer, residual)
    found = kernels.norm_backward_(gradient, value, layer, residual)
    torch.testing.assert_close(found, expected, **CLOSE)


@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("with_units", [False, True])
def test_rows_in_fp8(
    with_units: bool, gelu: bool, x: torch.Tensor, generator: torch.Generator
) -> None:
    units = torch.rand(SIZE, generator=generator) + 0.1 if with_units else None
    found, expected = kernels.quantize(x, units, gelu=gelu), plain.quantize(x, units, gelu=gelu)
    torch.testing.assert_close(found[1], expected[1], **CLOSE)
    check_fp8(found[0], expected[0])


@pytest.mark.parametrize("rows", [1, 16, 150])
@pytest.mark.parametrize("size", [48, 80])
def test_columns_in_fp8(rows: int, size: int, generator: torch.Generator) -> None:
    x = torch.randn(rows, size, generator=generator)
    x[:, 3] = 0.0
    found, expected = kernels.quantize_columns(x), plain.quantize_columns(x)
    assert found[0].shape == (size, -(-rows // 16) * 16)
    torch.testing.assert_close(found[1], expected[1], **CLOSE)
    check_fp8(found[0], expected[0])
    assert not found[0][:, rows:].float().any()


def _of(name: str, bits: int, columns: slice) -> slice:
    """Where a part of a quantised weight has some columns."""
    each = (8 // bits if bits == 4 else 1) if name == "weight" else 128
    return slice(columns.start // each, columns.stop // each)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float8_e4m3fn])
@pytest.mark.parametrize("bits", [8, 4])
def test_unpacked_weights(
    bits: int, dtype: torch.dtype, transposed: bool, generator: torch.Generator
) -> None:
    weight = torch.randn(80, 384, generator=generator)
    tensors = Scheme.of(bits).quantize(weight)
    units = torch.rand(80, generator=generator) + 0.1 if bits == 4 else None
    columns = slice(128, 384)  # of all 384
    shape = (256, 80) if transposed else (80, 256)
    cut = {
        name: each if each.ndim == 1 else each[:, _of(name, bits, columns)]
        for name, each in tensors.items()
    }
    wide = [torch.zeros(shape[0], shape[1] + 16).to(dtype) for _ in range(2)]
    for module, out in zip((kernels, plain), wide, strict=True):
        module.unpack(
            cut["weight"], cut["scale"], cut.get("center"), out[:, 16:],
            units=units, transposed=transposed,
        )  # fmt: skip
    if dtype == torch.float32:
        torch.testing.assert_close(*wide, **CLOSE)
    else:
        check_fp8(*wide)
    assert not wide[0][:, :16].float().any()

"""`PackedLinear` against the product in float64 of the weights it stands for."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

pytest.importorskip("triton", reason="needs triton, which PyTorch for CUDA brings along")

from plug.kernels.packed_linear import PackedLinear
from plug.quantization.linear import QuantizedLinear
from plug.quantization.scheme import Scheme

# On a GPU each warp takes several steps.
IN = 2048 if torch.cuda.is_available() else 512
# Two layers to stack, small ones for the interpreter.
OUT = (192, 64) if torch.cuda.is_available() else (32, 16)


def layer(
    n_in: int,
    out: int,
    scheme: Scheme | None,
    generator: torch.Generator,
    dtype: torch.dtype = torch.bfloat16,
) -> nn.Module:
    weight = torch.randn(out, n_in, generator=generator) / n_in**0.5
    bias = torch.randn(out, generator=generator).to(dtype)
    made: nn.Module
    if scheme is None:
        made = nn.Linear(n_in, out, dtype=dtype)
        made.load_state_dict({"weight": weight.to(dtype), "bias": bias})
    else:
        made = QuantizedLinear(n_in, out, scheme)
        made.load_state_dict(scheme.quantize(weight) | {"bias": bias}, assign=True)
    return made.requires_grad_(False)


def layers(bits: int, dtype: torch.dtype, generator: torch.Generator) -> list[nn.Module]:
    scheme = Scheme.of(bits) if bits < 16 else None
    return [layer(IN, out, scheme, generator, dtype) for out in OUT]


def exact(x: torch.Tensor, made: list[nn.Module]) -> torch.Tensor:
    parts = []
    for each in made:
        if isinstance(each, QuantizedLinear):
            weight = each.dequantized(torch.float64)
        else:
            weight = each.weight.double()
        parts.append(F.linear(x.double(), weight, each.bias.double()))
    return torch.cat(parts, 1)


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize(
    "rows", [9, *(pytest.param(n, marks=pytest.mark.gpu) for n in (1, 3, 8, 16, 17, 32, 50, 100))]
)
@torch.inference_mode()
def test_any_number_of_rows(
    rows: int, bits: int, dtype: torch.dtype, generator: torch.Generator
) -> None:
    made = layers(bits, dtype, generator)
    x = torch.randn(rows, IN, generator=generator).to(dtype)
    expected = exact(x, made)
    weight = PackedLinear(*made)  # type: ignore[arg-type]

    got = weight(x)

    in_fp8 = x.is_cuda and rows > 64 and bits < 16
    assert relative_error(got, expected) < (0.04 if in_fp8 else 0.003)
    assert weight(x, wide=True).dtype == torch.float32
    assert got.dtype == dtype


@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("rows", [9, *(pytest.param(n, marks=pytest.mark.gpu) for n in (1, 100))])
@torch.inference_mode()
def test_a_feed_forward_layer(rows: int, bits: int, generator: torch.Generator) -> None:
    scheme = Scheme.of(bits) if bits < 16 else None
    first, second = layer(IN, 128, scheme, generator), layer(128, 64, scheme, generator)
    x = torch.randn(rows, IN, generator=generator).bfloat16()
    expected = exact(F.gelu(exact(x, [first])), [second])

    got = PackedLinear(second).after(PackedLinear(first), x)  # type: ignore[arg-type]

    in_fp8 = x.is_cuda and rows > 64 and bits < 16
    assert relative_error(got, expected) < (0.06 if in_fp8 else 0.006)


@pytest.mark.parametrize("bits", [16, 8, 4])
@torch.inference_mode()
def test_stacked_layers_keep_their_own_weights(bits: int, generator: torch.Generator) -> None:
    made = layers(bits, torch.bfloat16, generator)
    x = torch.randn(2, IN, generator=generator).bfloat16()
    before = [each(x) for each in made]
    saved = [copy.deepcopy(each.state_dict()) for each in made]

    PackedLinear(*made)  # type: ignore[arg-type]

    for each, expected, state in zip(made, before, saved, strict=True):
        assert torch.equal(each(x), expected)
        assert all(torch.equal(each.state_dict()[name], value) for name, value in state.items())
    first, second = (each.weight.untyped_storage().data_ptr() for each in made)
    assert first == second


@pytest.mark.parametrize("bits", [16, 8, 4])
@torch.inference_mode()
def test_layers_may_be_packed_again(bits: int, generator: torch.Generator) -> None:
    made = layers(bits, torch.bfloat16, generator)
    x = torch.randn(9, IN, generator=generator).bfloat16()
    first = PackedLinear(*made)  # type: ignore[arg-type]
    expected = first(x)

    second = PackedLinear(*made)  # type: ignore[arg-type]

    assert torch.equal(second(x), expected)
    assert torch.equal(first(x), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [16, 8, 4])
@torch.inference_mode()
def test_a_rows_result_does_not_depend_on_the_others(bits: int, generator: torch.Generator) -> None:
    weight = PackedLinear(*layers(bits, torch.bfloat16, generator))  # type: ignore[arg-type]
    x = torch.randn(8, IN, generator=generator).bfloat16()

    together = weight(x)

    assert all(torch.equal(together[i : i + 1], weight(x[i : i + 1])) for i in range(8))


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [8, 4])
@torch.inference_mode()
def test_many_rows_of_a_step_read_a_copy_in_fp8(bits: int, generator: torch.Generator) -> None:
    made = layers(bits, torch.bfloat16, generator)
    x = torch.randn(50, IN, generator=generator).bfloat16()
    expected = exact(x, made)
    weight = PackedLinear(*made)  # type: ignore[arg-type]
    few = weight(x[:32])
    assert weight.fp8_bytes == IN * sum(OUT)

    weight.keep_fp8()

    assert weight.fp8_bytes == 0
    assert weight.wants_fp8(x)
    assert torch.equal(weight(x[:32]), few)
    assert relative_error(weight(x), expected) < 0.05


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [8, 4])
@torch.inference_mode()
def test_sources_are_multiplied_in_fp8(bits: int, generator: torch.Generator) -> None:
    made = layers(bits, torch.bfloat16, generator)
    x = torch.randn(5, IN, generator=generator).bfloat16()
    expected = exact(x, made)

    weight = PackedLinear(*made, for_sources=True)  # type: ignore[arg-type]

    assert relative_error(weight._many_rows(x), expected) < 0.05

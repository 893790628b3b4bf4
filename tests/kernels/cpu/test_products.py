"""Products in 32, 16, 8 and 4 bits against float64, and one row against many."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from plug.kernels.cpu.build import LowRank, library
from plug.kernels.cpu.products import CpuProduct, in_blocks
from plug.quantization.scheme import Scheme

pytestmark = pytest.mark.skipif(library() is None, reason="needs a C++ compiler")

# (out, in): no multiples of a vector or a tile; 4 bits want whole groups.
SHAPES = [(1, 128), (7, 384), (77, 128), (64, 1280), (150, 4352)]
ODD_SHAPES = [(1, 1), (5, 3), (17, 63), (33, 65), (67, 131)]  # not for 4 bits


def weight_in(bits: int, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """The tensors that `CpuProduct` takes, and the weight that they stand for in float64."""
    if bits >= 16:
        plain = weight.bfloat16() if bits == 16 else weight
        return {"weight": plain}, plain.double()
    scheme = Scheme.of(bits)
    tensors = scheme.quantize(weight)
    return tensors, scheme.dequantize(tensors, torch.float64)


def rounded(x: Tensor, bits: int) -> Tensor:
    """Inputs as the product rounds them, in float64."""
    if bits >= 16:
        return x.double()
    groups = x.unflatten(-1, (-1, 128 if bits == 4 else x.shape[-1]))
    scale = (groups.abs().amax(-1, keepdim=True) / 127).clamp(min=1e-30)
    return ((groups / scale).round() * scale).flatten(-2).double()


@pytest.mark.parametrize(
    ("bits", "out", "inputs"),
    [(bits, *shape) for bits in (32, 16, 8, 4) for shape in SHAPES]
    + [(bits, *shape) for bits in (32, 16, 8) for shape in ODD_SHAPES],
)
@pytest.mark.parametrize("rows", [1, 3, 4, 9, 70])
def test_a_product_is_that_of_float64(bits: int, out: int, inputs: int, rows: int) -> None:
    torch.manual_seed(0)
    tensors, exact = weight_in(bits, torch.randn(out, inputs))
    bias, x = torch.randn(out), torch.randn(rows, inputs)

    found = CpuProduct(bias=bias, **tensors)(x)

    # Float32 sums; an input that lies between two integers may fall to either (one in thousands).
    size = 1e-5 if bits >= 16 else 2e-3
    errors = [
        (found - expected).norm() / expected.norm()
        for inputs_as_read in (
            [x.double(), x.bfloat16().double()] if bits == 16 else [rounded(x, bits)]
        )
        for expected in [inputs_as_read @ exact.T + bias]
    ]
    assert (
        min(errors) < size
    )  # 16 bits: rows are rounded only where pairs of bfloat16 are multiplied


@pytest.mark.parametrize(
    ("bits", "inputs"),
    [(bits, inputs) for bits in (32, 16, 8, 4) for inputs in (384, 2176, 6400)]  # 3, 17, 50 groups
    + [(bits, 1000) for bits in (32, 16, 8)],
)
def test_a_row_is_the_same_to_the_last_bit_whatever_other_rows_there_are(
    bits: int, inputs: int
) -> None:
    torch.manual_seed(0)
    tensors, _ = weight_in(bits, torch.randn(70, inputs))
    multiply = CpuProduct(bias=torch.randn(70), **tensors)
    x = torch.randn(75, inputs) * torch.logspace(-3, 3, 75)[:, None]

    together = multiply(x)

    for size in (1, 2, 3, 4, 7, 33):
        parts = torch.cat([multiply(part) for part in x.split(size)])
        assert torch.equal(parts, together)


@pytest.mark.parametrize("bits", [8, 4])
def test_the_largest_integers_do_not_overflow(bits: int) -> None:
    inputs = 32768  # of the 27B's widest layer
    weight = torch.ones(4, inputs)
    weight[1] = -1
    if bits == 4:
        weight[:, ::2] *= -1  # both ends of each group's range
    tensors, exact = weight_in(bits, weight)
    x = torch.ones(1, inputs) * 3.0
    x[:, 1::2] *= -1 if bits == 4 else 1

    found = CpuProduct(bias=None, **tensors)(x)

    torch.testing.assert_close(found.double(), x.double() @ exact.T, rtol=1e-4, atol=0)


@pytest.mark.parametrize("bits", [32, 16, 8, 4])
def test_rows_of_zeros_and_no_rows(bits: int) -> None:
    tensors, _ = weight_in(bits, torch.randn(5, 128))
    bias = torch.randn(5)
    multiply = CpuProduct(bias=bias, **tensors)

    assert torch.equal(multiply(torch.zeros(2, 128)), bias.expand(2, 5))
    assert multiply(torch.zeros(0, 128)).shape == (0, 5)
    assert multiply(torch.zeros(2, 3, 128)).shape == (2, 3, 5)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_number_of_threads_changes_nothing(threads: int) -> None:
    tensors, _ = weight_in(4, torch.randn(500, 256))
    multiply, x = CpuProduct(bias=None, **tensors), torch.randn(5, 256)
    expected = multiply(x)

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert all(torch.equal(multiply(x), expected) for _ in range(20))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("bits", [32, 16, 8, 4])
@pytest.mark.parametrize("rank", [1, 8, 13])
def test_what_an_adapter_adds_is_part_of_the_product(bits: int, rank: int) -> None:
    torch.manual_seed(0)
    tensors, _ = weight_in(bits, torch.randn(150, 384))
    multiply, x = CpuProduct(bias=torch.randn(150), **tensors), torch.randn(5, 384)
    a, b = torch.randn(rank, 384), torch.randn(150, rank)
    blocks = in_blocks(b)

    found = multiply(x, LowRank(a.data_ptr(), blocks.data_ptr(), rank)) - multiply(x)

    expected = x.double() @ a.T.double() @ b.T.double()
    assert (found - expected).norm() < 1e-6 * (expected.norm() + multiply(x).norm())

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from plug.quantization.products import product


@pytest.mark.parametrize("shape", [(1, 1, 96), (5, 96), (2, 70, 96)])
def test_weights_saved_in_halves_give_the_product_of_float32(shape: tuple[int, ...]) -> None:
    weight, bias = torch.randn(64, 96).bfloat16().float(), torch.randn(64)
    weight[0] *= 2.0**-18  # below what float16 holds exactly
    x = torch.randn(shape)

    # Sums of 96 products of size 1 in float32, in another order.
    expected = F.linear(x, weight, bias)
    torch.testing.assert_close(product(weight, bias)(x), expected, rtol=1e-5, atol=1e-5)


def test_weights_that_float16_would_round_are_left_as_they_are() -> None:
    weight, x = torch.randn(64, 96), torch.randn(3, 96)

    assert torch.equal(product(weight, None)(x), F.linear(x, weight))


def test_weights_beyond_float16_are_left_as_they_are() -> None:
    weight, x = torch.full((4, 8), 1e6), torch.randn(3, 8)

    for lossless in (True, False):
        assert torch.equal(product(weight, None, lossless=lossless)(x), F.linear(x, weight))


def test_a_row_is_the_same_whatever_other_rows_there_are() -> None:
    weight = torch.randn(64, 96).bfloat16().float()
    x = torch.randn(20, 96) * torch.logspace(-3, 3, 20)[:, None]
    multiply = product(weight, None)

    together = multiply(x)

    assert all(torch.equal(multiply(x[row : row + 1])[0], together[row]) for row in range(20))

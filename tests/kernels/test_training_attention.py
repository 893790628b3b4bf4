"""Attention over whole sequences, both ways, against softmax written out in float64."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="needs triton, which PyTorch for CUDA brings along")

from plug.kernels.training_attention import attend

# Triton's interpreter multiplies the bits of bf16 (3.9). On a GPU float32 is not served.
IS_CUDA = torch.cuda.is_available()
HALF = torch.bfloat16 if IS_CUDA else torch.float16
DTYPES = [HALF] if IS_CUDA else [HALF, torch.float32]
SHAPES = [  # positions that ask, positions that are looked at, causal
    (1, 1, True),
    (1, 1, False),
    (17, 17, True),
    (17, 17, False),
    (128, 128, True),
    (128, 128, False),
    (65, 32, False),
    (3, 64, False),
    (70, 130, False),
    (150, 150, True),
]


def plain(
    query: Tensor, key: Tensor, value: Tensor, head_dim: int, is_causal: bool, kept: Tensor | None
) -> Tensor:
    """(batch, length, hidden) three times to the same, by the formula.

    ``kept``: (batch, heads, tgt, src), what each weight is multiplied by.
    """
    q, k, v = (each.unflatten(-1, (-1, head_dim)).transpose(1, 2) for each in (query, key, value))
    scores = q @ k.mT / head_dim**0.5
    if is_causal:
        ones = torch.ones(scores.shape[-2:], dtype=torch.bool)
        scores = scores.masked_fill(~ones.tril(), -torch.inf)
    weights = scores.softmax(-1)
    weights = weights if kept is None else weights * kept
    return (weights @ v).transpose(1, 2).flatten(2)


def check(found: Tensor, expected: Tensor) -> None:
    """float32 by element, halves as a whole: weights are rounded before the second product."""
    assert found.shape == expected.shape
    if found.dtype == torch.float32:
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=2e-6)
    else:
        assert (found - expected).norm() <= 0.01 * expected.norm() + 1e-6


def gradients(output: Tensor, inputs: list[Tensor], gradient: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(output, inputs, gradient.to(output.dtype)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tgt", "src", "is_causal"), SHAPES)
def test_against_the_formula(
    tgt: int, src: int, is_causal: bool, dtype: torch.dtype, generator: torch.Generator
) -> None:
    sizes = [(2, length, 48) for length in (tgt, src, src)]
    exact = [torch.randn(size, generator=generator).to(dtype).double() for size in sizes]
    inputs = [each.to(dtype).requires_grad_() for each in exact]
    gradient = torch.randn(2, tgt, 48, generator=generator).to(dtype).double()
    exact = [each.requires_grad_() for each in exact]

    found, _ = attend(*inputs, 16, is_causal)

    expected = plain(*exact, 16, is_causal, None)
    check(found, expected)
    pairs = zip(
        gradients(found, inputs, gradient), gradients(expected, exact, gradient), strict=True
    )
    for ours, theirs in pairs:
        check(ours, theirs)


@pytest.mark.slow
def test_the_longest_sequence(generator: torch.Generator) -> None:
    exact = torch.randn(1, 512, 3 * 64, generator=generator).to(HALF).double().requires_grad_()
    side_by_side = exact.detach().to(HALF).requires_grad_()
    found, _ = attend(side_by_side, None, None, 64, True)
    expected = plain(*exact.chunk(3, dim=-1), 64, True, None)
    check(found, expected)
    gradient = torch.randn(found.shape, generator=generator).to(HALF).double()
    (ours,) = gradients(found, [side_by_side], gradient)
    check(ours, *gradients(expected, [exact], gradient))


@pytest.mark.parametrize("is_causal", [True, False])
def test_projections_side_by_side(is_causal: bool, generator: torch.Generator) -> None:
    """As three tensors, and as views with other strides; one gradient, contiguous."""
    room = torch.randn(2, 21, 4 * 32, generator=generator).to(HALF)
    whole = room[..., 32:].requires_grad_()
    apart = [each.clone().detach().requires_grad_() for each in whole.chunk(3, dim=-1)]
    gradient = torch.randn(2, 32, 21, generator=generator).to(HALF).mT  # strides of its own

    found, _ = attend(whole, None, None, 16, is_causal)

    expected, _ = attend(*apart, 16, is_causal)
    assert torch.equal(found, expected)
    (ours,) = gradients(found, [whole], gradient)
    assert ours.is_contiguous()
    assert torch.equal(ours, torch.cat(gradients(expected, apart, gradient), dim=-1))


@pytest.mark.parametrize(
    ("tgt", "src", "is_causal"), [(40, 16, False), (70, 96, False), (80, 80, True)]
)
def test_dropout_keeps_the_same_weights_both_ways(
    tgt: int, src: int, is_causal: bool, generator: torch.Generator
) -> None:
    """Values that are rows of a unit matrix show each weight, 16 keys at a time."""
    rate, heads, seed = 0.3, 2, torch.tensor([12345])
    query = torch.randn(2, tgt, heads * 16, generator=generator).to(HALF)
    key, value = torch.randn(2, 2, src, heads * 16, generator=generator).to(HALF)
    shown = []
    for first in range(0, src, 16):
        units = torch.zeros(2, src, heads, 16)
        units[:, first : first + 16] = torch.eye(16)[:, None]
        weights, _ = attend(query, key, units.flatten(2).to(HALF), 16, is_causal, rate, seed)
        shown.append(weights.unflatten(-1, (heads, 16)).transpose(1, 2))
    kept = (torch.cat(shown, dim=-1) != 0).double()

    allowed = torch.ones(tgt, src).tril() if is_causal else torch.ones(tgt, src)
    assert abs(float(kept.sum() / (allowed.sum() * 2 * heads)) - (1 - rate)) < 0.03
    for one, other in ((kept[0], kept[1]), (kept[:, 0], kept[:, 1])):
        assert not torch.equal(one, other)
    exact = [each.double().requires_grad_() for each in (query, key, value)]
    inputs = [each.requires_grad_() for each in (query, key, value)]
    found, _ = attend(*inputs, 16, is_causal, rate, seed)
    expected = plain(*exact, 16, is_causal, kept / (1 - rate))
    check(found, expected)
    gradient = torch.randn(found.shape, generator=generator).to(HALF).double()
    pairs = zip(
        gradients(found, inputs, gradient), gradients(expected, exact, gradient), strict=True
    )
    for ours, theirs in pairs:
        check(ours, theirs)
    other, _ = attend(*inputs, 16, is_causal, rate, seed + 1)
    assert not torch.equal(other, found)


# torch 2.14 looks at `.grad` of tensors of its own while it checks.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_what_the_compiler_is_told(generator: torch.Generator) -> None:
    """Shapes, gradients and dynamic sizes without running it, as `torch.compile` asks for them."""
    side_by_side = torch.randn(2, 9, 3 * 32, generator=generator).to(HALF).requires_grad_()
    torch.library.opcheck(attend, (side_by_side, None, None, 16, True, 0.0, None))
    query, key, value = torch.randn(3, 2, 9, 32, generator=generator).to(HALF)
    inputs = (query.requires_grad_(), key.requires_grad_(), value.requires_grad_())
    torch.library.opcheck(attend, (*inputs, 16, False, 0.0, None))


ATTENTION = """
import itertools
import warnings
warnings.simplefilter("ignore")
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from plug.kernels import training_attention

POINTERS = {"sums": "*fp32", "products": "*fp32", "seed": "*i64"}
INTEGERS = ("tgt", "src", "heads", "threshold")
FLOATS = ("scale", "kept_share")
AT_KEYS = ("key", "value", "of_key", "of_value")
for (name, shape), drops in itertools.product(training_attention._SHAPES.items(), (False, True)):
    kernel = getattr(training_attention, "_" + name.split(",")[0])
    options = training_attention._options(shape, 480, 64, False)
    constants = {key: options.pop(key) for key in list(options) if key in kernel.arg_names}
    constants |= {"ONE_BLOCK": "one" in name} if "ONE_BLOCK" in kernel.arg_names else {}
    constants |= {} if drops else {"seed": None}
    kinds = {
        key: f"tensordesc<bf16[1,{shape.keys if key in AT_KEYS else shape.queries},64]>"
        for key in kernel.arg_names
    }
    kinds |= dict.fromkeys(INTEGERS, "i32") | dict.fromkeys(FLOATS, "fp32") | POINTERS
    kinds |= dict.fromkeys(constants, "constexpr")
    kinds = {key: kinds[key] for key in kernel.arg_names}
    source = ASTSource(fn=kernel, signature=kinds, constexprs=constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    ptx = compiled.asm["ptx"]
    print(compiled.metadata.shared, ptx.count("wgmma.mma_async"), ptx.count(" mma.sync"))
"""


@pytest.mark.slow
def test_attention_s_kernels_compile_for_the_tensor_cores_of_hopper() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    ran = subprocess.run(
        [sys.executable, "-c", ATTENTION],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    rows = [[int(word) for word in line.split()] for line in ran.stdout.splitlines()]
    assert len(rows) == 6, ran.stderr
    for shared, by_warpgroups, by_warps in rows:
        assert 3 * shared <= 232_448  # bytes that the programs of a multiprocessor share
        assert by_warpgroups > 0
        assert by_warps == 0

"""The kernel that draws, against the functions of PyTorch that do the same."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="needs triton, which PyTorch for CUDA brings along")

from plug.generation.sampling import candidates, draw
from plug.kernels.sampling import draw_of_candidates


@pytest.mark.parametrize("count", [1, 5, 32])
@torch.inference_mode()
def test_it_draws_what_pytorch_draws(count: int, generator: torch.Generator) -> None:
    rows = 24
    logits = 3 * torch.randn(rows, 50, generator=generator)
    temperature = torch.rand(rows, generator=generator) + 0.2
    top_k = torch.randint(1, count + 1, (rows,), generator=generator)
    top_p = torch.rand(rows, generator=generator).round(decimals=1).clamp_min(0.1)
    uniforms = torch.rand(rows, generator=generator)
    uniforms[:3] = torch.tensor([0.0, 1 - 2**-24, 0.5])
    expected = draw(*candidates(logits, temperature, top_k, top_p, count), uniforms)

    got = draw_of_candidates(*logits.topk(count), temperature, top_k, top_p, uniforms)

    assert torch.equal(got, expected)
    assert count == 1 or len(set((got - logits.argmax(1)).tolist())) > 1

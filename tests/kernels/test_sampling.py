"""The kernels that draw, against the functions of PyTorch that do the same."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="needs triton, which PyTorch for CUDA brings along")

from plug.generation.sampling import candidates, draw
from plug.kernels.sampling import draw_of_likeliest, keep


@pytest.mark.parametrize(("rows", "vocab", "count"), [(4, 50, 1), (16, 50, 5), (3, 1100, 20)])
@torch.inference_mode()
def test_it_draws_what_pytorch_draws(
    rows: int, vocab: int, count: int, generator: torch.Generator
) -> None:
    draws = 3
    logits = torch.randn(rows, vocab, generator=generator)
    logits[:2, ::2] = float("-inf")  # forbidden
    temperature = torch.rand(rows, generator=generator) + 1
    top_k = torch.randint(1, count + 1, (rows,), generator=generator)
    top_k[1] = count  # and its draw, below, is the last of what is left
    top_p = torch.rand(rows, generator=generator).round(decimals=1).clamp_min(0.5)
    uniforms = torch.rand(rows, draws, generator=generator)
    uniforms[:2] = torch.tensor([0.0, 1 - 2**-24])[:, None]
    following = torch.randint(0, draws, (rows,), generator=generator)
    mine = uniforms.gather(1, following[:, None])[:, 0]
    expected = draw(*candidates(logits, temperature, top_k, top_p, count), mine)

    for counts in (None, torch.rand(rows, generator=generator) < 0.5):
        after = following.clone()
        got = draw_of_likeliest(logits, temperature, top_k, top_p, count, uniforms, after, counts)

        assert torch.equal(got, expected)
        assert torch.equal(after, (following + (1 if counts is None else counts)).clamp(max=2))
    assert count == 1 or len(set((got - logits.argmax(1)).tolist())) > 1


@torch.inference_mode()
def test_of_equal_logits_the_smaller_ids_are_likelier() -> None:
    logits = torch.zeros(1, 2500)
    ones, three = torch.ones(1), torch.full((1,), 3)
    uniforms = torch.tensor([[0.1, 0.5, 0.9]])
    following = torch.zeros(1, dtype=torch.long)

    found = [
        draw_of_likeliest(logits, ones, three, ones, 3, uniforms, following).item()
        for _ in range(3)
    ]

    assert found == [0, 1, 2]


@pytest.mark.parametrize("counts", [None, [True, True, False, True, True]])
@torch.inference_mode()
def test_what_is_kept_is_fed_next(counts: list[bool] | None) -> None:
    chosen = torch.tensor([7, 3, 8, 12, 9])  # 3 ends, 10 and above are padding
    tokens = torch.tensor([20, 21, 22, 23, 24])
    positions = torch.tensor([0, 1, 2, 3, 5])
    counted = None if counts is None else torch.tensor(counts)

    shown, kept = keep(chosen, counted, tokens, positions, end=3, num_emitted=10, unknown=1, last=5)

    third = counts is None
    assert shown.tolist() == [7, 3, 8, 1, 9]
    assert kept.tolist() == [True, False, third, True, True]
    assert tokens.tolist() == [7, 21, 8 if third else 22, 1, 9]
    assert positions.tolist() == [1, 1, 3 if third else 2, 4, 5]

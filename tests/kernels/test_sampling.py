"""The kernels that draw, against the functions of PyTorch that do the same."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="needs triton, which PyTorch for CUDA brings along")

from plug.generation.sampling import NO_TOKEN, candidates, draw
from plug.kernels.sampling import draw_of_likeliest, keep


@pytest.mark.parametrize(("rows", "vocab", "count"), [(4, 50, 1), (6, 50, 5), (3, 1100, 20)])
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
    min_p = torch.tensor([0.0, 0.3]).repeat(rows)[:rows]
    uniforms = torch.rand(rows, draws, generator=generator)
    uniforms[:2] = torch.tensor([0.0, 1 - 2**-24])[:, None]
    following = torch.randint(0, draws, (rows,), generator=generator)
    mine = uniforms.gather(1, following[:, None])[:, 0]
    expected = draw(*candidates(logits, temperature, top_k, top_p, count, min_p), mine)

    for counts in (None, torch.rand(rows, generator=generator) < 0.5):
        after = following.clone()
        got = draw_of_likeliest(
            logits, temperature, top_k, top_p, count, uniforms, after, counts,
            min_p=min_p, no_token=NO_TOKEN,
        )  # fmt: skip

        assert torch.equal(got, expected)
        assert torch.equal(after, (following + (1 if counts is None else counts)).clamp(max=2))
    assert count == 1 or len(set((got - logits.argmax(1)).tolist())) > 1


@torch.inference_mode()
def test_a_bias_is_added_and_the_end_waits(generator: torch.Generator) -> None:
    rows, vocab, end = 4, 1100, 1050
    logits, bias = torch.randn(2, rows, vocab, generator=generator)
    logits[:, end] = 99
    bias[1, 5] = float("-inf")
    written, least = torch.tensor([3, 0, 7, 2]), torch.tensor([2, 9, 7, 3])
    expected = logits + bias
    expected[[1, 3], end] = float("-inf")
    ones, one = torch.ones(rows), torch.ones(rows, dtype=torch.long)

    found = draw_of_likeliest(
        logits, ones, one, ones, 1, torch.zeros(rows, 2), torch.zeros(rows, dtype=torch.long),
        min_p=torch.zeros(rows), no_token=NO_TOKEN, bias=bias, early=(written, least, end),
    )  # fmt: skip

    assert torch.equal(found, expected.argmax(1))


@torch.inference_mode()
def test_of_equal_logits_the_smaller_ids_are_likelier() -> None:
    logits = torch.zeros(1, 2500)
    ones, three = torch.ones(1), torch.full((1,), 3)
    uniforms = torch.tensor([[0.1, 0.5, 0.9]])
    following = torch.zeros(1, dtype=torch.long)

    found = [
        draw_of_likeliest(
            logits, ones, three, ones, 3, uniforms, following,
            min_p=torch.zeros(1), no_token=NO_TOKEN,
        ).item()
        for _ in range(3)
    ]  # fmt: skip

    assert found == [0, 1, 2]


@pytest.mark.parametrize("most", [1, 20])
@torch.inference_mode()
def test_where_nothing_can_be_chosen_no_token_comes_out(most: int) -> None:
    logits = torch.zeros(3, 1100)
    logits[0] = float("-inf")
    logits[1, 1050] = float("nan")
    logits[2, 7] = 9.0
    ones, kept = torch.ones(3), torch.full((3,), most)
    following = torch.zeros(3, dtype=torch.long)

    found = draw_of_likeliest(
        logits, ones, kept, ones * 0.5, most, torch.zeros(3, 2), following,
        min_p=torch.zeros(3), no_token=NO_TOKEN,
    )  # fmt: skip

    assert found.tolist() == [NO_TOKEN, NO_TOKEN, 7]


@pytest.mark.parametrize("counts", [None, [True, True, False, True, True, True]])
@torch.inference_mode()
def test_what_is_kept_is_fed_next(counts: list[bool] | None) -> None:
    chosen = torch.tensor([7, 3, 8, 12, 9, NO_TOKEN])  # 3 ends, 10 and above are padding
    tokens = torch.tensor([20, 21, 22, 23, 24, 25])
    positions = torch.tensor([0, 1, 2, 3, 5, 4])
    counted = None if counts is None else torch.tensor(counts)

    shown, kept = keep(chosen, counted, tokens, positions, end=3, num_emitted=10, unknown=1, last=5)

    third = counts is None
    assert shown.tolist() == [7, 3, 8, 1, 9, NO_TOKEN]
    assert kept.tolist() == [True, False, third, True, True, False]
    assert tokens.tolist() == [7, 21, 8 if third else 22, 1, 9, 25]
    assert positions.tolist() == [1, 1, 3 if third else 2, 4, 5, 4]

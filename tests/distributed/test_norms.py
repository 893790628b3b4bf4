"""Norms of gradients, and clipping by them, against sums in float64."""

from __future__ import annotations

import pytest
import torch

from plug.distributed import norms
from plug.distributed.norms import clip_shards, norm_of


def test_the_norm_of_many_values_is_exact_on_a_cpu() -> None:
    """Torch's own is 1.8e-4 too small here."""
    many = torch.randn(3, 2**21, generator=torch.Generator().manual_seed(0))
    found = norm_of([many.T, torch.zeros(0), torch.ones(5)])
    assert float(found) == pytest.approx(float(many.double().square().sum() + 5) ** 0.5, rel=1e-6)


def test_shards_are_clipped_by_the_norm_of_all_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes with equal shards; what both hold counts once."""
    monkeypatch.setattr(norms.dist, "all_reduce", lambda total: total.mul_(2))
    many = torch.randn(3, 2**21, generator=torch.Generator().manual_seed(0))
    shards = {1: [many.clone()], 2: [torch.ones(7), torch.ones(0)]}

    found = clip_shards(shards, 0.5, torch.device("cpu"))

    squares = 2 * float(many.double().square().sum()) + 7
    assert float(found) == pytest.approx(squares**0.5, rel=1e-6)
    torch.testing.assert_close(shards[1][0], many * 0.5 / squares**0.5)
    torch.testing.assert_close(shards[2][0], torch.full((7,), 0.5) / squares**0.5)

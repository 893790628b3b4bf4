"""Masked LM corrupts the shares that BERT's paper gives, and nothing else."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from plug.pretraining.masking import Masking, mask_tokens

ChiSquare = Callable[[list[int], list[float]], float]
MASK, FIRST_RANDOM, LAST_RANDOM = 4, 1000, 1100
MASKING = Masking(mask_token_id=MASK, first_random_id=FIRST_RANDOM, last_random_id=LAST_RANDOM)


def test_15_percent_are_chosen_of_which_80_10_10(chi_square: ChiSquare) -> None:
    rng = np.random.default_rng(1)
    length, rounds = 200, 300
    ids = np.arange(5, 5 + length)
    chosen = np.zeros(length, int)
    fates = [0, 0, 0]  # masked, kept, random
    random_ids = np.zeros(LAST_RANDOM - FIRST_RANDOM, int)
    for _ in range(rounds):
        corrupted, positions = mask_tokens(ids, np.ones(length, bool), rng, MASKING)
        assert len(positions) == 30  # 15% of 200
        assert (np.diff(positions) > 0).all()
        chosen[positions] += 1
        outside = np.setdiff1d(np.arange(length), positions)
        assert (corrupted[outside] == ids[outside]).all()
        now = corrupted[positions]
        is_random = (now >= FIRST_RANDOM) & (now < LAST_RANDOM)
        fates[0] += int((now == MASK).sum())
        fates[1] += int((now == ids[positions]).sum())
        fates[2] += int(is_random.sum())
        np.add.at(random_ids, now[is_random] - FIRST_RANDOM, 1)
    assert sum(fates) == 30 * rounds
    assert chi_square(fates, [0.8, 0.1, 0.1]) < 13.8  # 99.9% of 2 degrees of freedom
    assert chi_square(list(chosen), [1 / length] * length) < 270  # 99.9% of 199: 267.5
    assert (ids == np.arange(5, 5 + length)).all()  # the input is not written to
    assert chi_square(list(random_ids), [0.01] * 100) < 149  # 99.9% of 99: 148.2


@pytest.mark.parametrize(("allowed", "count"), [(0, 0), (1, 1), (3, 1), (10, 2), (100, 15)])
def test_how_many_are_masked_and_only_where_allowed(allowed: int, count: int) -> None:
    ids = np.arange(5, 205)
    mask = np.zeros(200, bool)
    mask[50 : 50 + allowed] = True
    corrupted, positions = mask_tokens(ids, mask, np.random.default_rng(0), MASKING)
    assert len(positions) == count
    assert mask[positions].all()
    assert (corrupted[~mask] == ids[~mask]).all()

"""The simulation of failures against the formulae of Young and Daly."""

from __future__ import annotations

import math

import numpy as np
import pytest

from plug.pretraining.failures import best_interval, mean_time, simulate


def daly(work: float, interval: float, checkpoint: float, every: float, restart: float) -> float:
    """Daly 2006, "A higher order estimate of the optimum checkpoint interval", equation 13.

    For failures that are independent and as frequent in any hour, also while restarting.
    """
    growth = math.expm1((interval + checkpoint) / every)
    return every * math.exp(restart / every) * growth * work / interval


@pytest.mark.parametrize(
    ("interval", "checkpoint", "every", "restart"),
    [(1.0, 0.1, 10.0, 0.3), (3.0, 0.1, 10.0, 0.3), (0.5, 0.2, 4.0, 1.0), (2.0, 0.05, 50.0, 2.0)],
)
def test_mean_times_are_dalys(
    interval: float, checkpoint: float, every: float, restart: float
) -> None:
    """Within 2%: 200 failures a run, 60 runs; the standard error is under 1%."""
    work = 200 * every
    actual = mean_time(
        work, interval, checkpoint=checkpoint, failure_every=every, restart=restart, runs=60
    )
    assert actual == pytest.approx(daly(work, interval, checkpoint, every, restart), rel=0.02)


@pytest.mark.parametrize(("checkpoint", "every"), [(0.01, 10.0), (0.1, 10.0), (0.003, 700.0)])
def test_the_interval_picked_is_as_good_as_youngs(checkpoint: float, every: float) -> None:
    """The optimum is flat: what counts is the time, by Daly's formula, not the interval."""
    interval, _ = best_interval(500.0, checkpoint=checkpoint, failure_every=every, restart=0.2)
    young = math.sqrt(2 * checkpoint * every)
    assert young / 2 < interval < 2 * young
    picked, best = (daly(500.0, each, checkpoint, every, 0.2) for each in (interval, young))
    assert picked < 1.01 * best


def test_without_failures_only_checkpoints_cost() -> None:
    rng = np.random.default_rng(0)
    settings = {"checkpoint": 0.5, "failure_every": 1e12, "restart": 1.0}
    # 10 of work by 3: saved after 3, 6 and 9; after the end nothing more
    assert simulate(10.0, 3.0, rng=rng, **settings) == 11.5
    assert simulate(9.0, 3.0, rng=rng, **settings) == 10.0
    assert simulate(2.0, 3.0, rng=rng, **settings) == 2.0


def test_a_run_that_fails_faster_than_it_is_saved_never_ends() -> None:
    never = simulate(
        1e4, 100.0, checkpoint=1.0, failure_every=1.0, restart=0.01, rng=np.random.default_rng(0)
    )
    assert never == math.inf


def test_a_run_that_fails_while_it_starts_never_ends() -> None:
    """An earlier build waited for e^256 starts."""
    _, time = best_interval(300.0, checkpoint=0.0003, failure_every=0.001, restart=0.25)
    assert time == math.inf

"""A long run on many cards that fail: how long it takes, and how often it should be saved.

Arithmetic and a simulation; imports no torch.
"""

from __future__ import annotations

import math

import numpy as np

FAILURES_SEEN, RUNS = 100, 20
LONGEST_RUN = 1000  # mean times between failures; of a longer run so much is simulated
MOST_FAILURES = 100_000  # in one simulated run: then it never ends


def simulate(
    work: float,
    interval: float,
    *,
    checkpoint: float,
    failure_every: float,
    restart: float,
    rng: np.random.Generator,
) -> float:
    """Return how long one run takes, in the unit of the arguments; infinite if it does not end.

    The run works, is saved every ``interval`` of work, and stands still for ``checkpoint`` then.
    At a failure what came after the last checkpoint is lost, and the run is back after ``restart``
    without a failure. Failures come at random, as many in any hour as in any other.

    Args:
        work: time without failures and checkpoints.
        interval: work between two checkpoints.
        checkpoint: time that a checkpoint stops the run for.
        failure_every: mean time between failures of the whole machine.
        restart: time from a failure to working again.
        rng: the source of chance.
    """
    elapsed = done = 0.0
    failures = 0
    while failures < MOST_FAILURES:
        up = rng.exponential(failure_every)
        left = work - done
        # The last stretch is followed by no checkpoint.
        stretches = max(0, math.ceil(left / interval) - 1)
        needed = left + stretches * checkpoint
        if up >= needed:
            return elapsed + needed
        done += min(stretches, int(up // (interval + checkpoint))) * interval
        elapsed += up + restart
        failures += 1
        while (up := rng.exponential(failure_every)) < restart:  # it failed while starting
            elapsed += up
            failures += 1
            if failures == MOST_FAILURES:
                break
    return math.inf


def mean_time(
    work: float,
    interval: float,
    *,
    checkpoint: float,
    failure_every: float,
    restart: float,
    runs: int = 200,
    seed: int = 0,
) -> float:
    """Return the mean of `simulate` over ``runs`` runs; the same chance for all intervals."""
    times: list[float] = []
    while len(times) < runs and math.inf not in times:
        rng = np.random.default_rng((seed, len(times)))
        times.append(
            simulate(
                work,
                interval,
                checkpoint=checkpoint,
                failure_every=failure_every,
                restart=restart,
                rng=rng,
            )
        )
    return float(np.mean(times))


def best_interval(
    work: float, *, checkpoint: float, failure_every: float, restart: float
) -> tuple[float, float]:
    """Return the interval with the shortest mean time, and that time; infinite if no run ends.

    Intervals from an eighth to eight times Young's, in steps of a fifth, are simulated, on a run
    that sees `FAILURES_SEEN` failures at least: its time is scaled to ``work``.

    Source of the centre: Young 1974, "A first order approximation to the optimum checkpoint
    interval": the square root of 2 x checkpoint x failure_every.
    """
    centre = math.sqrt(2 * checkpoint * failure_every)
    intervals = [min(work, centre * 2 ** (step / 4)) for step in range(-12, 13)]
    long = min(max(work, FAILURES_SEEN * failure_every), LONGEST_RUN * failure_every)

    def time(interval: float) -> float:
        return mean_time(
            long,
            interval,
            checkpoint=checkpoint,
            failure_every=failure_every,
            restart=restart,
            runs=RUNS,
        )

    shortest, interval = min((time(each), each) for each in dict.fromkeys(intervals))
    return interval, shortest * work / long

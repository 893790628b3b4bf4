"""Steps that are passed over: those whose gradient is far larger than usual, or not a number.

Whether a step is one depends on the norms of the steps before it alone. A checkpoint holds these,
so that a resumed run decides as an unbroken one.
"""

from __future__ import annotations

import math
import statistics

from plug.errors import PlugError

REMEMBERED = 100  # norms that the median is taken of
FEWEST = 20  # norms before which nothing is a spike
MOST_IN_A_ROW = 20  # then it is no spike any more, but a run that diverged


def is_spike(norm: float, norms: list[float], factor: float) -> bool:
    """Whether ``norm`` exceeds ``factor`` times the median of ``norms``, or is not finite.

    Args:
        norm: of the gradient, before it is clipped.
        norms: of the last steps that were applied; ``norm`` is added unless it is a spike.
        factor: of the setting `skip_spikes`.
    """
    if not math.isfinite(norm):
        return True
    if len(norms) >= FEWEST and norm > factor * statistics.median(norms):
        return True
    norms.append(norm)
    del norms[:-REMEMBERED]
    return False


def check_skipped(skipped: list[int], step: int) -> None:
    """Raise a `PlugError` if the last `MOST_IN_A_ROW` steps up to ``step`` were all skipped."""
    if skipped[-MOST_IN_A_ROW:] == list(range(step - MOST_IN_A_ROW + 1, step + 1)):
        raise PlugError(
            f"到第 {step + 1} 步为止，连续 {MOST_IN_A_ROW} 步的梯度都远大于平常或不是有限的数："
            "训练已经发散。请降低 learning_rate，或从更早的检查点接着训练。"
        )

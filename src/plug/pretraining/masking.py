"""Masked LM as a pure function of ids and a random generator. Both stages use it.

Source: BERT, arXiv 1810.04805, section 3.1; StructBERT and PALM keep its shares.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.int64]

IGNORE_INDEX = -100  # a label that no loss is computed on


@dataclass(frozen=True, kw_only=True, slots=True)
class Masking:
    """The rates of masked LM, and the ids that it writes."""

    mask_token_id: int
    first_random_id: int  # replacement ids are drawn from [first_random_id, last_random_id)
    last_random_id: int
    rate: float = 0.15  # of positions
    masked_share: float = 0.8  # of those: [MASK]
    kept_share: float = 0.1  # of those: left as they are; the rest become a random id


def mask_tokens(
    ids: Array, allowed: npt.NDArray[np.bool_], rng: np.random.Generator, masking: Masking
) -> tuple[Array, Array]:
    """Corrupt ``masking.rate`` of the allowed positions: 80% [MASK], 10% kept, 10% random.

    Args:
        ids: (length,) token ids.
        allowed: (length,) True where a position may be chosen (not on [CLS], [SEP], padding).
        rng: the source of chance.
        masking: rates and ids.

    Returns:
        The corrupted copy (length,), and the chosen positions, sorted: round(rate * allowed), but
        at least 1 where any is allowed. The loss is computed on those positions alone.
    """
    candidates = np.flatnonzero(allowed)
    count = min(len(candidates), max(1, round(masking.rate * len(candidates))))
    positions = np.sort(rng.permutation(candidates)[:count])
    fate = rng.random(count)
    random_ids = rng.integers(masking.first_random_id, masking.last_random_id, count)
    corrupted = ids.copy()
    is_masked = fate < masking.masked_share
    is_random = fate >= masking.masked_share + masking.kept_share
    corrupted[positions[is_masked]] = masking.mask_token_id
    corrupted[positions[is_random]] = random_ids[is_random]
    return corrupted, positions

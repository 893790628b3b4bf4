"""StructBERT's three objectives as pure functions of ids and a random generator (stage 1).

Source: StructBERT, arXiv 1908.04577, section 3: masked LM, word structure (shuffled trigrams),
sentence structure (3-way). Each function is NumPy on one sequence; `plug.pretraining.batches`
makes batches of them.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from plug.pretraining.masking import IGNORE_INDEX, Array, Masking, mask_tokens

ANOTHER_DOCUMENT, NEXT, PREVIOUS = 0, 1, 2  # labels as in the original's sentence head


class StructBertExample(NamedTuple):
    input_ids: Array  # (length,) [CLS] first [SEP] second [SEP], masked and shuffled
    token_type_ids: Array  # (length,) 0 on the first segment, 1 on the second
    mlm_positions: Array  # (masked,)
    mlm_labels: Array  # (masked,) the tokens that stood there
    word_positions: Array  # (3 * trigrams,), 0 where fewer trigrams were found
    word_labels: Array  # (3 * trigrams,) the tokens that stood there, IGNORE_INDEX on the rest
    sentence_label: Array  # () ANOTHER_DOCUMENT, NEXT or PREVIOUS; (0,) without that objective


def shuffle_trigrams(
    ids: Array, allowed: npt.NDArray[np.bool_], rng: np.random.Generator, rate: float = 0.05
) -> tuple[Array, Array]:
    """Shuffle the tokens within ``rate`` of the trigrams.

    Trigrams do not overlap, and lie on allowed positions. n positions have n - 2 trigrams, counting
    those that overlap, so 5% of them are up to 15% of the positions. One shuffle in 6 leaves the
    order as it was.

    Args:
        ids: (length,) token ids, masked LM applied already.
        allowed: (length,) True where a token may move (not masked, special or padding).
        rng: the source of chance.
        rate: share of the trigrams, against all positions that are not special or padding.

    Returns:
        The shuffled copy (length,), and the positions (3 * trigrams) in trigrams, sorted; the
        encoder predicts the original token at each.
    """
    free = allowed.copy()
    starts = np.flatnonzero(allowed[:-2] & allowed[1:-1] & allowed[2:])
    wanted = round(rate * max(len(ids) - 2, 0))
    shuffled = ids.copy()
    chosen: list[int] = []
    for start in rng.permutation(starts):
        if len(chosen) >= wanted:
            break
        if free[start] and free[start + 1] and free[start + 2]:
            free[start : start + 3] = False
            chosen.append(int(start))
    begin = np.sort(np.asarray(chosen, dtype=np.int64))
    positions = begin[:, None] + np.arange(3)  # (trigrams, 3)
    order = np.argsort(rng.random(positions.shape), axis=1)
    shuffled[positions] = ids[np.take_along_axis(positions, order, axis=1)]
    return shuffled, positions.ravel()


def pair_spans(
    boundaries: Array,
    start: int,
    end: int,
    lengths: tuple[int, int],
    label: int,
    rng: np.random.Generator,
) -> tuple[int, int]:
    """Return where two adjacent segments of one document begin.

    For both labels the segments meet at a sentence boundary, if the document has one that fits, and
    their outer ends may be anywhere. So the way a segment is cut does not give its label away.

    Args:
        boundaries: sorted positions in the document where a sentence begins.
        start: where the document begins.
        end: where it ends. Both segments must fit between start and end.
        lengths: tokens of the first and of the second segment.
        label: `NEXT` or `PREVIOUS`. For `ANOTHER_DOCUMENT` callers take the first segment of
            `NEXT` here, and the second of `NEXT` in another document.
        rng: the source of chance.

    Returns:
        Positions where the first and the second segment begin.
    """
    first, second = lengths
    if label == PREVIOUS:
        begin = _pick(boundaries, start, end - first - second, rng)
        reach = begin + first + second
        after = int(np.searchsorted(boundaries, reach))
        finish = int(boundaries[after]) if after < len(boundaries) else end
        return min(finish, end) - first, begin
    meeting = _pick(boundaries, start + first, end - second, rng)
    return meeting - first, meeting


def _pick(boundaries: Array, low: int, high: int, rng: np.random.Generator) -> int:
    """Draw a boundary in [low, high], or any position there if it holds no boundary."""
    left, right = np.searchsorted(boundaries, (low, high + 1))
    if left < right:
        return int(boundaries[rng.integers(left, right)])
    return int(rng.integers(low, high + 1))


def structbert_example(
    first: Array,
    second: Array,
    label: int | None,
    *,
    cls_token_id: int,
    sep_token_id: int,
    masking: Masking,
    shuffle_rate: float,
    rng: np.random.Generator,
) -> StructBertExample:
    """Return one stage-1 example from two segments.

    ``shuffle_rate`` 0 leaves out the word objective, ``label`` None the sentence objective.
    """
    ids = np.concatenate(([cls_token_id], first, [sep_token_id], second, [sep_token_id]))
    token_type_ids = np.zeros(len(ids), dtype=np.int64)
    token_type_ids[len(first) + 2 :] = 1
    allowed = np.ones(len(ids), dtype=bool)
    allowed[[0, len(first) + 1, -1]] = False
    masked, mlm_positions = mask_tokens(ids, allowed, rng, masking)
    allowed[mlm_positions] = False
    shuffled, moved = shuffle_trigrams(masked, allowed, rng, shuffle_rate)
    room = 3 * round(shuffle_rate * max(len(ids) - 2, 0))
    word_positions = np.zeros(room, dtype=np.int64)
    word_labels = np.full(room, IGNORE_INDEX, dtype=np.int64)
    word_positions[: len(moved)] = moved
    word_labels[: len(moved)] = ids[moved]
    return StructBertExample(
        shuffled,
        token_type_ids,
        mlm_positions,
        ids[mlm_positions],
        word_positions,
        word_labels,
        np.asarray([] if label is None else label, dtype=np.int64),
    )

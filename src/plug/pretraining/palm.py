"""PALM's objective as a pure function of ids and a random generator (stage 2).

The encoder reads the first part of a passage, corrupted for masked LM as in stage 1 or clean; the
decoder writes what follows. Source: PALM, arXiv 2004.07159, section 3; settings of the reference.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from plug.pretraining.masking import IGNORE_INDEX, Array, Masking, mask_tokens


class PalmExample(NamedTuple):
    input_ids: Array  # (source_length,) [CLS] source [SEP]
    mlm_positions: Array  # (masked,) positions in input_ids; empty where the source is clean
    mlm_labels: Array  # (masked,) the tokens that stood there
    decoder_input_ids: Array  # (target_length,) labels shifted right, from [CLS]
    labels: Array  # (target_length,) target and [SEP] if it ends there, then IGNORE_INDEX


def palm_example(
    source: Array,
    target: Array,
    *,
    target_length: int,
    ends: bool,
    cls_token_id: int,
    sep_token_id: int,
    pad_token_id: int,
    masking: Masking | None,
    rng: np.random.Generator,
) -> PalmExample:
    """Return one training example from a passage that has been cut in two.

    Args:
        source: (source,) ids before the cut.
        target: (at most target_length,) ids after it.
        target_length: the length that the target is padded to.
        ends: whether the document ends with the target. Then [SEP] follows it, if it fits.
        cls_token_id: first id of both sides.
        sep_token_id: last id of the source, and the end of a text.
        pad_token_id: decoder input on padding.
        masking: how the source is corrupted, or None for a clean source.
        rng: the source of chance.

    Returns:
        The example; nothing of the target is in ``input_ids``.
    """
    input_ids = np.concatenate(([cls_token_id], source, [sep_token_id]))
    mlm_positions = mlm_labels = np.empty(0, dtype=np.int64)
    if masking is not None:
        allowed = np.ones(len(input_ids), dtype=bool)
        allowed[[0, -1]] = False
        clean = input_ids
        input_ids, mlm_positions = mask_tokens(clean, allowed, rng, masking)
        mlm_labels = clean[mlm_positions]
    written = np.append(target, sep_token_id) if ends else target
    written = written[:target_length]
    labels = np.full(target_length, IGNORE_INDEX, dtype=np.int64)
    labels[: len(written)] = written
    decoder_input_ids = np.full(target_length, pad_token_id, dtype=np.int64)
    decoder_input_ids[0] = cls_token_id
    decoder_input_ids[1 : len(written)] = written[:-1]
    return PalmExample(input_ids, mlm_positions, mlm_labels, decoder_input_ids, labels)


def passage_start(
    boundaries: Array,
    start: int,
    end: int,
    lengths: tuple[int, int],
    whole_sentences: bool,
    rng: np.random.Generator,
) -> int:
    """Return where a passage begins in a document.

    All positions are equally likely but one: the beginning of the document is as likely as
    ``source`` other positions together, because users continue texts from their start more often
    than from a place inside. A document too short for both parts is read from its beginning.

    Args:
        boundaries: sorted positions where a sentence begins.
        start: where the document begins.
        end: where it ends. The source and at least one more token must fit.
        lengths: tokens before the cut, and the maximum after it.
        whole_sentences: move the passage so that the cut is at a sentence boundary, if one fits.
        rng: the source of chance.
    """
    source, target = lengths
    latest = max(start, end - source - target)
    begin = max(start, int(rng.integers(start - source, latest + 1)))
    if not whole_sentences:
        return begin
    after = int(np.searchsorted(boundaries, begin + source))
    if after < len(boundaries) and boundaries[after] < end:
        return int(boundaries[after]) - source
    return begin

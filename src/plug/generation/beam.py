"""Beam search as the reference's (ModelScope's generator), with caches.

What is particular about it: a beam that has ended stays among the beams and goes on, with its
[SEP] inside; a text is done when its BEST beam ends, or at the length limit, and then all its
beams count as hypotheses, ended or not. The best score of all hypotheses so far wins.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from plug.generation.model_runner import Engine

Allow = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """Token ids without [CLS]; the score is log-probability / length penalty."""

    token_ids: list[int]
    score: float


def beam_search(
    engine: Engine,
    sources: Sequence[Sequence[int]],
    *,
    num_beams: int = 5,
    max_length: int,
    min_length: int = 5,
    length_penalty: float = 0.6,
    allow: Allow | None = None,
) -> list[Hypothesis]:
    """The best hypothesis of each source.

    Args:
        engine: encodes and decodes; one window holds ``max_length`` tokens.
        sources: token ids of each text, [CLS] and [SEP] included.
        num_beams: beams of a text.
        max_length: tokens to write at most.
        min_length: steps in which [SEP] is out of the question.
        length_penalty: exponent alpha of ((5 + n) / 6) ^ alpha, n tokens long.
        allow: given logits (rows, vocab) and what each row has written (rows, n), the logits
            without what may not come next.

    Source: golden/plug-tiny/README.md, "Beam search, ModelScope"; the penalty is Wu et al. 2016,
    arXiv:1609.08144, equation 14.
    """
    end, device = engine.config.eos_token_id, engine.device
    live = list(range(len(sources)))  # the texts not yet done
    hypotheses: list[list[Hypothesis]] = [[] for _ in sources]
    written = torch.zeros(len(sources) * num_beams, 0, dtype=torch.long, device=device)
    # All beams of a text begin alike, so at first only one of them is alive.
    total = torch.full((len(sources), num_beams), float("-inf"), device=device)
    total[:, 0] = 0
    engine.start(sources, max_length, copies=num_beams)
    last = [engine.config.decoder_start_token_id] * len(written)
    for step in range(max_length):
        logits = engine.step(last, [step] * len(last))
        if allow is not None:
            logits = allow(logits, written)
        log_probabilities = logits.log_softmax(-1)
        if step < min_length:
            log_probabilities[:, end] = -1e20
        penalty = ((5 + step + 1) / 6) ** length_penalty
        vocab = logits.shape[-1]
        ranked = (total.view(-1, 1) + log_probabilities) / penalty
        scores, flat = ranked.view(len(live), num_beams * vocab).topk(num_beams)
        total = scores * penalty
        first_beam = torch.arange(len(live), device=device)[:, None] * num_beams
        origin = (flat // vocab + first_beam).view(-1)
        tokens = flat % vocab
        written = torch.cat([written[origin], tokens.view(-1, 1)], dim=1)

        ended = (tokens == end) | (step + 1 == max_length)
        done = ended[:, 0].tolist()
        for row, beam in (ended | ended[:, :1]).nonzero().tolist():
            found = written[row * num_beams + beam].tolist()
            hypotheses[live[row]].append(Hypothesis(found, scores[row, beam].item()))
        going = [row for row in range(len(live)) if not done[row]]
        if not going:
            break
        if len(going) < len(live):
            live = [live[row] for row in going]
            total = total[going]
            beams = torch.tensor(going, device=device)[:, None] * num_beams
            kept = (beams + torch.arange(num_beams, device=device)).view(-1)
            written = written[kept]
            engine.select(origin[kept].tolist())
        else:
            engine.reorder(origin.tolist())
        last = written[:, -1].tolist()
    return [max(found, key=lambda each: each.score) for found in hypotheses]

"""From logits to one token a row: pure functions, and the `Sampler` that applies them in order.

The order is that of `transformers`: what is written already (repetition penalty, n-grams), then
temperature, top-k, top-p, then one draw.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from plug.generation.settings import GenerationSettings


def penalize_repetition(logits: Tensor, written: Tensor, penalty: float) -> Tensor:
    """Logits (vocab,) of one row, with the ids ``written`` (n,) made less likely.

    Positive logits are divided by ``penalty``, others multiplied; 1 changes nothing.

    Source: Keskar et al. 2019, arXiv:1909.05858, section 4.1.
    """
    theirs = logits[written]
    penalized = torch.where(theirs > 0, theirs / penalty, theirs * penalty)
    return logits.index_put((written,), penalized)


def repeated_ngram_ids(token_ids: Tensor, size: int) -> Tensor:
    """Ids that, coming next, would end an n-gram of ``size`` tokens that is in ``token_ids`` (n,).

    Source: Paulus et al. 2017, arXiv:1705.04304, section 2.5.
    """
    if len(token_ids) < size:
        return token_ids[:0]
    ngrams = token_ids.unfold(0, size, 1)  # (n - size + 1, size)
    tail = token_ids[len(token_ids) - size + 1 :]
    return ngrams[(ngrams[:, :-1] == tail).all(1), -1]


def candidates(
    logits: Tensor, temperature: float, top_k: int, top_p: float
) -> tuple[Tensor, Tensor]:
    """The tokens that may be drawn, likeliest first, and their probabilities.

    Args:
        logits: (rows, vocab) float32.
        temperature: above 0.
        top_k: how many to keep; 0 keeps all.
        top_p: keep the likeliest until their probabilities, after top-k, reach this; 0 or 1: all.

    Returns:
        Probabilities (rows, k), summing to 1, 0 on what top-p dropped; ids (rows, k).

    Source: top-p is Holtzman et al. 2019, arXiv:1904.09751, section 3.1.
    """
    vocab = logits.shape[-1]
    values, ids = (logits / temperature).topk(min(top_k, vocab) if top_k else vocab)
    probabilities = values.softmax(-1)
    if 0 < top_p < 1:
        before = probabilities.cumsum(-1) - probabilities  # mass of what is likelier
        probabilities = probabilities.masked_fill(before >= top_p, 0)
        probabilities = probabilities / probabilities.sum(-1, keepdim=True)
    return probabilities, ids


def draw(probabilities: Tensor, ids: Tensor, uniforms: Tensor) -> Tensor:
    """Token of each row at quantile ``uniforms`` (rows,), in [0, 1), of `candidates`; (rows,)."""
    cumulative = probabilities.cumsum(-1)
    target = uniforms[:, None] * cumulative[:, -1:]
    index = (cumulative < target).sum(-1, keepdim=True)  # the first to reach the target
    last = (probabilities > 0).sum(-1, keepdim=True) - 1  # against rounding of the sums
    return ids.gather(-1, torch.minimum(index, last))[:, 0]


def penalize(logits: Tensor, written: Sequence[Tensor], settings: GenerationSettings) -> Tensor:
    """Repetition penalty and n-grams on ``logits`` (rows, vocab); ``written``: the ids of each."""
    penalized = []
    for row, ids in zip(logits, written, strict=True):
        row = penalize_repetition(row, ids, settings.penalty)
        if settings.no_repeat_ngram_size:
            banned = repeated_ngram_ids(ids, settings.no_repeat_ngram_size)
            row = row.index_fill(0, banned, float("-inf"))
        penalized.append(row)
    return torch.stack(penalized)


class Sampler:
    """Chooses the next token of each row. A row's choices depend on its own seed and logits alone.

    Args:
        settings: how.
        seeds: one a row.
        steps: choices a row will make at most.
        device: where the logits are.
    """

    def __init__(
        self,
        settings: GenerationSettings,
        seeds: Sequence[int],
        steps: int,
        device: torch.device,
    ) -> None:
        self.settings = settings
        if settings.has_penalties:
            self._written = torch.zeros(len(seeds), steps, dtype=torch.long, device=device)
            self._counts = [0] * len(seeds)
        if not settings.greedy:
            generators = [torch.Generator().manual_seed(seed) for seed in seeds]
            draws = [torch.rand(steps, generator=each) for each in generators]
            self._uniforms = torch.stack(draws, 1).to(device)  # (steps, rows)

    def choose(self, logits: Tensor, rows: Sequence[int], step: int) -> list[int]:
        """Next token of ``rows`` from their ``logits`` (len(rows), vocab), at choice ``step``."""
        settings = self.settings
        if settings.has_penalties:
            written = [self._written[row, : self._counts[row]] for row in rows]
            logits = penalize(logits, written, settings)
        if settings.greedy:
            return logits.argmax(-1).tolist()
        kept = candidates(logits, settings.temperature, settings.top_k, settings.top_p)
        return draw(*kept, self._uniforms[step, list(rows)]).tolist()

    def append(self, row: int, token_id: int) -> None:
        """Take note that ``row`` wrote ``token_id``."""
        if self.settings.has_penalties:
            self._written[row, self._counts[row]] = token_id
            self._counts[row] += 1

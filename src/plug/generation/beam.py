"""Beam search like the reference's (ModelScope's generator), over a `ModelRunner`.

It differs from the usual one: a beam that has ended stays among the beams and is extended further,
with its [SEP] inside. A text is done when its best beam ends, or at the length limit; then all its
beams count as hypotheses, ended or not. The best score of all hypotheses so far wins.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from plug.errors import UsageError
from plug.generation.model_runner import ModelRunner, Size
from plug.generation.sampling import penalize
from plug.generation.settings import BEAM_MIN_LENGTH, NO_TOKEN_MESSAGE, GenerationSettings
from plug.generation.window import FinishReason
from plug.model.configuration import PlugConfig

Allow = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """Token ids without [CLS]; the score is the log-probability divided by the length penalty."""

    token_ids: list[int]
    score: float


def beam_size(sources: Sequence[Sequence[int]], num_beams: int, max_length: int) -> Size:
    """Return what a runner must have room for."""
    return Size(len(sources) * num_beams, max(map(len, sources)), max_length)


@torch.inference_mode()
def beam_search(
    runner: ModelRunner,
    sources: Sequence[Sequence[int]],
    *,
    num_beams: int = 5,
    max_length: int,
    min_length: int = 5,
    length_penalty: float = 0.6,
    allow: Allow | None = None,
    adapter: int = 0,
) -> Iterator[list[Hypothesis]]:
    """Yield an empty list a step, and at last the best hypothesis of each source.

    Whoever reads it may stop between two steps, by dropping the iterator.

    Args:
        runner: with room for `beam_size`; nobody else uses it meanwhile.
        sources: token ids of each text, [CLS] and [SEP] included.
        num_beams: beams of a text.
        max_length: tokens to write at most.
        min_length: steps in which [SEP] cannot be chosen.
        length_penalty: exponent alpha of ((5 + n) / 6) ^ alpha, n tokens long.
        allow: given logits (rows, vocab) and what each row has written (rows, n), returns the
            logits with -inf for what may not come next.
        adapter: number of the adapter in use (`AdapterStack`).

    Raises:
        UsageError: ``allow`` forbids every token, or the logits are not numbers.

    Source: ModelScope's generator (docs/generation.md, "Beam search"); the penalty is Wu et al.
    2016, arXiv:1609.08144, equation 14.
    """
    config, device = runner.prepared.config, runner.prepared.device
    end = config.eos_token_id
    live = list(range(len(sources)))  # the texts not yet done
    hypotheses: list[list[Hypothesis]] = [[] for _ in sources]
    written = torch.zeros(len(sources) * num_beams, 0, dtype=torch.long, device=device)
    # All beams of a text begin alike, so at first only one of them is alive.
    total = torch.full((len(sources), num_beams), float("-inf"), device=device)
    total[:, 0] = 0
    runner.start(sources, copies=num_beams, adapter=adapter)
    last = [config.decoder_start_token_id] * len(written)
    for step in range(max_length):
        logits = runner.logits(last, [step] * len(last))
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
            runner.reorder(origin[kept].tolist(), step + 1, sources=True)
        else:
            runner.reorder(origin.tolist(), step + 1, sources=False)
        last = written[:, -1].tolist()
        yield []
    best = [max(found, key=lambda each: each.score) for found in hypotheses]
    if any(math.isnan(each.score) for each in best):
        raise UsageError(NO_TOKEN_MESSAGE)
    yield best


def write_by_beams(
    runner: ModelRunner,
    sources: Sequence[Sequence[int]],
    settings: GenerationSettings,
    banned: Sequence[int],
    adapter: int = 0,
) -> Iterator[list[tuple[list[int], FinishReason]]]:
    """Yield an empty list a step, and at last the ids and the end of each text.

    By `beam_search` with the options of ``settings``. What follows the first [SEP] of a hypothesis
    is dropped.

    Args:
        runner: as in `beam_search`.
        sources: as in `beam_search`.
        settings: with ``num_beams``.
        banned: ids never to write; in mode "original" every id is allowed.
        adapter: as in `beam_search`.
    """
    config = runner.prepared.config
    steps = beam_search(
        runner,
        sources,
        num_beams=settings.num_beams,
        max_length=settings.out_length,
        min_length=BEAM_MIN_LENGTH if settings.min_length is None else settings.min_length,
        length_penalty=settings.length_penalty,
        allow=_allow(settings, config, banned),
        adapter=adapter,
    )
    found: list[Hypothesis] = []
    for found in steps:
        if not found:
            yield []
    written: list[tuple[list[int], FinishReason]] = []
    for hypothesis in found:
        token_ids = [
            config.unk_token_id if token_id >= config.num_emitted_tokens else token_id
            for token_id in hypothesis.token_ids
        ]
        if config.eos_token_id in token_ids:
            written.append((token_ids[: token_ids.index(config.eos_token_id)], "stop"))
        else:
            written.append((token_ids, "length"))
    yield written


def _allow(settings: GenerationSettings, config: PlugConfig, banned: Sequence[int]) -> Allow:
    repetition, ngram = settings.penalty, settings.no_repeat_ngram_size

    def allow(logits: Tensor, written: Tensor) -> Tensor:
        if settings.mode != "original":
            logits = logits[:, : config.num_emitted_tokens]  # without padding rows
            logits[:, list(banned)] = float("-inf")
        if not settings.has_penalties or not written.shape[1]:
            return logits
        counts = written.new_full((len(written),), written.shape[1])
        penalties = torch.full_like(counts, repetition, dtype=logits.dtype)
        return penalize(logits, written, counts, penalties, torch.full_like(counts, ngram), ngram)

    return allow

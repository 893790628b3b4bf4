"""From logits to one token a row: pure functions of tensors, and `Sampler`, the rows' state.

Each row has its own settings and seed. All of it happens on the device, and nothing is read back.
The order is that of `transformers`: what is written already (repetition penalty, n-grams), then
temperature, top-k, top-p, then one draw.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from plug.device import has_kernels
from plug.generation.settings import GenerationSettings


def penalize(
    logits: Tensor,
    written: Tensor,
    counts: Tensor,
    repetition_penalty: Tensor,
    ngram_size: Tensor,
    longest_ngram: int,
) -> Tensor:
    """Logits with what is written already made less likely, or impossible.

    Positive logits of ids already written are divided by the penalty, others multiplied; 1 changes
    nothing. An id that, coming next, would end an n-gram written before gets -inf.

    Args:
        logits: (rows, vocab).
        written: (rows, n) ids, the first ``counts`` of a row its own.
        counts: (rows,).
        repetition_penalty: (rows,).
        ngram_size: (rows,); 0 forbids none.
        longest_ngram: the largest of them.

    Source: Keskar et al. 2019, arXiv:1909.05858, section 4.1; Paulus et al. 2017,
    arXiv:1705.04304, section 2.5.
    """
    vocab = logits.shape[-1]
    where = torch.arange(written.shape[1], device=logits.device)
    counts, size, penalty = counts[:, None], ngram_size[:, None], repetition_penalty[:, None]
    valid = where < counts
    penalized = torch.where(logits > 0, logits / penalty, logits * penalty)
    logits = torch.where(_marked(written, valid, vocab), penalized, logits)
    if not longest_ngram:
        return logits
    # At i stands an id to forbid if the size - 1 ids before it are the last size - 1 of the row.
    forbidden = valid & (size > 0) & (where >= size - 1) & (counts >= size)
    for back in range(1, min(longest_ngram, written.shape[1])):
        # Rows without penalties may have written more than there is room for.
        last = written.gather(1, (counts - back).clamp(0, written.shape[1] - 1))
        forbidden &= (written.roll(back, 1) == last) | (back >= size)
    return logits.masked_fill(_marked(written, forbidden, vocab), float("-inf"))


def _marked(ids: Tensor, which: Tensor, vocab: int) -> Tensor:
    """Bool (rows, vocab), True at the ``ids`` (rows, n) for which ``which`` is."""
    marks = torch.zeros(len(ids), vocab + 1, dtype=torch.bool, device=ids.device)
    return marks.scatter_(1, ids.masked_fill(~which, vocab), True)[:, :vocab]


def candidates(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, most: int
) -> tuple[Tensor, Tensor]:
    """The tokens that may be drawn, likeliest first, and their probabilities.

    Args:
        logits: (rows, vocab) float32.
        temperature: (rows,), above 0.
        top_k: (rows,), how many to keep.
        top_p: (rows,): keep the likeliest until their probabilities, after top-k, reach this;
            1 keeps all.
        most: not less than the largest of ``top_k``, not more than the vocabulary.

    Returns:
        Probabilities (rows, most), summing to 1, 0 on what was dropped; ids (rows, most).

    Source: top-p is Holtzman et al. 2019, arXiv:1904.09751, section 3.1.
    """
    values, ids = (logits / temperature[:, None]).topk(most)
    rank = torch.arange(most, device=logits.device)
    values = values.masked_fill(rank >= top_k[:, None], float("-inf"))
    probabilities = values.softmax(-1)
    before = probabilities.cumsum(-1) - probabilities  # mass of what is likelier
    dropped = (before >= top_p[:, None]) & (top_p < 1)[:, None]
    probabilities = probabilities.masked_fill(dropped, 0)
    return probabilities / probabilities.sum(-1, keepdim=True), ids


def draw(probabilities: Tensor, ids: Tensor, uniforms: Tensor) -> Tensor:
    """Token of each row at quantile ``uniforms`` (rows,), in [0, 1), of `candidates`; (rows,)."""
    cumulative = probabilities.cumsum(-1)
    target = uniforms[:, None] * cumulative[:, -1:]
    index = (cumulative < target).sum(-1, keepdim=True)  # the first to reach the target
    last = (probabilities > 0).sum(-1, keepdim=True) - 1  # against rounding of the sums
    return ids.gather(-1, torch.minimum(index, last))[:, 0]


class Plan(NamedTuple):
    """What the host knows of a step's choices: which parts are needed, and their shapes."""

    rows: int
    most: int  # candidates of a row that draws; 0: all rows are greedy
    greedy: bool  # some row is
    written: int  # ids to look back on; 0: no row has penalties
    longest_ngram: int
    waits: bool  # some row must not end yet
    room: int  # ids that can be kept for looking back


class Sampler:
    """Chooses the next token of each row. A row's choices depend on its own seed and logits alone.

    Args:
        rows: at most.
        vocab_size: of the logits.
        end: the id that ends a text.
        draws: choices that a row makes between two calls of `refill`, at most.
        device: where the logits are.
    """

    def __init__(
        self, rows: int, vocab_size: int, end: int, draws: int, device: torch.device
    ) -> None:
        self.vocab_size = vocab_size
        self.end = end
        self._draws = draws
        zeros = torch.zeros(rows, device=device)
        counts = zeros.long()
        self._state = {
            "temperature": zeros + 1,
            "top_k": counts.clone(),
            "top_p": zeros + 1,
            "greedy": zeros.bool(),
            "repetition_penalty": zeros + 1,
            "ngram_size": counts.clone(),
            "min_length": counts.clone(),
            "counts": counts.clone(),  # tokens written
            "draw": counts.clone(),  # the next of the uniforms
            "uniforms": torch.zeros(rows, draws, device=device),
            "forbidden": torch.zeros(rows, vocab_size, device=device),  # 0 or -inf
            "written": torch.zeros(rows, 0, dtype=torch.long, device=device),
        }
        self._settings: list[GenerationSettings | None] = [None] * rows
        self._generators: list[torch.Generator | None] = [None] * rows
        self._min_lengths = [0] * rows

    def join(
        self,
        row: int,
        settings: GenerationSettings,
        seed: int,
        *,
        forbidden: Sequence[int] = (),
        min_length: int = 0,
        steps: int,
    ) -> None:
        """``row`` begins anew.

        Args:
            row: which.
            settings: how to choose.
            seed: of the draws.
            forbidden: ids never to choose.
            min_length: tokens before the end may come.
            steps: choices at most.
        """
        values = {
            "temperature": 1.0 if settings.greedy else settings.temperature,
            "top_k": min(settings.top_k or self.vocab_size, self.vocab_size),
            "top_p": settings.top_p or 1.0,
            "greedy": settings.greedy,
            "repetition_penalty": settings.penalty,
            "ngram_size": settings.no_repeat_ngram_size,
            "min_length": min_length,
            "counts": 0,
            "draw": 0,
            "forbidden": 0,
        }
        for name, value in values.items():
            self._state[name][row] = value
        self._state["forbidden"][row, list(forbidden)] = float("-inf")
        if settings.has_penalties and self._width < steps:
            written = self._state["written"]
            self._state["written"] = F.pad(written, (0, steps - self._width))
        self._settings[row] = settings
        self._generators[row] = torch.Generator().manual_seed(seed)
        self._min_lengths[row] = min_length

    def refill(self, row: int, draws: int) -> None:
        """Random numbers for the next ``draws`` choices of ``row``, after those it had."""
        settings = self._settings[row]
        assert settings is not None, "call join first"
        self._state["draw"][row] = 0
        if not settings.greedy:
            uniforms = torch.rand(draws, generator=self._generators[row])
            self._state["uniforms"][row, :draws] = uniforms

    def move(self, source: int, target: int) -> None:
        """``target`` becomes what ``source`` is."""
        for state in self._state.values():
            state[target] = state[source]
        for kept in (self._settings, self._generators, self._min_lengths):
            kept[target] = kept[source]  # type: ignore[assignment]

    @property
    def _width(self) -> int:
        return self._state["written"].shape[1]

    def plan(self, written: Sequence[int], rows: int | None = None, drafted: int = 0) -> Plan:
        """The next choice of the first rows, which have written at most so many tokens each.

        Args:
            written: a number a row that somebody reads.
            rows: those, and some that nobody reads; None is those alone.
            drafted: choices that follow in the same step.
        """
        settings = [each for each in self._settings[: len(written)] if each is not None]
        drawing = [each.top_k or self.vocab_size for each in settings if not each.greedy]
        penalties = any(each.has_penalties for each in settings)
        most = max(1, *written) + drafted
        return Plan(
            rows=rows or len(written),
            most=min(max(drawing, default=0), self.vocab_size),
            greedy=len(drawing) < len(settings),
            written=min(-(-most // 64) * 64, self._width) if penalties else 0,
            longest_ngram=max(each.no_repeat_ngram_size for each in settings),
            waits=any(map(int.__lt__, written, self._min_lengths)),
            room=self._width,
        )

    def choose(self, logits: Tensor, plan: Plan, counts: Tensor | None = None) -> Tensor:
        """Next token (rows,) of the first rows from their logits (rows, vocab).

        Args:
            logits: of the rows.
            plan: of the step.
            counts: bool (rows,), the rows whose choice counts; the others' draws come again.
        """
        state = {name: each[: plan.rows] for name, each in self._state.items()}
        logits = logits + state["forbidden"]
        if plan.waits:
            early = state["counts"] < state["min_length"]
            logits[:, self.end].masked_fill_(early, float("-inf"))
        if plan.written:
            logits = penalize(
                logits,
                state["written"][:, : plan.written],
                state["counts"],
                state["repetition_penalty"],
                state["ngram_size"],
                plan.longest_ngram,
            )
        if not plan.most:
            return logits.argmax(-1)
        drawn = self._draw(logits, state, plan.most, counts)
        return torch.where(state["greedy"], logits.argmax(-1), drawn) if plan.greedy else drawn

    def _draw(
        self, logits: Tensor, state: dict[str, Tensor], most: int, counts: Tensor | None
    ) -> Tensor:
        limits = state["temperature"], state["top_k"], state["top_p"]
        uniforms, following = state["uniforms"], state["draw"]
        if has_kernels(logits.device):
            from plug.kernels.sampling import MOST_CANDIDATES, draw_of_likeliest

            if most <= MOST_CANDIDATES:
                return draw_of_likeliest(logits, *limits, most, uniforms, following, counts)
        chances, ids = candidates(logits, *limits, most)
        drawn = draw(chances, ids, uniforms.gather(1, following[:, None])[:, 0])
        # Rows that nobody reads go on and on; those whose choice counts no more have none left.
        following.add_(1 if counts is None else counts).clamp_(max=self._draws - 1)
        return drawn

    def record(self, token_ids: Tensor, kept: Tensor, plan: Plan) -> None:
        """Take note that the first rows wrote ``token_ids`` (rows,) where ``kept`` is."""
        counts = self._state["counts"][: plan.rows]
        if plan.written:
            written = self._state["written"][: plan.rows]
            where = counts.clamp(max=written.shape[1] - 1)
            written.scatter_(1, where[:, None], token_ids[:, None])
        counts += kept

"""From logits to one token a row: pure functions of tensors, and `Sampler`, the rows' state.

Each row has its own settings and seed. All of it happens on the device, and nothing is read back.
The order is that of `transformers`: the bias of single tokens, what is written already (repetition
penalty, n-grams, frequencies), then temperature, top-k, top-p, min-p, then one draw.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from plug.device import has_kernels, send
from plug.generation.settings import NO_TOKEN, GenerationSettings

# Of top-p. Below 1 / vocabulary it keeps one token; 0 in float32 would keep none.
_LEAST_TOP_P = 1e-9
_NEVER = float("-inf")
# Candidates of a row, more than which are found apart on a CPU: there the 12,288 of plug-mini-zh
# take 0.8 ms a row, 20 take 0.03.
_FEW = 128


def penalize(
    logits: Tensor,
    written: Tensor,
    counts: Tensor,
    repetition_penalty: Tensor,
    ngram_size: Tensor,
    longest_ngram: int,
) -> Tensor:
    """Return the logits with what is written already made less likely, or impossible.

    For callers without a `Sampler` (beams). The loop ends with the longest repetition there is.

    Args:
        logits: (rows, vocab).
        written: (rows, n) ids, the first ``counts`` of a row its own.
        counts: (rows,).
        repetition_penalty: (rows,), see `penalize_repetition`.
        ngram_size: (rows,), see `forbid_ngrams`.
        longest_ngram: the largest of them.
    """
    logits = penalize_repetition(logits, written, counts, repetition_penalty)
    if not longest_ngram:
        return logits
    where = torch.arange(written.shape[1], device=logits.device)
    matched = torch.zeros_like(written)
    equal = where < counts[:, None]
    for back in range(1, min(longest_ngram, written.shape[1])):
        last = written.gather(1, (counts[:, None] - back).clamp_min(0))
        equal = equal & (where >= back) & (written.roll(back, 1) == last)
        if not equal.any():
            break
        matched += equal
    return forbid_ngrams(logits, written, counts, ngram_size, matched)


def penalize_repetition(logits: Tensor, written: Tensor, counts: Tensor, penalty: Tensor) -> Tensor:
    """Return the logits with the written ids made less likely; ``penalty`` 1 changes nothing.

    Positive logits of those ids are divided by the penalty, others multiplied.

    Source: Keskar et al. 2019, arXiv:1909.05858, section 4.1.
    """
    valid = torch.arange(written.shape[1], device=logits.device) < counts[:, None]
    penalized = torch.where(logits > 0, logits / penalty[:, None], logits * penalty[:, None])
    return torch.where(_marked(written, valid, logits.shape[-1]), penalized, logits)


def forbid_ngrams(
    logits: Tensor, written: Tensor, counts: Tensor, ngram_size: Tensor, matched: Tensor
) -> Tensor:
    """Return the logits with -inf for each id that would end an n-gram written before.

    Args:
        logits: (rows, vocab).
        written: (rows, n) ids, the first ``counts`` of a row its own.
        counts: (rows,).
        ngram_size: (rows,); 0 forbids none.
        matched: (rows, n); at i, how many ids before i equal the last ones of the row, in order.
            `Sampler.record` keeps it up to date, so that a step takes time in proportion to what is
            written, whatever the size of the n-grams.

    Source: Paulus et al. 2017, arXiv:1705.04304, section 2.5.
    """
    size = ngram_size[:, None]
    valid = torch.arange(written.shape[1], device=logits.device) < counts[:, None]
    repeats = valid & (size > 0) & (matched >= size - 1)
    return logits.masked_fill(_marked(written, repeats, logits.shape[-1]), _NEVER)


def penalize_frequency(
    logits: Tensor, written: Tensor, counts: Tensor, presence: Tensor, frequency: Tensor
) -> Tensor:
    """Return the logits less ``presence`` for each id written, and ``frequency`` each time it was.

    Args:
        logits: (rows, vocab).
        written: (rows, n) ids, the first ``counts`` of a row its own.
        counts: (rows,).
        presence: (rows,); 0 changes nothing.
        frequency: (rows,); 0 changes nothing.

    Source: vLLM's `SamplingParams`, which follows OpenAI's API.
    """
    valid = torch.arange(written.shape[1], device=logits.device) < counts[:, None]
    times = logits.new_zeros(len(written), logits.shape[-1] + 1)
    times.scatter_add_(1, written.clamp_min(0), valid.to(times.dtype))
    times = times[:, :-1]
    return logits - frequency[:, None] * times - presence[:, None] * (times > 0)


def _marked(ids: Tensor, which: Tensor, vocab: int) -> Tensor:
    """Bool (rows, vocab), True at the ``ids`` (rows, n) for which ``which`` is."""
    marks = torch.zeros(len(ids), vocab + 1, dtype=torch.bool, device=ids.device)
    return marks.scatter_(1, ids.masked_fill(~which, vocab), True)[:, :vocab]


def candidates(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    most: int,
    min_p: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the tokens that may be drawn, likeliest first, and their probabilities.

    Args:
        logits: (rows, vocab) float32.
        temperature: (rows,), above 0.
        top_k: (rows,), how many to keep.
        top_p: (rows,), above 0: keep the likeliest until their probabilities, after top-k, reach
            this; 1 keeps all.
        most: not less than the largest of ``top_k``, not more than the vocabulary.
        min_p: (rows,): drop what is less likely than this times the likeliest; None and 0 keep all.

    Returns:
        Probabilities (rows, most), summing to 1, 0 on what was dropped; ids (rows, most).

    Source: top-p is Holtzman et al. 2019, arXiv:1904.09751, section 3.1; min-p is Nguyen et al.
    2024, arXiv:2407.01082, section 3.
    """
    values, ids = (logits / temperature[:, None]).topk(most)
    rank = torch.arange(most, device=logits.device)
    values = values.masked_fill(rank >= top_k[:, None], _NEVER)
    probabilities = values.softmax(-1)
    before = probabilities.cumsum(-1) - probabilities  # mass of what is likelier
    dropped = (before >= top_p[:, None]) & (top_p < 1)[:, None]
    if min_p is not None:
        dropped |= probabilities < min_p[:, None] * probabilities[:, :1]
    probabilities = probabilities.masked_fill(dropped, 0)
    return probabilities / probabilities.sum(-1, keepdim=True), ids


def _candidates(
    logits: Tensor, limits: tuple[Tensor, ...], most: int, has_min_p: bool
) -> tuple[Tensor, Tensor]:
    temperature, top_k, top_p, min_p = limits
    return candidates(logits, temperature, top_k, top_p, most, min_p if has_min_p else None)


def draw(probabilities: Tensor, ids: Tensor, uniforms: Tensor) -> Tensor:
    """Return each row's token (rows,) at quantile ``uniforms`` (rows,), in [0, 1), of `candidates`.

    A row whose probabilities are not numbers gets its first candidate.
    """
    cumulative = probabilities.cumsum(-1)
    target = uniforms[:, None] * cumulative[:, -1:]
    index = (cumulative < target).sum(-1, keepdim=True)  # the first to reach the target
    last = (probabilities > 0).sum(-1, keepdim=True) - 1  # against rounding of the sums
    return ids.gather(-1, torch.minimum(index, last).clamp_min_(0))[:, 0]


class LogProbabilities(NamedTuple):
    """Of one step: the chosen token first, then the likeliest ones.

    Attributes:
        values: (rows, 1 + count) float32, natural logarithms.
        ids: (rows, 1 + count) int64.
    """

    values: Tensor
    ids: Tensor


def log_probabilities(logits: Tensor, chosen: Tensor, count: int) -> LogProbabilities:
    """Return the log-probabilities of the chosen tokens and of the ``count`` likeliest ones.

    They are the model's own: settings change neither the values nor the order (vLLM's default,
    `logprobs_mode="raw_logprobs"`).

    Args:
        logits: (rows, vocab), as the model gave them.
        chosen: (rows,) ids; for `NO_TOKEN` the values mean nothing.
        count: 0 … 20.
    """
    every = logits.float().log_softmax(-1)
    own = chosen.clamp_min(0)[:, None]
    values, ids = every.topk(count)
    return LogProbabilities(torch.cat([every.gather(1, own), values], 1), torch.cat([own, ids], 1))


class Plan(NamedTuple):
    """What the host knows of a step's choices: which parts are needed, and their shapes."""

    rows: int
    most: int  # candidates of a row that draws; 0: all rows are greedy
    wide: tuple[int, ...]  # on a CPU, rows whose many candidates take long to find
    few: int  # candidates of the other rows
    greedy: bool  # some row is
    min_p: bool  # some row has it
    written: int  # ids to look back on; 0: no row has penalties
    repetition: bool  # some row has this penalty
    ngrams: bool
    frequencies: bool
    waits: bool  # some row must not end yet
    room: int  # ids that can be kept for looking back
    logprobs: int | None  # the most alternatives that a row asks for; None: no row does


class _Needs(NamedTuple):
    """Of one row: the part of `Plan` that its settings decide."""

    most: int
    greedy: bool
    min_p: bool
    repetition: bool
    ngrams: bool
    frequencies: bool
    min_length: int
    logprobs: int | None


_NOTHING = _Needs(0, True, False, False, False, False, 0, None)


class Joining(NamedTuple):
    """A text that joins."""

    row: int  # which it gets
    settings: GenerationSettings  # how to choose; ids are within the vocabulary (`check_token_ids`)
    seed: int  # of the draws
    steps: int  # choices at most
    forbidden: Sequence[int] = ()  # ids never to choose; a few
    num_ids: int | None = None  # those from this one on are never chosen either; None: all may be
    min_length: int = 0  # tokens before the end may come


def copy_rows(state: Tensor, sources: Tensor, targets: Tensor) -> None:
    """Copy rows of ``state`` to others in place; indices (n,) on its device."""
    state.index_copy_(0, targets, state.index_select(0, sources))


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
        self._on_cpu = device.type == "cpu"
        zeros = torch.zeros(rows, device=device)
        counts = zeros.long()
        self._state = {
            "temperature": zeros + 1,
            "top_k": counts.clone(),
            "top_p": zeros + 1,
            "min_p": zeros.clone(),
            "greedy": zeros.bool(),
            "repetition_penalty": zeros + 1,
            "ngram_size": counts.clone(),
            "presence": zeros.clone(),
            "frequency": zeros.clone(),
            "min_length": counts.clone(),
            "counts": counts.clone(),  # tokens written
            "draw": counts.clone(),  # the next of the uniforms
            "uniforms": torch.zeros(rows, draws, device=device),
            "bias": torch.zeros(rows, vocab_size, device=device),  # -inf where forbidden
            "written": torch.zeros(rows, 0, dtype=torch.long, device=device),
            "matched": torch.zeros(rows, 0, dtype=torch.int32, device=device),  # `forbid_ngrams`
        }
        self._needs = [_NOTHING] * rows
        self._generators: list[torch.Generator | None] = [None] * rows

    def join(self, joined: Sequence[Joining]) -> None:
        """Begin rows anew.

        All of them at once, and by copies that a GPU does not wait for: texts that join stop those
        that run.
        """
        values: dict[str, list[float]] = defaultdict(list)
        forbidden: list[tuple[int, int]] = []
        ends: dict[int, list[int]] = defaultdict(list)  # num_ids -> rows
        biased: list[tuple[int, int, float]] = []
        width = self._width
        for row, settings, seed, steps, never, num_ids, least in joined:
            min_length = steps if settings.ignore_eos else least
            top_k = min(settings.top_k or self.vocab_size, self.vocab_size)
            most = 1 if settings.greedy else top_k
            values["temperature"].append(1.0 if settings.greedy else settings.temperature)
            values["top_k"].append(most)
            values["top_p"].append(max(settings.top_p, _LEAST_TOP_P) if settings.top_p else 1.0)
            values["min_p"].append(settings.min_p)
            values["greedy"].append(settings.greedy)
            values["repetition_penalty"].append(settings.penalty)
            values["ngram_size"].append(settings.no_repeat_ngram_size)
            values["presence"].append(settings.presence_penalty)
            values["frequency"].append(settings.frequency_penalty)
            values["min_length"].append(min_length)
            forbidden += [(row, token_id) for token_id in never]
            ends[self.vocab_size if num_ids is None else num_ids].append(row)
            biased += [(row, token_id, added) for token_id, added in settings.logit_bias.items()]
            width = max(width, steps if settings.has_penalties else 0)
            self._generators[row] = torch.Generator().manual_seed(seed)
            self._needs[row] = _Needs(
                most=0 if settings.greedy else most,
                greedy=settings.greedy,
                min_p=settings.min_p > 0,
                repetition=settings.penalty != 1,
                ngrams=settings.no_repeat_ngram_size > 0,
                frequencies=settings.counts_tokens,
                min_length=min_length,
                logprobs=settings.logprobs,
            )
        if (missing := width - self._width) > 0:
            for name in ("written", "matched"):
                self._state[name] = F.pad(self._state[name], (0, missing))
        rows = self._send([each.row for each in joined])
        for name, column in values.items():
            self._state[name].index_copy_(0, rows, self._send(column, self._state[name].dtype))
        for name in ("counts", "draw", "bias", "matched"):
            self._state[name].index_fill_(0, rows, 0)
        bias = self._state["bias"]
        if biased:
            *where, added = zip(*biased, strict=True)
            bias.index_put_(tuple(map(self._send, where)), self._send(added, bias.dtype))
        for num_ids, without in ends.items():  # the 27B's word table has 30,000 padding rows
            bias[:, num_ids:].index_fill_(0, self._send(without), _NEVER)
        if forbidden:
            places = tuple(map(self._send, zip(*forbidden, strict=True)))
            bias.index_put_(places, self._send([_NEVER], bias.dtype))

    def _send(self, values: Sequence[Any] | Tensor, dtype: torch.dtype = torch.long) -> Tensor:
        return send(values, self._state["bias"].device, dtype)

    def refill(self, draws: Mapping[int, int]) -> None:
        """Make random numbers for the next choices of rows, after those they had.

        Args:
            draws: for each of the rows, how many.
        """
        self._state["draw"].index_fill_(0, self._send(list(draws)), 0)
        drawing = [row for row in draws if not self._needs[row].greedy]
        if not drawing:
            return
        most = max(draws[row] for row in drawing)
        uniforms = torch.zeros(len(drawing), most)
        for index, row in enumerate(drawing):  # nobody reads what follows a row's own numbers
            torch.rand(
                draws[row], generator=self._generators[row], out=uniforms[index, : draws[row]]
            )
        kept = self._state["uniforms"]
        kept[:, :most].index_copy_(0, self._send(drawing), self._send(uniforms, kept.dtype))

    def move(self, moves: Sequence[tuple[int, int]]) -> None:
        """Make the second row of each pair what the first is; no row is in two pairs."""
        sources, targets = map(list, zip(*moves, strict=True))
        where = self._send(sources), self._send(targets)
        for state in self._state.values():
            copy_rows(state, *where)
        for source, target in moves:
            self._needs[target] = self._needs[source]
            self._generators[target] = self._generators[source]

    @property
    def _width(self) -> int:
        return self._state["written"].shape[1]

    def plan(self, written: Sequence[int], rows: int | None = None, drafted: int = 0) -> Plan:
        """Return the plan of the next choice of the first rows.

        Args:
            written: for each row that somebody reads, the tokens that it has written at most.
            rows: those, and some that nobody reads; None is those alone.
            drafted: choices that follow in the same step.
        """
        needs = self._needs[: len(written)]
        most, greedy, min_p, repetition, ngrams, frequencies, min_lengths, logprobs = zip(
            *needs, strict=True
        )
        asked = [count for count in logprobs if count is not None]
        wide = tuple(row for row, count in enumerate(most) if count > _FEW and self._on_cpu)
        looks_back = any(repetition) or any(ngrams) or any(frequencies)
        longest = max(written) + 1 + drafted  # and the id that is recorded next
        return Plan(
            rows=rows or len(written),
            most=max(most),
            wide=wide,
            few=max((count for count in most if count <= _FEW), default=0),
            greedy=any(greedy),
            min_p=any(min_p),
            written=min(-(-longest // 64) * 64, self._width) if looks_back else 0,
            repetition=any(repetition),
            ngrams=any(ngrams),
            frequencies=any(frequencies),
            waits=any(map(int.__lt__, written, min_lengths)),
            room=self._width,
            logprobs=max(asked) if asked else None,
        )

    def choose(self, logits: Tensor, plan: Plan, counts: Tensor | None = None) -> Tensor:
        """Return the next token (rows,) of the first rows from their logits (rows, vocab).

        It is `NO_TOKEN` where every token is forbidden or the logits are not numbers.

        Args:
            logits: of the rows; they are not changed.
            plan: of the step.
            counts: bool (rows,), the rows whose choice counts; the others' draws come again.
        """
        state = {name: each[: plan.rows] for name, each in self._state.items()}
        limits = state["temperature"], state["top_k"], state["top_p"]
        uniforms, following = state["uniforms"], state["draw"]
        if has_kernels(logits.device):
            from plug.kernels.sampling import MOST_CANDIDATES, draw_of_likeliest

            has_few = plan.most <= MOST_CANDIDATES  # a greedy row is one with a single candidate
            if has_few and not plan.written:  # the kernel itself adds the bias
                waits = (state["counts"], state["min_length"], self.end) if plan.waits else None
                return draw_of_likeliest(
                    logits, *limits, max(1, plan.most), uniforms, following, counts,
                    min_p=state["min_p"], no_token=NO_TOKEN, bias=state["bias"], early=waits,
                )  # fmt: skip
        else:
            has_few = False
        logits = logits + state["bias"]
        if plan.waits:
            early = state["counts"] < state["min_length"]
            logits[:, self.end].masked_fill_(early, _NEVER)
        if plan.written:
            past = state["written"][:, : plan.written], state["counts"]
            if plan.repetition:
                logits = penalize_repetition(logits, *past, state["repetition_penalty"])
            if plan.ngrams:
                matched = state["matched"][:, : plan.written]
                logits = forbid_ngrams(logits, *past, state["ngram_size"], matched)
            if plan.frequencies:
                logits = penalize_frequency(logits, *past, state["presence"], state["frequency"])
        if has_few:
            return draw_of_likeliest(
                logits, *limits, max(1, plan.most), uniforms, following, counts,
                min_p=state["min_p"], no_token=NO_TOKEN,
            )  # fmt: skip
        if not plan.most:
            chosen = logits.argmax(-1)
        else:
            own = uniforms.gather(1, following[:, None])[:, 0]
            chosen = self._draw(logits, (*limits, state["min_p"]), own, plan)
            # Rows that nobody reads go on and on; those whose choice counts no more have none left.
            following.add_(1 if counts is None else counts).clamp_(max=self._draws - 1)
            if plan.greedy:
                chosen = torch.where(state["greedy"], logits.argmax(-1), chosen)
        is_possible = logits.gather(1, chosen[:, None])[:, 0] > _NEVER  # False for NaN too
        return chosen.masked_fill_(~is_possible, NO_TOKEN)

    def _draw(
        self, logits: Tensor, limits: tuple[Tensor, ...], uniforms: Tensor, plan: Plan
    ) -> Tensor:
        """Draw by PyTorch's functions; a row that draws among many costs the others nothing."""
        if len(plan.wide) in (0, plan.rows):
            return draw(*_candidates(logits, limits, plan.most, plan.min_p), uniforms)
        chosen = torch.zeros(plan.rows, dtype=torch.long)
        few = [row for row in range(plan.rows) if row not in plan.wide]
        for rows, most in ((few, max(1, plan.few)), (list(plan.wide), plan.most)):
            own = tuple(limit[rows] for limit in limits)
            chosen[rows] = draw(*_candidates(logits[rows], own, most, plan.min_p), uniforms[rows])
        return chosen

    def record(self, token_ids: Tensor, kept: Tensor, plan: Plan) -> None:
        """Take note that the first rows wrote ``token_ids`` (rows,) where ``kept`` is."""
        counts = self._state["counts"][: plan.rows]
        if plan.written:
            written = self._state["written"][: plan.rows, : plan.written]
            where = counts.clamp(max=plan.written - 1)
            written.scatter_(1, where[:, None], token_ids[:, None])
            if plan.ngrams:
                # What ended like the row before now also ends with its new token, one id later.
                matched = self._state["matched"][: plan.rows, : plan.written]
                longer = (matched + 1).masked_fill_(written != token_ids[:, None], 0)
                longer = F.pad(longer[:, :-1], (1, 0))
                matched.copy_(torch.where(kept[:, None], longer, matched))
        counts += kept

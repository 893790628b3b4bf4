"""`Writer`: texts written together, each in a row of its own; they join and leave between steps.

`write` has all of them join at once; `async_engine.py` lets them come and go.
"""

from __future__ import annotations

import operator
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from plug.device import has_kernels
from plug.errors import UsageError
from plug.generation.model_runner import Engine
from plug.generation.prompt_lookup import PromptLookup, power_of_two
from plug.generation.sampling import NO_TOKEN, Plan, Sampler
from plug.generation.settings import MAX_LOOKUP_TOKENS, GenerationSettings
from plug.generation.window import FinishReason, Rules, prompt_limit


@dataclass(slots=True, eq=False)
class Row:
    """One text being written, in token ids.

    Args:
        prompt: without [CLS] and [SEP].
        rules: `PlugRules` or `OriginalRules`.
        settings: how tokens are chosen; ``rules`` have the lengths.
        seed: of the draws.
        on_token: called with each token it keeps.
    """

    prompt: Sequence[int]
    rules: Rules
    settings: GenerationSettings
    seed: int
    on_token: Callable[[int], None] | None = None
    source: list[int] = field(default_factory=list)  # what the encoder reads now
    written: list[int] = field(default_factory=list)
    in_window: list[int] = field(default_factory=list)  # the part of it since the last encoding
    finish_reason: FinishReason | None = None  # None while it is being written
    steps: int = 0  # begun so far
    steps_in_window: int = 0
    is_due: bool = True  # the encoder has to read before the next step
    lookup: PromptLookup | None = None  # where its drafts come from

    def __post_init__(self) -> None:
        if self.settings.prompt_lookup_num_tokens is not None:
            self.lookup = PromptLookup(self.prompt, self.settings.prompt_lookup_num_tokens)

    @property
    def longest_window(self) -> int:
        return min(self.rules.window, self.rules.steps)

    @property
    def window_is_full(self) -> bool:
        return self.steps_in_window == self.rules.window

    @property
    def has_no_steps_left(self) -> bool:
        return self.steps == self.rules.steps

    def draft(self) -> list[int]:
        """What may follow the token of the step just begun; no more than there are steps left."""
        if self.lookup is None:
            return []
        left = min(self.rules.steps - self.steps, self.rules.window - self.steps_in_window)
        return self.lookup.draft(left)

    def take(self, token_id: int) -> None:
        """The outcome of the step that comes next in turn."""
        if token_id == NO_TOKEN:  # to be this row's error alone
            raise UsageError("这些设置禁止了所有的词元，或模型的输出不是数，写不下去。请放宽设置。")
        kept = self.rules.accept(token_id, self)
        if kept == "stop":
            self.finish_reason = "stop"
        elif isinstance(kept, int):
            self.written.append(kept)
            self.in_window.append(kept)
            if self.lookup is not None:
                self.lookup.append(kept)
            if self.on_token is not None:
                self.on_token(kept)


class Writer:
    """Steps all its rows by one token at a time. What a row writes does not depend on the others.

    On CUDA the host runs a step ahead of what it has read, so that it never waits for a token; a
    text that ends has one step too many, whose outcome is dropped. (Drafts need the text so far:
    where rows ask for them, it waits.)

    Args:
        engine: encodes and decodes; used by this writer alone.
        rows: texts at most.
        capacity: steps from one encoding at most.
        source_length: tokens of a source at most; None is what the model can read.
    """

    def __init__(
        self, engine: Engine, rows: int, capacity: int, source_length: int | None = None
    ) -> None:
        config, device = engine.config, engine.device
        self.rows: list[Row] = []  # the i-th is the engine's row i
        source_length = source_length or prompt_limit(config) + 2
        self.room = rows, capacity, source_length
        self._engine = engine
        self._config = config
        self._opening = engine.open(rows, source_length, capacity)
        self._sampler = Sampler(rows, config.vocab_size, config.eos_token_id, capacity, device)
        self._tokens = torch.zeros(rows, dtype=torch.long, device=device)
        self._positions = torch.zeros_like(self._tokens)
        # Of each row how many tokens its draft has, and these.
        self._drafts = self._tokens.new_zeros(rows, 1 + MAX_LOOKUP_TOKENS)
        self._begun: deque[tuple[list[Row], _Fetched]] = deque()
        self._ahead = 1 if device.type == "cuda" else 0

    def has_room(self, room: tuple[int, int, int]) -> bool:
        """Whether it is idle, the engine is still its own, and rows of this ``room`` can join."""
        is_idle = not self.rows and not self._begun and self._engine.openings == self._opening
        return is_idle and all(map(operator.le, room, self.room))

    @property
    def is_full(self) -> bool:
        return len(self.rows) == self.room[0]

    def join(self, row: Row) -> None:
        """Begin ``row`` with the next step."""
        assert not self.is_full, "no room"
        assert row.longest_window <= self.room[1], "its window is longer than the caches"
        self._sampler.join(
            len(self.rows),
            row.settings,
            row.seed,
            forbidden=row.rules.forbidden,
            min_length=row.rules.min_length,
            steps=row.rules.steps,
        )
        row.source = row.rules.first_source(row.prompt)
        self.rows.append(row)

    def leave(self, gone: Sequence[Row]) -> None:
        """Drop rows, finished or not; the last ones move into their places."""
        for row in gone:
            index, last = self.rows.index(row), self.rows.pop()
            if last is not row:
                self.rows[index] = last
                self._sampler.move(len(self.rows), index)
                for state in (self._tokens, self._positions):
                    state[index] = state[len(self.rows)]
                if not (last.is_due or last.window_is_full):  # else its caches are filled anew
                    self._engine.move(len(self.rows), index, last.steps_in_window)

    def step(self) -> list[Row]:
        """One more token for every row, and what was right of its draft; the rows now finished.

        Those leave.
        """
        self._read()
        for row in self.rows:
            row.steps += 1
            row.steps_in_window += 1
        drafted, length = self._draft()
        # More rows than there are may be decoded, for the sake of few graphs: nobody reads those.
        count = min(self._engine.rounded(len(self.rows)), self.room[0])
        plan = self._sampler.plan([row.steps - 1 for row in self.rows], count, drafted)
        chosen = self._engine.replay(
            (plan, drafted), lambda: self._decode(plan, length, drafted), length, count
        )
        self._begun.append((list(self.rows), _Fetched(chosen[: len(self.rows)])))
        # What comes next may need all that was written: the source of a window, a draft, or
        # nothing more.
        must_wait = any(
            row.window_is_full or row.has_no_steps_left or row.lookup is not None
            for row in self.rows
        )
        while len(self._begun) > (0 if must_wait else self._ahead):
            self._take(*self._begun.popleft())
        for row in self.rows:
            if row.finish_reason is None and row.has_no_steps_left:
                row.finish_reason = "length"
        finished = [row for row in self.rows if row.finish_reason is not None]
        self.leave(finished)
        return finished

    def _read(self) -> None:
        for row in self.rows:
            if row.window_is_full:
                row.source = row.rules.next_source(row)
                row.in_window = []
                row.is_due = True
        due = [index for index, row in enumerate(self.rows) if row.is_due]
        if not due:
            return
        for index in due:
            row = self.rows[index]
            row.is_due, row.steps_in_window = False, 0
            self._tokens[index] = self._config.decoder_start_token_id
            self._positions[index] = 0
            self._sampler.refill(index, row.longest_window)
        # Last: what comes from the host waits for a GPU, which should not wait for it in turn.
        self._engine.read(due, [self.rows[index].source for index in due])

    def _draft(self) -> tuple[int, int]:
        """Fill the drafts of all rows; the tokens of the longest, rounded up, and `length`."""
        drafts = [row.draft() for row in self.rows]
        length = max(
            row.steps_in_window + len(draft) for row, draft in zip(self.rows, drafts, strict=True)
        )
        longest = max(map(len, drafts))
        if not longest:
            return 0, length
        filled = torch.zeros(self._drafts.shape, dtype=torch.long)
        for index, draft in enumerate(drafts):
            filled[index, : 1 + len(draft)] = torch.tensor([len(draft), *draft])
        self._drafts.copy_(filled)
        most = max(row.lookup.most for row in self.rows if row.lookup is not None)
        return min(power_of_two(longest), most), length

    def _decode(self, plan: Plan, length: int, drafted: int) -> Tensor:
        """The step itself, on the device alone.

        Returns:
            The chosen ids, (rows,), or with drafts (rows, 1 + drafted), perhaps fewer on a CPU:
            after the first choice that was not the draft's, -1.
        """
        tokens, positions = self._tokens[: plan.rows], self._positions[: plan.rows]
        if not drafted:
            chosen = self._sampler.choose(self._engine.decode(tokens, positions, length), plan)
            self._keep(chosen, None, plan)
            return chosen
        counts, drafts = self._drafts[: plan.rows].split([1, MAX_LOOKUP_TOKENS], 1)
        # A row with a shorter draft feeds its last token again.
        ahead = torch.arange(1 + drafted, device=tokens.device).clamp(max=counts)
        fed = torch.cat([tokens[:, None], drafts], 1).gather(1, ahead)
        logits = self._engine.decode_several(fed, positions[:, None] + ahead, length)
        # One choice after another, as in as many steps, while the last one was the draft's.
        counted = torch.ones_like(tokens, dtype=torch.bool)
        found = []
        for index in range(1 + drafted):
            chosen = self._sampler.choose(logits[:, index], plan, counted)
            found.append(torch.where(counted, chosen, -1))
            shown, kept = self._keep(chosen, counted, plan)
            if index < drafted:
                is_right = (shown == drafts[:, index]) & (index < counts[:, 0])
                counted = kept & is_right
                if counted.device.type == "cpu" and not counted.any():  # a GPU is not waited for
                    break
        return torch.stack(found, 1)

    def _keep(self, chosen: Tensor, counted: Tensor | None, plan: Plan) -> tuple[Tensor, Tensor]:
        """What `Rules.accept` makes of ``chosen`` (rows,), for the next step.

        An id of a padding row is [UNK], and [SEP], where it ends nothing, is not written and the
        step comes again.

        Args:
            chosen: (rows,).
            counted: bool (rows,), whose choice counts; None is everyone's.
            plan: of the step.

        Returns:
            The ids shown, and bool (rows,): which are kept.
        """
        end, emitted = self._config.eos_token_id, self._config.num_emitted_tokens
        unknown, last = self._config.unk_token_id, self.room[1] - 1
        tokens, positions = self._tokens[: plan.rows], self._positions[: plan.rows]
        if has_kernels(chosen.device):
            from plug.kernels import sampling as kernels

            shown, kept = kernels.keep(
                chosen, counted, tokens, positions,
                end=end, num_emitted=emitted, unknown=unknown, last=last,
            )  # fmt: skip
        else:
            kept = (chosen != end) & (chosen >= 0)
            kept = kept if counted is None else counted & kept
            shown = chosen.masked_fill(chosen >= emitted, unknown)
            tokens.copy_(torch.where(kept, shown, tokens))
            positions.add_(kept).clamp_(max=last)  # rows that nobody reads go on and on
        self._sampler.record(shown, kept, plan)
        return shown, kept

    @staticmethod
    def _take(rows: list[Row], fetched: _Fetched) -> None:
        for row, chosen in zip(rows, fetched.read(), strict=True):
            outcomes = [token_id for token_id in chosen if token_id != -1]
            right = len(outcomes) - 1  # each is a step that needed none of its own
            row.steps += right
            row.steps_in_window += right
            for token_id in outcomes:
                if row.finish_reason is None:
                    row.take(token_id)
            if row.lookup is not None:
                row.lookup.judge(right)


class _Fetched:
    """Ids on their way to the host."""

    def __init__(self, ids: Tensor) -> None:
        self._on_cuda = ids.device.type == "cuda"
        if self._on_cuda:
            self._ids = torch.empty_like(ids, device="cpu", pin_memory=True)
            self._ids.copy_(ids, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()
        else:
            self._ids = ids

    def read(self) -> list[list[int]]:
        if self._on_cuda:
            self._arrived.synchronize()
        return self._ids.view(len(self._ids), -1).tolist()


def write(engine: Engine, rows: Sequence[Row], last: Writer | None = None) -> Writer | None:
    """Write all ``rows``, together.

    Args:
        engine: used by nobody else meanwhile.
        rows: new ones.
        last: what an earlier call returned: its buffers serve again where they have room, and on
            CUDA the graphs that were made for them.

    Returns:
        For the next call.
    """
    if not rows:
        return last
    limit = prompt_limit(engine.config) + 2
    room = (
        len(rows),
        max(row.longest_window for row in rows),
        min(limit, max(len(row.prompt) + 2 + row.rules.steps for row in rows)),
    )
    writer = last
    if writer is None or not writer.has_room(room):
        if writer is not None:
            room = (
                max(room[0], writer.room[0]),
                max(room[1], writer.room[1]),
                max(room[2], writer.room[2]),
            )
        writer = Writer(engine, *room)
    for row in rows:
        writer.join(row)
    while writer.rows:
        writer.step()
    return writer

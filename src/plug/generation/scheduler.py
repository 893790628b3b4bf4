"""`Scheduler`: which sequences take the next step, and what the device must do for it.

Host only: it imports no torch and holds no tensor. It makes one `StepPlan` a step; a
`ModelRunner`, or a scripted runner in a test, carries it out; `Scheduler.update` takes the ids.
A driver is three lines::

    while scheduler.running:
        plan = scheduler.plan()
        finished = scheduler.update(runner.step(plan))
"""

from __future__ import annotations

from collections import abc, deque
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from plug.generation.prompt_lookup import power_of_two
from plug.generation.sequence import Sequence, TokenLogprobs


class Move(NamedTuple):
    """A sequence goes to another slot, with the first ``length`` positions of its cache."""

    source: int
    target: int
    length: int


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What the runner does in one step, in the order of these fields.

    Attributes:
        sequences: who takes the step; the i-th is in slot i.
        moves: slots to copy to others first; in any order.
        joined: slots whose sequence is new.
        due: slots whose source the encoder reads, and whose window begins anew.
        drafts: for each sequence, ids that may follow the token of this step.
        drafted: the length that drafts are padded to; 0 where there are none.
        steps: for each sequence, steps that it took before.
        length: cache positions that hold something after this step, at most.
    """

    sequences: list[Sequence]
    moves: list[Move]
    joined: list[int]
    due: list[int]
    drafts: list[list[int]]
    drafted: int
    steps: list[int]
    length: int


NO_CHOICE = -1  # fills up the lists of `TokenIds.read`


class TokenIds(Protocol):
    """Ids that a step chose; they may still be on their way from the device."""

    def read(self) -> list[list[int]]:
        """Wait for them: for each sequence the id, then one for each right token of its draft.

        `NO_CHOICE` fills up the lists; `plug.generation.settings.NO_TOKEN` may be among the ids.
        """
        ...

    def logprobs(self) -> list[list[TokenLogprobs]] | None:
        """Wait for the log-probabilities of these ids; None where no sequence asks for them."""
        ...


class Scheduler:
    """Steps all running sequences together. What one writes does not depend on the others.

    Args:
        slots: sequences at once, at most.
        ahead: steps that may be planned before the ids of the step before are read. 1 on CUDA: the
            host then never waits for a token, and a text that ends has one step too many, whose id
            is dropped. Where what comes next depends on the text so far (a draft, a new window, the
            end), the scheduler waits.

    Attributes:
        running: the sequences being written; the i-th is in slot i from the next step on.
    """

    def __init__(self, slots: int, *, ahead: int = 0) -> None:
        self.running: list[Sequence] = []
        self._slots = slots
        self._ahead = ahead
        self._begun: deque[tuple[list[Sequence], TokenIds]] = deque()
        self._planned: list[Sequence] = []

    @property
    def is_full(self) -> bool:
        return len(self.running) == self._slots

    def join(self, sequence: Sequence) -> None:
        """Have ``sequence`` take part from the next step on."""
        assert not self.is_full, "no slot is free"
        self.running.append(sequence)

    def leave(self, gone: abc.Sequence[Sequence]) -> None:
        """Drop sequences, finished or not; the last ones take their slots."""
        for sequence in gone:
            index, last = self.running.index(sequence), self.running.pop()
            if last is not sequence:
                self.running[index] = last

    def plan(self) -> StepPlan:
        """Return the next step of all running sequences; `update` must follow."""
        moves, joined, due = [], [], []
        for slot, sequence in enumerate(self.running):
            if sequence.window_is_full:
                sequence.begin_window()
            if sequence.slot is None:
                joined.append(slot)
            elif sequence.slot != slot:
                length = 0 if sequence.is_due else sequence.steps_in_window
                moves.append(Move(sequence.slot, slot, length))
            sequence.slot = slot
            if sequence.is_due:
                due.append(slot)
                sequence.is_due, sequence.steps_in_window = False, 0
        steps = [sequence.steps for sequence in self.running]
        drafts, length, longest_draft, most = [], 0, 0, 0
        for sequence in self.running:
            sequence.steps += 1
            sequence.steps_in_window += 1
            draft = sequence.draft()
            drafts.append(draft)
            length = max(length, sequence.steps_in_window + len(draft))
            longest_draft = max(longest_draft, len(draft))
            if sequence.lookup is not None:
                most = max(most, sequence.lookup.most)
        drafted = min(power_of_two(longest_draft), most) if longest_draft else 0
        self._planned = list(self.running)
        return StepPlan(self._planned, moves, joined, due, drafts, drafted, steps, length)

    def update(self, ids: TokenIds) -> list[Sequence]:
        """Take the ids of the step that `plan` described.

        Returns:
            The sequences that are finished now; they have left.
        """
        self._begun.append((self._planned, ids))
        must_wait = any(
            sequence.window_is_full or sequence.has_no_steps_left or sequence.lookup is not None
            for sequence in self.running
        )
        while len(self._begun) > (0 if must_wait else self._ahead):
            sequences, begun = self._begun.popleft()
            found, logprobs = begun.read(), begun.logprobs()
            for index, sequence in enumerate(sequences):
                chosen = [token_id for token_id in found[index] if token_id != NO_CHOICE]
                sequence.take(chosen, None if logprobs is None else logprobs[index])
        for sequence in self.running:
            if not sequence.is_finished and sequence.has_no_steps_left:
                sequence.finish("length")
        finished = [sequence for sequence in self.running if sequence.is_finished]
        self.leave(finished)
        return finished

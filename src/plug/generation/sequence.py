"""`Sequence`: one text being written, in token ids. Host only: it imports no torch."""

from __future__ import annotations

from collections import abc
from dataclasses import dataclass, field
from typing import NamedTuple

from plug.errors import UsageError
from plug.generation.detokenizer import Detokenizer
from plug.generation.prompt_lookup import PromptLookup
from plug.generation.settings import NO_TOKEN, NO_TOKEN_MESSAGE, GenerationSettings
from plug.generation.window import FinishReason, Rules


class TokenLogprobs(NamedTuple):
    """Log-probabilities (natural) at one place of the text, before any setting changes them.

    Attributes:
        logprob: of the token that was written.
        top: the likeliest ids and theirs, likeliest first; as many as ``logprobs`` asks for.
    """

    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(slots=True, eq=False)
class Sequence:
    """What the scheduler knows of one text.

    Args:
        prompt: token ids, without [CLS] and [SEP].
        rules: `PlugRules` or `OriginalRules`; they hold the lengths.
        settings: how tokens are chosen.
        seed: of the draws.
        detokenizer: turns ids into text and looks for stop strings; None where nobody reads text.

    Attributes:
        source: what the encoder reads for the current window, with [CLS] and [SEP].
        written: ids written so far.
        in_window: the part of ``written`` since the last encoding.
        logprobs: for each of ``written``, where the settings ask for them.
        finish_reason: None while it is being written.
        error: what went wrong on the host, for this sequence alone; it is then finished.
        slot: its place in the buffers of the runner; None before its first step.
        steps: steps begun so far.
        steps_in_window: those since the last encoding.
        is_due: the encoder must read ``source`` before the next step.
        lookup: where its drafts come from; None without prompt lookup.
        adapter: number of the adapter that it is written with (`AdapterStack`); 0 is none.
    """

    prompt: abc.Sequence[int]
    rules: Rules
    settings: GenerationSettings
    seed: int
    detokenizer: Detokenizer | None = None
    source: list[int] = field(default_factory=list)
    written: list[int] = field(default_factory=list)
    in_window: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    error: Exception | None = None
    slot: int | None = None
    steps: int = 0
    steps_in_window: int = 0
    is_due: bool = True
    lookup: PromptLookup | None = None
    adapter: int = 0

    def __post_init__(self) -> None:
        self.source = self.rules.first_source(self.prompt)
        if self.settings.prompt_lookup_num_tokens is not None:
            self.lookup = PromptLookup(self.prompt, self.settings.prompt_lookup_num_tokens)

    @property
    def longest_window(self) -> int:
        """Steps from one encoding, at most."""
        return min(self.rules.window, self.rules.steps)

    @property
    def is_finished(self) -> bool:
        return self.finish_reason is not None or self.error is not None

    @property
    def window_is_full(self) -> bool:
        return self.steps_in_window == self.rules.window

    @property
    def has_no_steps_left(self) -> bool:
        return self.steps == self.rules.steps

    def begin_window(self) -> None:
        """Add what was written to the source, which the encoder reads before the next step."""
        self.source = self.rules.next_source(self)
        self.in_window = []
        self.is_due = True

    def draft(self) -> list[int]:
        """Return ids that may follow the token of the step just begun; often none.

        There are no more than steps left, in the text and in the window.
        """
        if self.lookup is None:
            return []
        left = min(self.rules.steps - self.steps, self.rules.window - self.steps_in_window)
        return self.lookup.draft(left)

    def take(
        self, chosen: abc.Sequence[int], logprobs: abc.Sequence[TokenLogprobs] | None = None
    ) -> None:
        """Take the ids chosen in one step: one, and one more for each right token of its draft.

        An exception, such as one of the detokenizer's callback, finishes this sequence with
        ``error``.

        Args:
            chosen: ids; `NO_TOKEN` where none could be chosen.
            logprobs: one for each of ``chosen``; None where no sequence asks for them.
        """
        right = len(chosen) - 1
        self.steps += right
        self.steps_in_window += right
        try:
            for index, token_id in enumerate(chosen):
                if not self.is_finished and self._take(token_id) and logprobs is not None:
                    self._take_logprobs(logprobs[index])
            if self.lookup is not None:
                self.lookup.judge(right)
        except Exception as error:
            self.error = error

    def _take(self, token_id: int) -> bool:
        """Take one id; True where it was written."""
        if token_id == NO_TOKEN:
            raise UsageError(NO_TOKEN_MESSAGE)
        kept = self.rules.accept(token_id, self)
        if kept is None:
            return False
        if not isinstance(kept, int):
            self.finish(kept)
            return False
        if kept in self.settings.stop_token_ids and len(self.written) >= self.rules.min_length:
            self.finish("stop")
            return False
        self.written.append(kept)
        self.in_window.append(kept)
        if self.lookup is not None:
            self.lookup.append(kept)
        if self.detokenizer is not None and self.detokenizer.push(kept):
            self.finish_reason = "stop"
        return True

    def _take_logprobs(self, found: TokenLogprobs) -> None:
        if (count := self.settings.logprobs) is not None:  # others may ask for more
            self.logprobs.append(TokenLogprobs(found.logprob, found.top[:count]))

    def finish(self, reason: FinishReason) -> None:
        """End the text, and give out what the detokenizer held back."""
        self.finish_reason = reason
        try:
            if self.detokenizer is not None:
                self.detokenizer.flush()
        except Exception as error:
            self.error = error

"""The loop of sampled and greedy writing, a window at a time; our rules and the original's.

A window is a stretch of text decoded from one encoding: when it is full, what was written joins
the source, the encoder reads again, and the decoder starts afresh from [CLS]. All rows of a batch
fill their windows in step, so their sources are always encoded together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from torch import Tensor

from plug.errors import UsageError
from plug.generation.engine import Engine
from plug.generation.sampling import Sampler
from plug.generation.settings import MAX_PROMPT_TOKENS, WINDOW, GenerationSettings
from plug.model.configuration import PlugConfig

FinishReason = Literal["stop", "length"]


@dataclass(slots=True)
class Row:
    """One text being written, in token ids."""

    index: int  # among the texts of the call
    prompt: Sequence[int]
    source: list[int]  # what the encoder reads now
    written: list[int] = field(default_factory=list)
    in_window: list[int] = field(default_factory=list)  # the part of it since the last encoding
    finish_reason: FinishReason = "length"


class Rules(Protocol):
    """What differs between our way of writing and the original's."""

    window: int  # steps from one encoding
    steps: int  # at most; a step writes one token or, in the original, none

    def first_source(self, prompt: Sequence[int]) -> list[int]:
        """What the encoder reads first."""
        ...

    def next_source(self, row: Row) -> list[int]:
        """What it reads after a full window."""
        ...

    def allow(self, logits: Tensor, rows: Sequence[Row]) -> Tensor:
        """The logits without what may not be written now."""
        ...

    def accept(self, token_id: int, row: Row) -> int | FinishReason | None:
        """The token to keep, "stop" to end here, or None: a step used up, nothing kept."""
        ...


class PlugRules:
    """Ours: write until [SEP]; every encoding reads [CLS], the last 510 tokens so far, [SEP].

    Args:
        config: of the model.
        window: tokens from one encoding, as `window_length` gives it.
        out_length: tokens to write at most.
        min_length: tokens before [SEP] may come.
        banned: ids never to write, such as [MASK].
    """

    def __init__(
        self,
        config: PlugConfig,
        window: int,
        out_length: int,
        min_length: int = 0,
        banned: Sequence[int] = (),
    ) -> None:
        self.config = config
        self.window = window
        self.steps = out_length
        self.min_length = min_length
        self.banned = banned

    def first_source(self, prompt: Sequence[int]) -> list[int]:
        return frame(prompt, self.config)

    def next_source(self, row: Row) -> list[int]:
        so_far = [*row.prompt[-MAX_PROMPT_TOKENS:], *row.written[-MAX_PROMPT_TOKENS:]]
        return frame(so_far, self.config)

    def allow(self, logits: Tensor, rows: Sequence[Row]) -> Tensor:
        logits = forbid(logits, self.config.num_emitted_tokens, self.banned)
        for index, row in enumerate(rows):
            if len(row.written) < self.min_length:
                logits[index, self.config.eos_token_id] = float("-inf")
        return logits

    def accept(self, token_id: int, row: Row) -> int | FinishReason | None:  # noqa: ARG002
        return "stop" if token_id == self.config.eos_token_id else token_id


class OriginalRules:
    """The released 27B's loop, id for id (AliceMind's; `docs/generation.md` tells it in full).

    Where the source holds several [SEP] the reference fails at its second window; here the last
    one, which closes the source, is the one that gives way.

    Args:
        config: of the model.
        window: steps from one encoding; 128 in the reference.
        out_length: steps at most; 0 is 1, as in the reference.
    """

    def __init__(self, config: PlugConfig, window: int, out_length: int) -> None:
        self.config = config
        self.window = window
        self.steps = max(1, out_length)
        self.must_exceed = int(0.8 * self.steps)
        self.max_source = prompt_limit(config) + 2

    def first_source(self, prompt: Sequence[int]) -> list[int]:
        return frame(prompt, self.config)

    def next_source(self, row: Row) -> list[int]:
        # The new tokens take the place of the closing [SEP]. Cutting drops [CLS] first.
        spliced = [*row.source[:-1], *row.in_window, self.config.eos_token_id]
        return spliced[-self.max_source :]

    def allow(self, logits: Tensor, rows: Sequence[Row]) -> Tensor:  # noqa: ARG002
        return logits  # padding rows of the word table can be drawn; see `accept`

    def accept(self, token_id: int, row: Row) -> int | FinishReason | None:
        if token_id >= self.config.num_emitted_tokens:
            return self.config.unk_token_id
        if token_id != self.config.eos_token_id:
            return token_id
        return "stop" if len(row.written) > self.must_exceed else None


def write(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    rules: Rules,
    sampler: Sampler,
    on_token: Callable[[int, int], None] | None = None,
) -> list[Row]:
    """Continue each prompt (token ids without [CLS] and [SEP]); rows in the prompts' order.

    Args:
        engine: encodes and decodes.
        prompts: any lengths; what a row writes does not depend on the others.
        rules: `PlugRules` or `OriginalRules`.
        sampler: chooses among the logits.
        on_token: called with the row and each token it keeps.
    """
    everyone = [
        Row(index, prompt, rules.first_source(prompt)) for index, prompt in enumerate(prompts)
    ]
    start = engine.config.decoder_start_token_id
    rows = everyone
    for step in range(rules.steps):
        if step % rules.window == 0:
            if step:
                for row in rows:
                    row.source, row.in_window = rules.next_source(row), []
            engine.start([row.source for row in rows], min(rules.window, rules.steps - step))
        last = [row.in_window[-1] if row.in_window else start for row in rows]
        logits = engine.step(last, [len(row.in_window) for row in rows])
        indices = [row.index for row in rows]
        chosen = sampler.choose(rules.allow(logits, rows), indices, step)
        for token_id, row in zip(chosen, rows, strict=True):
            kept = rules.accept(token_id, row)
            if kept == "stop":
                row.finish_reason = "stop"
            elif isinstance(kept, int):
                row.written.append(kept)
                row.in_window.append(kept)
                sampler.append(row.index, kept)
                if on_token is not None:
                    on_token(row.index, kept)
        going = [index for index, row in enumerate(rows) if row.finish_reason != "stop"]
        if not going:
            break
        if len(going) < len(rows):
            rows = [rows[index] for index in going]
            if (step + 1) % rules.window:  # a full window is dropped anyway
                engine.select(going)
    return everyone


def forbid(logits: Tensor, num_emitted_tokens: int, banned: Sequence[int]) -> Tensor:
    """``logits`` (rows, vocab) without padding rows and, changed in place, without ``banned``."""
    logits = logits[:, :num_emitted_tokens]
    logits[:, list(banned)] = float("-inf")
    return logits


def frame(prompt: Sequence[int], config: PlugConfig) -> list[int]:
    """[CLS], the last tokens of ``prompt`` that the encoder has room for, [SEP]."""
    kept = prompt[max(0, len(prompt) - prompt_limit(config)) :]
    return [config.decoder_start_token_id, *kept, config.eos_token_id]


def prompt_limit(config: PlugConfig) -> int:
    """Tokens of a prompt that are read: the last 510, or as many as there are positions for."""
    return min(MAX_PROMPT_TOKENS, config.max_position_embeddings - 2)


def window_length(config: PlugConfig, settings: GenerationSettings) -> int:
    """Tokens written from one encoding.

    Raises:
        UsageError: the window asked for has more tokens than the model has positions.
    """
    longest = config.max_position_embeddings
    if settings.window is None:
        return min(WINDOW[settings.mode], longest)
    if settings.window > longest:
        raise UsageError(f"window={settings.window} 超过该模型的最大长度 {longest}。请取更小的值。")
    return settings.window

"""Windows and rules: what the encoder reads, which ids are accepted, when a text ends.

A window is a stretch of text that is decoded from one encoding. When it is full, what was written
becomes part of the source, the encoder reads again, and the decoder starts again from [CLS].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

from plug.errors import UsageError
from plug.generation.settings import MAX_PROMPT_TOKENS, WINDOW, GenerationSettings
from plug.model.configuration import PlugConfig

FinishReason = Literal["stop", "length"]


class Written(Protocol):
    """What rules look at: a `plug.generation.sequence.Sequence`, in token ids."""

    prompt: Sequence[int]
    source: list[int]  # what the encoder reads now
    written: list[int]
    in_window: list[int]  # the part of it since the last encoding


class Rules(Protocol):
    """What differs between mode "plug" and mode "original"."""

    window: int  # steps from one encoding
    steps: int  # at most; a step writes one token or, in mode "original", sometimes none
    forbidden: Sequence[int]  # ids that are never chosen; a few
    num_ids: int  # those from this one on are never chosen either
    min_length: int  # tokens before [SEP] may be chosen

    def first_source(self, prompt: Sequence[int]) -> list[int]:
        """Return what the encoder reads first."""
        ...

    def next_source(self, sequence: Written) -> list[int]:
        """Return what the encoder reads after a full window."""
        ...

    def accept(self, token_id: int, sequence: Written) -> int | FinishReason | None:
        """Return the token to keep, "stop" to end here, or None: the step writes nothing."""
        ...


class PlugRules:
    """Mode "plug": write until [SEP]; each encoding reads [CLS], the last 510 tokens, [SEP].

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
        self.forbidden = banned
        self.num_ids = config.num_emitted_tokens

    def first_source(self, prompt: Sequence[int]) -> list[int]:
        return frame(prompt, self.config)

    def next_source(self, sequence: Written) -> list[int]:
        so_far = [*sequence.prompt[-MAX_PROMPT_TOKENS:], *sequence.written[-MAX_PROMPT_TOKENS:]]
        return frame(so_far, self.config)

    def accept(self, token_id: int, sequence: Written) -> int | FinishReason | None:  # noqa: ARG002
        return "stop" if token_id == self.config.eos_token_id else token_id


class OriginalRules:
    """Mode "original": AliceMind's loop of the 27B, id for id; `docs/generation.md` describes it.

    Where the source holds several [SEP], the reference fails at its second window; here the last
    one, which closes the source, is replaced.

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
        self.forbidden: Sequence[int] = ()
        self.num_ids = config.vocab_size  # padding rows of the word table too: see `accept`
        self.min_length = 0

    def first_source(self, prompt: Sequence[int]) -> list[int]:
        return frame(prompt, self.config)

    def next_source(self, sequence: Written) -> list[int]:
        # The new tokens replace the closing [SEP]. Cutting drops [CLS] first.
        spliced = [*sequence.source[:-1], *sequence.in_window, self.config.eos_token_id]
        return spliced[-self.max_source :]

    def accept(self, token_id: int, sequence: Written) -> int | FinishReason | None:
        if token_id >= self.config.num_emitted_tokens:
            return self.config.unk_token_id
        if token_id != self.config.eos_token_id:
            return token_id
        return "stop" if len(sequence.written) > self.must_exceed else None


def frame(prompt: Sequence[int], config: PlugConfig) -> list[int]:
    """Return [CLS], the last tokens of ``prompt`` that the encoder has room for, [SEP]."""
    kept = prompt[max(0, len(prompt) - prompt_limit(config)) :]
    return [config.decoder_start_token_id, *kept, config.eos_token_id]


def prompt_limit(config: PlugConfig) -> int:
    """Return how many tokens of a prompt are read: 510, or as many as there are positions for."""
    return min(MAX_PROMPT_TOKENS, config.max_position_embeddings - 2)


def window_length(config: PlugConfig, settings: GenerationSettings) -> int:
    """Return how many tokens are written from one encoding.

    Raises:
        UsageError: the window asked for has more tokens than the model has positions.
    """
    longest = config.max_position_embeddings
    if settings.window is None:
        return min(WINDOW[settings.mode], longest)
    if settings.window > longest:
        raise UsageError(f"window={settings.window} 超过该模型的最大长度 {longest}。请取更小的值。")
    return settings.window

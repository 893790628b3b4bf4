"""What a call of a `Generator` returns, and what its stream yields."""

from __future__ import annotations

from dataclasses import dataclass

from plug.generation.sequence import TokenLogprobs
from plug.generation.window import FinishReason


@dataclass(frozen=True, slots=True)
class GenerationResult:
    """What was written for one text.

    Attributes:
        text: the continuation alone; without a stop string that ended it.
        token_ids: all ids that were written, those of a stop string too; without the final [SEP] or
            stop id. In original mode before runs of [UNK] are made one.
        prompt_token_count: of the whole prompt, also where only its end was read.
        finish_reason: "stop" where the model, a stop string or a stop id ended the text, "length"
            at ``out_length``.
        seed: with it, the same text comes again.
        seconds: from the start of the batch that this text was part of to its own end.
        logprobs: for each of ``token_ids``, where the settings ask for them.
    """

    text: str
    token_ids: tuple[int, ...]
    prompt_token_count: int
    finish_reason: FinishReason
    seed: int
    seconds: float
    logprobs: tuple[TokenLogprobs, ...] | None = None

    @property
    def tokens_per_second(self) -> float:
        return len(self.token_ids) / self.seconds


@dataclass(frozen=True, slots=True)
class Piece:
    """What `Generator.stream` yields.

    Attributes:
        index: of the result, as in the list that a call of the `Generator` returns.
        text: what was added to its text; "" in the last piece, and between two steps of beams.
        result: in the last piece of a text, otherwise None.
    """

    index: int
    text: str
    result: GenerationResult | None = None

"""`GenerationSettings`: how to write. The one home of the defaults; imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from plug.errors import UsageError

Mode = Literal["plug", "original"]

MAX_OUT_LENGTH = 100_000  # tokens; a limit against typing errors, not of the model
MAX_BEAMS = 64
MAX_LOOKUP_TOKENS = 32  # of a draft of prompt lookup; more are seldom right, and cost
MAX_PROMPT_TOKENS = 510  # read at most, as in the reference; [CLS] and [SEP] come on top
WINDOW = {"plug": 384, "original": 128}  # tokens written from one encoding
SAMPLING_PENALTY = 1.1  # of repeated tokens; docs/experiments.md has what it does
BEAM_MIN_LENGTH = 5  # the reference's default of its beam search


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerationSettings:
    """What `generate` can be asked; `docs/generation.md` explains each.

    Attributes:
        out_length: tokens to write at most, 1 … 100,000.
        mode: "plug", or "original" for the loop of the released 27B.
        do_sample: draw by probability; False takes the likeliest token (greedy).
        temperature: divides the logits, 0.01 … 100; 0 is greedy.
        top_k: draw among this many of the likeliest tokens; 0 among all.
        top_p: draw among the likeliest tokens that together reach this probability; 0 and 1: off.
        repetition_penalty: above 1 makes tokens already written less likely (Keskar et al. 2019);
            None is 1.1 when drawing in mode "plug" (a small model loops without), otherwise 1.
        no_repeat_ngram_size: no n tokens in a row are written twice; 0: off.
        num_beams: above 1, beam search as the reference's; the sampling settings play no part.
        length_penalty: exponent of ((5 + n) / 6) in the score of beams.
        min_length: tokens before the end may come; None is 0, and 5 with beams.
        window: tokens written before the encoder reads again what was written; None is 384,
            128 in original mode, and no more than the model has positions for.
        prompt_lookup_num_tokens: guess up to so many next tokens, 1 … 32, by copying what followed
            where the text last ended like now, and check them in one step: the same text, sooner
            where it repeats its prompt or itself. None: off.
    """

    out_length: int = 256
    mode: Mode = "plug"
    do_sample: bool = True
    temperature: float = 0.9
    top_k: int = 20
    top_p: float = 0.0
    repetition_penalty: float | None = None
    no_repeat_ngram_size: int = 0
    num_beams: int = 1
    length_penalty: float = 0.6
    min_length: int | None = None
    window: int | None = None
    prompt_lookup_num_tokens: int | None = None

    def __post_init__(self) -> None:
        if self.mode not in WINDOW:
            raise UsageError(f"mode={self.mode!r} 只能是 'plug' 或 'original'。")
        check_int("out_length", self.out_length, 1, MAX_OUT_LENGTH)
        if self.temperature != 0:
            _check_float("temperature", self.temperature, 0.01, 100)
        check_int("top_k", self.top_k, 0)
        _check_float("top_p", self.top_p, 0, 1)
        if self.repetition_penalty is not None:
            _check_float("repetition_penalty", self.repetition_penalty, 0.01, 100)
        check_int("no_repeat_ngram_size", self.no_repeat_ngram_size, 0)
        check_int("num_beams", self.num_beams, 1, MAX_BEAMS)
        _check_float("length_penalty", self.length_penalty, -10, 10)
        if self.min_length is not None:
            check_int("min_length", self.min_length, 0, self.out_length)
            if self.mode == "original" and self.num_beams == 1:
                raise UsageError(
                    "mode='original' 由原版的规则决定何时结束（写满 out_length 的 80% 之后），"
                    "不能再给 min_length。请去掉它，或用 mode='plug'。"
                )
        if self.window is not None:
            check_int("window", self.window, 1)
        if (lookup := self.prompt_lookup_num_tokens) is not None:
            check_int("prompt_lookup_num_tokens", lookup, 1, MAX_LOOKUP_TOKENS)
            if self.num_beams > 1:
                raise UsageError(
                    f"prompt_lookup_num_tokens={lookup} 不能与束搜索（num_beams="
                    f"{self.num_beams}）同用。请去掉其中一个。"
                )

    @property
    def greedy(self) -> bool:
        return not self.do_sample or self.temperature == 0

    @property
    def penalty(self) -> float:
        """The repetition penalty in effect."""
        if self.repetition_penalty is not None:
            return self.repetition_penalty
        draws = self.mode == "plug" and self.num_beams == 1 and not self.greedy
        return SAMPLING_PENALTY if draws else 1.0

    @property
    def has_penalties(self) -> bool:
        return self.penalty != 1 or self.no_repeat_ngram_size > 0


def check_int(name: str, value: object, low: int, high: int | None = None) -> None:
    """Raise a `UsageError` that names the limits unless ``value`` is an integer within them."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise UsageError(f"{name}={value!r} 应是整数。")
    if value < low or (high is not None and value > high):
        limits = f"不小于 {low}" if high is None else f"在 {low} 到 {high} 之间"
        raise UsageError(f"{name}={value} 应{limits}。")


def _check_float(name: str, value: object, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise UsageError(f"{name}={value!r} 应是一个数。")
    if not math.isfinite(value) or not low <= value <= high:
        raise UsageError(f"{name}={value} 应在 {low:g} 到 {high:g} 之间。")

"""`GenerationSettings`: how a text is generated. The one home of these options; imports no torch.

The command line (`cli/generate.py`), the table in `docs/generation.md` and the checks are made
from the fields. To add an option, add a field, and its effect in `sampling.py` or `scheduler.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from plug.errors import UsageError
from plug.options import (
    Biases,
    Bool,
    Choice,
    Float,
    Int,
    Strings,
    TokenIds,
    check_options,
    merge,
    option,
)
from plug.options import check_int as check_int

Mode = Literal["plug", "original"]

MAX_OUT_LENGTH = 100_000  # tokens; a limit against typing errors, not of the model
MAX_BEAMS = 64
MAX_LOOKUP_TOKENS = 32  # of a draft of prompt lookup; longer drafts are seldom right
MAX_PROMPT_TOKENS = 510  # read at most, as in the reference; [CLS] and [SEP] come on top
MAX_LOGPROBS = 20  # alternatives a token, as in vLLM and OpenAI's API
WINDOW = {"plug": 384, "original": 128}  # tokens written from one encoding
SAMPLING_PENALTY = 1.1  # of repeated tokens; docs/experiments.md has what it does
# In place of an id where no token can be chosen: the settings forbid every token, or the logits are
# not numbers. It becomes the error of its sequence and is never fed to the model.
NO_TOKEN = -2
NO_TOKEN_MESSAGE = "这些设置禁止了所有的词元，或模型的输出不是数，写不下去。请放宽设置。"
BEAM_MIN_LENGTH = 5  # the reference's default of its beam search


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerationSettings:
    """What `generate` can be asked. Each field's metadata has its help text and its limits.

    Names and meanings are those of `transformers.GenerationConfig` and vLLM's `SamplingParams`;
    `docs/generation.md` has the table, and says where they differ.

    Raises:
        UsageError: a value is of another type, outside its limits, or excludes another option.
    """

    out_length: int = option(
        256, Int(1, MAX_OUT_LENGTH),
        f"最多写多少个词元，1 到 {MAX_OUT_LENGTH}。",
        "tokens to write at most",
    )  # fmt: skip
    mode: Mode = option(
        "plug", Choice(("plug", "original")),
        "plug；或 original：原版 27B 的写法。",
        "`original`: the loop of the released 27B",
    )  # fmt: skip
    do_sample: bool = option(
        True, Bool(),
        "按概率抽样；--no-do-sample 为贪心（总取最可能的词元）。",
        "draw by probability; False takes the likeliest token (greedy)",
    )  # fmt: skip
    temperature: float = option(
        0.9, Float(0.01, 100, zero=True),
        "越高越随意，0.01 到 100；0 为贪心。",
        "divides the logits; 0 is greedy",
    )  # fmt: skip
    top_k: int = option(
        20, Int(0, 2**31 - 1),
        "只在最可能的这么多个词元里抽，0 为不限。",
        "draw among this many of the likeliest tokens; 0: among all",
    )  # fmt: skip
    top_p: float = option(
        0.0, Float(0, 1),
        "只在概率合计达到它的最可能的词元里抽，0 和 1 为不限。",
        "draw among the likeliest tokens that together reach this probability, applied after "
        "`top_k` as in `transformers`; 0 and 1: off",
    )  # fmt: skip
    min_p: float = option(
        0.0, Float(0, 1),
        "不抽概率小于“最可能的词元的概率 × 它”的词元，0 为不限。",
        "never draw a token less likely than this times the likeliest one, applied after `top_p` "
        "as in `transformers`; 0: off",
    )  # fmt: skip
    repetition_penalty: float | None = option(
        None, Float(0.01, 100),
        "大于 1 时，写过的词元更难再写。",
        "above 1 makes tokens that this call has written less likely (Keskar et al. 2019); the "
        "prompt does not count",
        unset=(f" {SAMPLING_PENALTY}，贪心、束搜索和 original 为 1",
               f"{SAMPLING_PENALTY} when drawing in mode `plug`, else 1"),
    )  # fmt: skip
    presence_penalty: float = option(
        0.0, Float(-2, 2),
        "写过的词元的 logit 减去它，-2 到 2。",
        "subtracted from the logits of tokens that this call has written, as in vLLM",
    )  # fmt: skip
    frequency_penalty: float = option(
        0.0, Float(-2, 2),
        "写过的词元的 logit 减去“次数 × 它”，-2 到 2。",
        "subtracted from the logits once for each time this call has written the token, as in "
        "vLLM",
    )  # fmt: skip
    no_repeat_ngram_size: int = option(
        0, Int(0, MAX_OUT_LENGTH),
        "连续这么多个词元不写第二遍，0 为不限。",
        "no so many tokens in a row are written twice by this call, across windows; 0: off",
    )  # fmt: skip
    logit_bias: Mapping[int, float] = option(
        {}, Biases(1024, 100),
        "词元编号=数：加到这个词元的 logit 上，-100 到 100；可重复。",
        "added to the logits of these token ids before everything else, as in vLLM",
    )  # fmt: skip
    num_beams: int = option(
        1, Int(1, MAX_BEAMS),
        f"大于 1 时用束搜索，不再抽样；至多 {MAX_BEAMS}。",
        "above 1: beam search as in the reference; it does not draw",
    )  # fmt: skip
    length_penalty: float = option(
        0.6, Float(-10, 10),
        "束搜索里长度的指数，越大越偏向长的。",
        "exponent of ((5 + n) / 6) in the score of beams",
    )  # fmt: skip
    num_return_sequences: int = option(
        1, Int(1, 64),
        "每段文字写几种续写，各用自己的种子。",
        "texts written for each prompt, each with its own seed",
    )  # fmt: skip
    min_length: int | None = option(
        None, Int(0, MAX_OUT_LENGTH),
        "至少写多少个词元才可结束。",
        "tokens before the end may come",
        unset=(f" 0，束搜索为 {BEAM_MIN_LENGTH}", f"0 (beams: {BEAM_MIN_LENGTH})"),
    )  # fmt: skip
    ignore_eos: bool = option(
        False, Bool(),
        "不让模型自己结束，写满为止。",
        "the model never ends the text: `[SEP]` cannot be chosen (as in llama.cpp; vLLM writes it "
        "and goes on)",
    )  # fmt: skip
    stop: tuple[str, ...] = option(
        (), Strings(16, 200),
        "写出这串文字就停，结果里不含它；可重复。",
        "end where one of these strings appears; the text ends before it, as in vLLM",
    )  # fmt: skip
    stop_token_ids: tuple[int, ...] = option(
        (), TokenIds(1024),
        "写出这个编号的词元就停，结果里不含它；可重复。",
        "end where one of these ids is chosen; it is left out, like `[SEP]`",
    )  # fmt: skip
    logprobs: int | None = option(
        None, Int(0, MAX_LOGPROBS),
        f"给出所写词元和每步最可能的这么多个词元的对数概率，0 到 {MAX_LOGPROBS}（见 --json）。",
        "give the log-probability of each written token and of so many of the likeliest ones, "
        "before any setting changes them (vLLM's `raw_logprobs`)",
        unset=("不给", "None: off"),
    )  # fmt: skip
    simplify: bool = option(
        False, Bool(),
        "先把要续写的文字从繁体转成简体（要装 plug-zh[opencc]）。",
        "convert the prompt from traditional to simplified characters first; needs the extra "
        "`opencc`",
    )  # fmt: skip
    window: int | None = option(
        None, Int(1, MAX_OUT_LENGTH),
        "写满多少个词元后，编码器重读已写的内容。",
        "tokens written before the encoder reads again what was written; at most as many as the "
        "model has positions",
        unset=(f" {WINDOW['plug']}，original 为 {WINDOW['original']}",
               f"{WINDOW['plug']} (original: {WINDOW['original']})"),
    )  # fmt: skip
    prompt_lookup_num_tokens: int | None = option(
        None, Int(1, MAX_LOOKUP_TOKENS),
        f"从已有的文字里抄来猜后面至多这么多个词元，1 到 {MAX_LOOKUP_TOKENS}："
        "写出的不变，照抄多时更快。",
        "guess up to so many next tokens by copying from prompt and text: the same text, sooner "
        "where it repeats; see [prompt lookup](#prompt-lookup)",
        unset=("不猜", "None: off"),
    )  # fmt: skip

    def __post_init__(self) -> None:
        check_options(self)
        if self.min_length is not None and self.min_length > self.out_length:
            raise UsageError(
                f"min_length={self.min_length} 应不超过 out_length={self.out_length}。"
            )
        if self.mode == "original" and self.num_beams == 1:
            self._refuse(
                "mode='original'：原版的规则决定何时结束（写满 out_length 的 80% 之后）",
                "请去掉它，或用 mode='plug'。",
                min_length=self.min_length is not None,
                ignore_eos=self.ignore_eos,
            )
        if self.num_beams > 1:
            self._refuse(
                f"束搜索（num_beams={self.num_beams}）",
                "请去掉其中一个。",
                prompt_lookup_num_tokens=self.prompt_lookup_num_tokens is not None,
                presence_penalty=self.presence_penalty != 0,
                frequency_penalty=self.frequency_penalty != 0,
                logit_bias=bool(self.logit_bias),
                num_return_sequences=self.num_return_sequences > 1,
                ignore_eos=self.ignore_eos,
                stop=bool(self.stop),
                stop_token_ids=bool(self.stop_token_ids),
                logprobs=self.logprobs is not None,
            )
        if self.num_return_sequences > 1 and self.greedy:
            raise UsageError(
                f"贪心只有一种续写，num_return_sequences={self.num_return_sequences} 没有意义。"
                "请去掉它，或让 temperature 大于 0。"
            )

    @classmethod
    def of(
        cls, settings: GenerationSettings | Mapping[str, Any] | None = None, **changes: Any
    ) -> GenerationSettings:
        """Return ``settings`` (None: the defaults) with ``changes``.

        Raises:
            UsageError: a name is unknown (the message names the nearest one), or a value is not
                accepted.
        """
        return merge(cls, settings, changes)

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
    def counts_tokens(self) -> bool:
        """Whether tokens written more than once are penalised by their number."""
        return self.presence_penalty != 0 or self.frequency_penalty != 0

    @property
    def has_penalties(self) -> bool:
        """Whether a choice depends on what was written before."""
        return self.penalty != 1 or self.no_repeat_ngram_size > 0 or self.counts_tokens

    def check_token_ids(self, vocab_size: int) -> None:
        """Raise a `UsageError` where an option names a token id that the vocabulary lacks."""
        named = {"logit_bias": self.logit_bias, "stop_token_ids": self.stop_token_ids}
        for name, token_ids in named.items():
            for token_id in token_ids:
                if token_id >= vocab_size:
                    raise UsageError(
                        f"{name} 的词元编号 {token_id} 应小于词表的大小 {vocab_size}。"
                    )

    @staticmethod
    def _refuse(kind: str, way_out: str, **given: bool) -> None:
        for name, is_given in given.items():
            if is_given:
                raise UsageError(f"{name} 不能用于{kind}。{way_out}")

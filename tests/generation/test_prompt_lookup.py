"""Prompt lookup against plain steps: the same text, whatever the drafts are."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from plug.errors import UsageError
from plug.generation.async_engine import AsyncEngine
from plug.generation.generator import Generator, generate
from plug.generation.model_runner import ModelRunner, PreparedModel, Size
from plug.generation.prompt_lookup import LONGEST_MATCH, LONGEST_REST, PromptLookup, find_draft
from plug.generation.sequence import Sequence
from plug.generation.settings import GenerationSettings
from plug.generation.window import OriginalRules, PlugRules, Rules
from plug.model.plug import Plug

Write = Callable[..., None]  # `conftest.write_all`
WriteInFlight = Callable[..., list[tuple[object, ...]]]

TEXTS = ["山上有座庙，山上有座庙", "今天天气很好，我们去公园看花。", "好", "我" * 60]
MODES: list[dict[str, Any]] = [
    {"do_sample": False},
    {"do_sample": False, "repetition_penalty": 1.3},
    {"do_sample": False, "no_repeat_ngram_size": 2, "window": 13},
    {"do_sample": False, "min_length": 30},
    {"do_sample": False, "mode": "original", "window": 7},
    {"temperature": 1.5, "top_k": 50},
    {"temperature": 1.1, "top_k": 3, "repetition_penalty": 1.0, "window": 10},
    {"mode": "original", "temperature": 3.0, "top_k": 0, "window": 7},
]


# --- the drafts -----------------------------------------------------------------------------------


def slow_draft(text: str, most: int) -> str:
    """By comparing every place, token by token."""
    for length in range(LONGEST_MATCH, 0, -1):
        for end in range(len(text) - 1, length - 1, -1):
            if text[end - length : end] == text[len(text) - length :]:
                copied = text[end:]
                while len(copied) < most:
                    copied += copied[-(len(text) - end)]
                return copied[:most]
    return ""


@given(text=st.text("abc", max_size=40), most=st.integers(0, 12))
def test_a_draft_is_what_followed_the_latest_longest_match(text: str, most: int) -> None:
    assert find_draft(text, most) == slow_draft(text, most)


@pytest.mark.parametrize(
    ("text", "draft"),
    [("", ""), ("a", ""), ("aa", "aaaaa"), ("abcab", "cabca"), ("xabcyabczabc", "zabcz")],
)
def test_drafts_of_short_texts(text: str, draft: str) -> None:
    assert find_draft(text, 5) == draft


def test_where_drafts_are_right_they_grow_to_the_most_and_where_wrong_they_shrink() -> None:
    lookup = PromptLookup([5, 6] * 9, 12)
    lengths = []
    for right in (4, 8, 12, 3, 4, 8, 12, 0):
        lengths.append(len(lookup.draft(99)))
        lookup.judge(min(right, lengths[-1]))

    assert lengths == [4, 8, 12, 12, 4, 8, 12, 12]
    assert lookup.draft(99) == [5, 6]


def test_where_drafts_come_to_nothing_they_become_rare_and_cheap() -> None:
    lookup = PromptLookup([5, 6] * 9, 32)
    drafted = []
    for _ in range(300):
        drafted.append(len(lookup.draft(99)))
        lookup.judge(0)

    assert drafted[0] == 4
    assert set(drafted[1:]) == {0, 2}
    assert sum(map(bool, drafted)) < 300 / LONGEST_REST + 8
    lookup._rest = 0
    assert lookup.draft(99)
    lookup.judge(2)  # one that is right ends the rest
    assert len(lookup.draft(99)) == 4


# --- the step -------------------------------------------------------------------------------------


@torch.inference_mode()
def test_several_positions_at_once_equal_the_uncached_pass(lively_model: Plug) -> None:
    sources = [[2, 9, 8, 7, 6, 5, 3], [2, 200, 3]]
    written = torch.tensor([[2, 40, 41, 42, 43, 44], [2, 50, 51, 52, 53, 54]])
    expected = torch.cat(
        [
            lively_model.lm_logits(
                lively_model.decode(written[[row]], lively_model.encode(torch.tensor([source])))
            )
            for row, source in enumerate(sources)
        ]
    )
    runner = ModelRunner(PreparedModel(lively_model), Size(2, 7, 6))
    runner.start(sources)
    assert runner.cache is not None

    # The second row is one behind from the second step on, and has less to feed.
    fed = [([0, 1, 2], [0, 1, 1]), ([3], [2]), ([4, 5], [3, 3])]
    for positions in fed:
        longest = max(map(max, positions)) + 1
        where = torch.tensor(positions)
        logits = runner.prepared.model.decode(
            written.gather(1, where), where, longest, runner.cache
        )

        torch.testing.assert_close(
            logits, expected.gather(1, where[:, :, None].expand(-1, -1, expected.shape[2]))
        )


def make_rows(model: Plug, prompts: list[list[int]], lookups: list[int | None]) -> list[Sequence]:
    """Unlike windows, lengths, rules and settings; the first rows without drafts if None."""
    config = model.config
    rules: list[Rules] = [
        PlugRules(config, 20, 45, min_length=3),
        PlugRules(config, 7, 30),
        OriginalRules(config, 9, 40),
        PlugRules(config, 96, 90, min_length=80),
        PlugRules(config, 1, 4),
        PlugRules(config, 50, 50),
    ]
    chosen: list[dict[str, Any]] = [
        {"temperature": 2.0, "top_k": 0},
        {"do_sample": False, "no_repeat_ngram_size": 3},
        {"temperature": 3.0, "top_k": 0, "mode": "original"},
        {"do_sample": False, "repetition_penalty": 1.4},
        {},
        {"do_sample": False},
    ]
    rows = []
    for index, (prompt, lookup) in enumerate(zip(prompts, lookups, strict=True)):
        options = GenerationSettings(**chosen[index % len(chosen)], prompt_lookup_num_tokens=lookup)
        rows.append(Sequence(prompt, rules[index % len(rules)], options, index))
    return rows


@pytest.fixture
def write_in_flight(write: Callable[..., None]) -> WriteInFlight:
    """Three at a time; the next joins when one leaves."""

    def write_them(
        prepared: PreparedModel, sequences: list[Sequence], ahead: int = 0
    ) -> list[tuple[object, ...]]:
        write(prepared, sequences, slots=3, ahead=ahead)
        return [(sequence.written, sequence.finish_reason) for sequence in sequences]

    return write_them


class Foretold(PromptLookup):
    """Drafts that are right; with ``draws``, for a random while, and then not."""

    def __init__(
        self, row: Sequence, future: list[int], draws: random.Random | None = None
    ) -> None:
        most = row.settings.prompt_lookup_num_tokens
        assert most is not None
        super().__init__(row.prompt, most)
        self.row, self.future, self.draws = row, future, draws
        self.right = 0

    def draft(self, room: int) -> list[int]:
        tokens = self.future[len(self.row.written) :]
        if self.draws is not None:
            tokens = tokens[: self.draws.randrange(9)]
            tokens += [self.draws.randrange(300) for _ in range(self.draws.randrange(3))]
        self._drafted = len(tokens[: min(room, self.most)])
        return tokens[: self._drafted]

    def judge(self, right: int) -> None:
        self.right += right


@pytest.fixture
def ending_model(lively_model: Plug) -> Plug:
    """[SEP] is another token, one that it does write."""
    lively_model.config = dataclasses.replace(lively_model.config, eos_token_id=50)
    return lively_model


few_slow_examples = settings(
    max_examples=12,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@few_slow_examples
@given(
    seed=st.integers(0, 2**32),
    prompts=st.lists(st.lists(st.integers(5, 60), min_size=1, max_size=20), min_size=6, max_size=6),
    most=st.integers(1, 8),
    ahead=st.integers(0, 2),
)
def test_whatever_is_drafted_and_right_of_it_the_text_is_that_of_plain_steps(
    seed: int,
    prompts: list[list[int]],
    most: int,
    ahead: int,
    ending_model: Plug,
    write_in_flight: WriteInFlight,
) -> None:
    prepared = PreparedModel(ending_model)
    plain = make_rows(ending_model, prompts, [None] * 6)
    expected = write_in_flight(prepared, plain)
    draws = random.Random(seed)
    rows = make_rows(
        ending_model, prompts, [None if draws.random() < 0.3 else most for _ in prompts]
    )
    for row, other in zip(rows, plain, strict=True):
        if row.lookup is not None:
            row.lookup = Foretold(row, other.written, draws)

    assert write_in_flight(prepared, rows, ahead) == expected
    assert {reason for _, reason in expected} == {"stop", "length"}


@pytest.mark.parametrize("granularity", [1, 64])
def test_rounded_lengths_change_nothing(
    granularity: int, ending_model: Plug, write_in_flight: WriteInFlight
) -> None:
    prompts = [[9, 8, 7] * 5, [30, 31], [77], [5, 6], [7] * 9, [6, 7, 8, 6, 7]]
    expected = write_in_flight(
        PreparedModel(ending_model), make_rows(ending_model, prompts, [None] * 6)
    )
    prepared = PreparedModel(ending_model)
    prepared.model.granularity = granularity

    assert write_in_flight(prepared, make_rows(ending_model, prompts, [3, None, 8, 32, 5, 10])) == (
        expected
    )


# --- as users meet it -----------------------------------------------------------------------------


@pytest.fixture(params=["lively", "repetitive"])
def writing(request: pytest.FixtureRequest, generator: Generator) -> Generator:
    """One model that hardly repeats itself, and one that does nothing else."""
    if request.param == "repetitive":
        with torch.no_grad():
            generator.prepared.model._embeddings.position_embeddings.weight /= 50
    return generator


@pytest.mark.parametrize("options", MODES, ids=str)
def test_with_and_without_are_the_same(options: dict[str, Any], writing: Generator) -> None:
    options = {"out_length": 40, "seed": [5, 6, 7, 8], "model": writing, **options}
    expected = generate(TEXTS, **options)

    for most in (1, 10):
        found = generate(TEXTS, prompt_lookup_num_tokens=most, **options)
        assert [each.token_ids for each in found] == [each.token_ids for each in expected]
        assert [each.finish_reason for each in found] == [each.finish_reason for each in expected]


@torch.inference_mode()
def test_what_a_step_has_written_itself_is_not_written_again(
    tiny_model: Plug, write: Write
) -> None:
    """The ids to look back on grow by 64 at a time; here a draft reaches beyond 64."""
    options = GenerationSettings(
        do_sample=False, no_repeat_ngram_size=1, prompt_lookup_num_tokens=8
    )
    rules = PlugRules(tiny_model.config, 90, 90, min_length=90)
    plain, row = (Sequence([9, 8, 7], rules, options, 0) for _ in range(2))
    plain.lookup = None
    write(PreparedModel(tiny_model), [plain])
    row.lookup = foretold = Foretold(row, plain.written)

    write(PreparedModel(tiny_model), [row])

    assert row.written == plain.written
    assert foretold.right == 80  # ten steps of nine tokens


@torch.inference_mode()
def test_an_end_that_ends_nothing_uses_up_a_step_and_is_not_written(
    lively_model: Plug, write: Write
) -> None:
    """In original mode, before 80% are written; here a draft stops at it."""

    def start(lookup: int | None) -> Sequence:
        options = GenerationSettings(
            do_sample=False, mode="original", prompt_lookup_num_tokens=lookup
        )
        return Sequence([9, 8, 7], OriginalRules(lively_model.config, 9, 40), options, 0)

    write(PreparedModel(lively_model), [never_ending := start(None)])
    end = never_ending.written[6]
    lively_model.config = dataclasses.replace(lively_model.config, eos_token_id=end)
    write(PreparedModel(lively_model), [plain := start(None)])
    row = start(8)
    row.lookup = Foretold(row, plain.written)

    write(PreparedModel(lively_model), [row])

    assert row.written == plain.written
    assert 6 <= len(plain.written) < 40
    assert plain.steps == row.steps == 40


def count_steps(prepared: PreparedModel) -> list[int]:
    """The tokens fed in each step from now on."""
    fed: list[int] = []
    decode = prepared.model.decode

    def counted(token_ids: Tensor, *inputs: Any) -> Tensor:
        fed.append(token_ids.shape[1])
        return decode(token_ids, *inputs)

    prepared.model.decode = counted  # type: ignore[method-assign]
    return fed


@torch.inference_mode()
def test_a_text_that_repeats_itself_takes_few_steps(tiny_model: Plug, write: Write) -> None:
    prepared = PreparedModel(tiny_model)
    row = Sequence(
        [9, 8, 7],
        PlugRules(tiny_model.config, 90, 90, min_length=90),
        GenerationSettings(do_sample=False, prompt_lookup_num_tokens=10),
        0,
    )
    steps = count_steps(prepared)
    write(prepared, [row])

    assert len(row.written) == 90
    assert len(set(row.written[10:])) == 1, "it was to repeat itself"
    assert len(steps) < 25


@torch.inference_mode()
def test_without_a_draft_steps_are_plain(lively_model: Plug, write: Write) -> None:
    prepared = PreparedModel(lively_model)
    options = GenerationSettings(
        do_sample=False, no_repeat_ngram_size=1, prompt_lookup_num_tokens=8
    )
    rules = PlugRules(lively_model.config, 40, 40, min_length=40, banned=[100, 101])
    row = Sequence([100, 101], rules, options, 0)
    steps = count_steps(prepared)
    write(prepared, [row])

    assert steps == [1] * 40


def test_texts_with_and_without_share_an_async_engine(writing: Generator) -> None:
    cases: list[tuple[str, dict[str, Any]]] = [
        (text, {"out_length": 35, **options, "prompt_lookup_num_tokens": most})
        for text, options, most in zip(
            TEXTS * 2, MODES, [10, None, 3, None, 8, 32, None, 1], strict=True
        )
    ]
    alone = [
        generate(text, model=writing, seed=3, **{**options, "prompt_lookup_num_tokens": None})
        for text, options in cases
    ]

    with AsyncEngine(writing, rows=3) as engine:
        requests = [
            engine.submit(text, GenerationSettings(**options), seed=3) for text, options in cases
        ]
        results = [request.result() for request in requests]

    assert [each.token_ids for each in results] == [each.token_ids for each in alone]
    assert [each.text for each in results] == [each.text for each in alone]


def test_what_is_shown_is_the_text(generator: Generator) -> None:
    shown: list[str] = []
    result = generate(
        "我" * 30,
        model=generator,
        do_sample=False,
        out_length=30,
        prompt_lookup_num_tokens=8,
        on_text=lambda _, piece: shown.append(piece),
    )

    assert "".join(shown) == result.text


@pytest.mark.parametrize("value", [0, 33, -1, 2.0, True])
def test_a_number_out_of_range_is_refused(value: Any) -> None:
    with pytest.raises(UsageError, match="prompt_lookup_num_tokens"):
        GenerationSettings(prompt_lookup_num_tokens=value)


def test_beams_and_drafts_are_refused_together() -> None:
    with pytest.raises(UsageError, match="num_beams"):
        GenerationSettings(prompt_lookup_num_tokens=10, num_beams=3)

"""The loop: driven by a script, and the original's against what the original did."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

from plug.errors import UsageError
from plug.generation.model_runner import PreparedModel
from plug.generation.sequence import Sequence
from plug.generation.settings import GenerationSettings
from plug.generation.window import OriginalRules, PlugRules, Rules, window_length
from plug.model.configuration import PRESETS, PlugConfig
from plug.model.plug import Plug
from plug.tokenization import PlugTokenizer, original_text, replace_original_punctuation

CONFIG = PRESETS["test"]
CLS, SEP = CONFIG.decoder_start_token_id, CONFIG.eos_token_id
ORIGINAL = PlugConfig(hidden_size=64, num_attention_heads=8, max_position_embeddings=640)
GREEDY = GenerationSettings(do_sample=False)

MakeRunner = Callable[[list[list[int]]], Any]  # `conftest.ScriptedRunner`
WriteGreedily = Callable[[Any, list[list[int]], Rules], list[Sequence]]
ReadGolden = Callable[[str], Any]


@pytest.fixture
def write_greedily(write: Callable[..., None]) -> WriteGreedily:
    def write_them(runner: Any, prompts: list[list[int]], rules: Rules) -> list[Sequence]:
        sequences = [Sequence(prompt, rules, GREEDY, 0) for prompt in prompts]
        write(runner, sequences)
        return sequences

    return write_them


# --- ours -----------------------------------------------------------------------------------------


def test_a_full_window_joins_the_source_and_the_decoder_starts_afresh(
    scripted_runner: MakeRunner, write_greedily: WriteGreedily
) -> None:
    runner = scripted_runner([[10, 11, 12, 13, 14, 15, 16]])

    [row] = write_greedily(runner, [[7, 8]], PlugRules(CONFIG, window=3, out_length=7))

    assert row.written == [10, 11, 12, 13, 14, 15, 16]
    assert row.finish_reason == "length"
    assert runner.windows == [
        [[CLS, 7, 8, SEP]],
        [[CLS, 7, 8, 10, 11, 12, SEP]],
        [[CLS, 7, 8, 10, 11, 12, 13, 14, 15, SEP]],
    ]
    assert [plan.length for plan in runner.plans] == [1, 2, 3, 1, 2, 3, 1]


def test_the_source_keeps_the_last_510_tokens_of_prompt_and_text(
    scripted_runner: MakeRunner, write_greedily: WriteGreedily
) -> None:
    config = dataclasses.replace(CONFIG, max_position_embeddings=700)
    runner = scripted_runner([[10] * 600])

    write_greedily(runner, [[7] * 510 + [8] * 90], PlugRules(config, 550, 600))

    assert runner.windows == [[[CLS, *[7] * 420, *[8] * 90, SEP]], [[CLS, *[10] * 510, SEP]]]


def test_the_source_is_no_longer_than_the_model_has_positions(
    scripted_runner: MakeRunner, write_greedily: WriteGreedily
) -> None:
    runner = scripted_runner([[10] * 3])

    write_greedily(runner, [[7] * 200], PlugRules(CONFIG, 2, 3))

    positions = CONFIG.max_position_embeddings
    assert runner.windows == [
        [[CLS, *[7] * (positions - 2), SEP]],
        [[CLS, *[7] * (positions - 4), 10, 10, SEP]],
    ]


def test_sep_ends_a_row_and_is_not_kept_and_the_others_go_on(
    scripted_runner: MakeRunner, write_greedily: WriteGreedily
) -> None:
    runner = scripted_runner([[10, 11, SEP], [20, SEP], [30, 31, 32, 33, 34]])

    rows = write_greedily(runner, [[7], [8], [9]], PlugRules(CONFIG, 4, 5))

    assert [row.written for row in rows] == [[10, 11], [20], [30, 31, 32, 33, 34]]
    assert [row.finish_reason for row in rows] == ["stop", "stop", "length"]
    assert runner.windows[1:] == [[[CLS, 9, 30, 31, 32, 33, SEP]]]


def test_rows_that_end_with_a_window_do_not_come_into_the_next(
    scripted_runner: MakeRunner, write_greedily: WriteGreedily
) -> None:
    runner = scripted_runner([[10, SEP], [20, 21, 22]])

    rows = write_greedily(runner, [[7], [8]], PlugRules(CONFIG, 2, 3))

    assert [row.written for row in rows] == [[10], [20, 21, 22]]
    assert runner.windows[1:] == [[[CLS, 8, 20, 21, SEP]]]
    [move] = runner.plans[2].moves
    assert move == (1, 0, 0)  # the full window's cache goes anyway: no copy of it


def test_a_window_must_fit_the_positions() -> None:
    with pytest.raises(UsageError, match=r"window=97.*96"):
        window_length(CONFIG, GenerationSettings(window=97))
    assert window_length(CONFIG, GenerationSettings(window=96)) == 96
    assert window_length(CONFIG, GenerationSettings()) == 96
    assert window_length(ORIGINAL, GenerationSettings()) == 384
    assert window_length(ORIGINAL, GenerationSettings(mode="original")) == 128


def test_the_loop_with_a_model_equals_the_uncached_model_called_anew_at_each_step(
    lively_model: Plug, write_greedily: WriteGreedily
) -> None:
    prompt, window, out_length = [7, 8, 9, 10], 5, 13
    written: list[int] = []
    for step in range(out_length):
        first = step // window * window
        source = torch.tensor([[CLS, *prompt, *written[:first], SEP]])
        hidden = lively_model.decode(
            torch.tensor([[CLS, *written[first:]]]), lively_model.encode(source)
        )
        logits = lively_model.lm_logits(hidden)[0, -1]
        logits[SEP] = float("-inf")
        written.append(int(logits.argmax()))

    rules = PlugRules(CONFIG, window, out_length, min_length=out_length)
    [row] = write_greedily(PreparedModel(lively_model), [prompt], rules)

    assert row.written == written
    assert len(set(written)) > window, "it repeats itself: a wrong position would not show"


# --- the original's -------------------------------------------------------------------------------


def test_the_original_loop_does_what_the_original_did_with_a_scripted_model(
    golden_json: ReadGolden, scripted_runner: MakeRunner, write_greedily: WriteGreedily
) -> None:
    compared = 0
    for case in golden_json("generation_scripted.json"):
        expected = case["alicemind"]
        if expected["error"]:
            continue
        prompt = expected["windows"][0][1:-1]
        runner = scripted_runner([expected["emitted"]])

        [row] = write_greedily(runner, [prompt], OriginalRules(ORIGINAL, 128, case["length"]))

        assert len(prompt) == min(case["prompt_tokens"], 510), case["name"]
        assert row.written == expected["generated_ids"], case["name"]
        assert len(runner.plans) == expected["steps"], case["name"]
        assert [source for [source] in runner.windows] == expected["windows"], case["name"]
        assert runner.window_first_step == expected["window_first_step"], case["name"]
        compared += 1
    assert compared == 24  # all but the one in which the reference fails


@pytest.mark.shared
def test_what_the_original_reads_of_a_prompt_and_prints(
    golden_json: ReadGolden, original_tokenizer: PlugTokenizer
) -> None:
    for case in golden_json("generation_scripted.json"):
        expected = case["alicemind"]
        prompt = original_tokenizer.encode(
            replace_original_punctuation(case["prompt"]), allow_special_tokens=True
        )

        assert len(prompt) == case["prompt_tokens"], case["name"]
        assert prompt[-510:] == expected["windows"][0][1:-1], case["name"]
        if not expected["error"]:
            printed = original_text(expected["generated_ids"], original_tokenizer)
            assert printed == expected["text"], case["name"]


def test_where_the_original_fails_on_two_seps_the_last_gives_way(
    golden_json: ReadGolden, scripted_runner: MakeRunner, write_greedily: WriteGreedily
) -> None:
    cases = golden_json("generation_scripted.json")
    [case] = [case["alicemind"] for case in cases if case["alicemind"]["error"]]
    [source] = case["windows"]
    runner = scripted_runner([[*case["emitted"], *[5000] * 12]])

    [row] = write_greedily(runner, [source[1:-1]], OriginalRules(ORIGINAL, 128, 140))

    assert row.written == [*case["generated_ids"], *[5000] * 12]
    assert runner.windows == [[source], [[*source[:-1], *case["generated_ids"], 102]]]


@pytest.mark.parametrize("name", ["prompt40", "prompt600"])
def test_the_original_mode_writes_what_the_original_wrote(
    name: str,
    golden_json: ReadGolden,
    golden_prepared: PreparedModel,
    write_greedily: WriteGreedily,
) -> None:
    case = golden_json("generation.json")["alicemind"][name]
    rules = OriginalRules(golden_prepared.config, 128, case["out_length"])

    [row] = write_greedily(golden_prepared, [case["prompt_token_ids"]], rules)

    assert row.written == case["generated_ids"]


def test_the_original_loop_works_in_batches_too(
    golden_json: ReadGolden, golden_prepared: PreparedModel, write_greedily: WriteGreedily
) -> None:
    cases = golden_json("generation.json")["alicemind"]
    cases = [cases["prompt600"], cases["prompt40"]]
    rules = OriginalRules(golden_prepared.config, 128, 300)

    rows = write_greedily(golden_prepared, [case["prompt_token_ids"] for case in cases], rules)

    assert [row.written for row in rows] == [case["generated_ids"] for case in cases]

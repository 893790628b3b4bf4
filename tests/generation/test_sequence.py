"""One text on the host: windows, ends, drafts and errors, without a runner."""

from __future__ import annotations

import pytest

from plug.errors import UsageError
from plug.generation.detokenizer import Detokenizer
from plug.generation.sequence import Sequence, TokenLogprobs
from plug.generation.settings import NO_TOKEN, GenerationSettings
from plug.generation.window import OriginalRules, PlugRules
from plug.model.configuration import PRESETS
from plug.tokenization import PlugTokenizer

CONFIG = PRESETS["test"]
CLS, SEP = CONFIG.decoder_start_token_id, CONFIG.eos_token_id


def new_sequence(out_length: int = 9, window: int = 4, **options: object) -> Sequence:
    settings = GenerationSettings(**options)  # type: ignore[arg-type]
    return Sequence([7, 8], PlugRules(CONFIG, window, out_length), settings, 0)


def test_it_begins_with_the_prompt_as_its_source() -> None:
    sequence = new_sequence()

    assert sequence.source == [CLS, 7, 8, SEP]
    assert sequence.is_due
    assert not sequence.is_finished
    assert sequence.longest_window == 4
    assert new_sequence(out_length=3).longest_window == 3


def test_a_new_window_reads_what_was_written() -> None:
    sequence = new_sequence()
    for token_id in (10, 11):
        sequence.take([token_id])
    sequence.begin_window()

    assert sequence.source == [CLS, 7, 8, 10, 11, SEP]
    assert sequence.written == [10, 11]
    assert sequence.in_window == []


def test_right_tokens_of_a_draft_are_steps_of_their_own() -> None:
    sequence = new_sequence(prompt_lookup_num_tokens=4)
    sequence.steps = sequence.steps_in_window = 1
    sequence.take([10, 11, 12])

    assert sequence.written == [10, 11, 12]
    assert (sequence.steps, sequence.steps_in_window) == (3, 3)


def test_drafts_go_no_further_than_the_window_and_the_text() -> None:
    for out_length, window, most in ((9, 4, 3), (3, 9, 2)):
        sequence = new_sequence(out_length, window, prompt_lookup_num_tokens=8)
        sequence.lookup = type(sequence.lookup)([5, 5, 5, 5], 8)  # type: ignore[misc, call-arg]
        sequence.steps = sequence.steps_in_window = 1
        assert len(sequence.draft()) == most
    assert new_sequence().draft() == []


def test_what_comes_after_the_end_is_dropped() -> None:
    sequence = new_sequence()
    sequence.take([10, SEP, 11])

    assert sequence.written == [10]
    assert sequence.finish_reason == "stop"


def test_stop_ids_end_the_text_and_are_left_out_but_not_before_the_minimum() -> None:
    rules = PlugRules(CONFIG, 9, 9, min_length=2)
    settings = GenerationSettings(stop_token_ids=(10,), min_length=2)
    sequence = Sequence([7, 8], rules, settings, 0)
    for token_id in (10, 11, 10):
        sequence.take([token_id])

    assert sequence.written == [10, 11]
    assert sequence.finish_reason == "stop"


def test_an_end_that_does_not_count_uses_up_a_step() -> None:
    """In original mode, before 80% are written."""
    sequence = Sequence([7], OriginalRules(CONFIG, 9, 9), GenerationSettings(mode="original"), 0)
    sequence.take([SEP])
    sequence.take([10])

    assert sequence.written == [10]
    assert not sequence.is_finished


def test_no_token_is_the_error_of_the_sequence() -> None:
    sequence = new_sequence()
    sequence.take([10])
    sequence.take([NO_TOKEN])

    assert sequence.is_finished
    assert sequence.finish_reason is None
    assert isinstance(sequence.error, UsageError)


def test_an_exception_at_the_last_piece_is_kept_too(tiny_tokenizer: PlugTokenizer) -> None:
    def fail(_: str) -> None:
        raise ValueError("gone")

    # The beginning of a stop string is given out at the end.
    [first] = tiny_tokenizer.encode("山")
    rules, detokenizer = PlugRules(CONFIG, 9, 9), Detokenizer(tiny_tokenizer, fail, stop=["山水"])
    sequence = Sequence([7], rules, GenerationSettings(), 0, detokenizer)
    sequence.take([first])
    assert sequence.error is None
    sequence.finish("length")

    assert isinstance(sequence.error, ValueError)


@pytest.mark.parametrize(("asked", "kept"), [(None, []), (0, [()]), (1, [((10, -0.5),)])])
def test_log_probabilities_are_kept_for_written_tokens_as_many_as_asked_for(
    asked: int | None, kept: list[object]
) -> None:
    sequence = new_sequence(logprobs=asked)
    found = TokenLogprobs(-0.5, ((10, -0.5), (11, -1.5)))
    sequence.take([10], [found])
    sequence.take([SEP], [found])

    assert [each.top for each in sequence.logprobs] == kept

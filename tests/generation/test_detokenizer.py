from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plug.generation.detokenizer import Detokenizer, OriginalStream, TextStream, text_stream
from plug.tokenization import SPECIAL_TOKENS, PlugTokenizer, original_text

FIRST_BYTE = len(SPECIAL_TOKENS)


def pieces_of(stream: TextStream, ids: list[int]) -> list[str]:
    return [*map(stream.push, ids), stream.flush()]


@given(text=st.text(st.characters(codec="utf-8"), max_size=60))
def test_text_comes_out_whole_and_no_piece_is_a_part_of_a_character(
    text: str, tiny_tokenizer: PlugTokenizer
) -> None:
    pieces = pieces_of(text_stream(tiny_tokenizer), tiny_tokenizer.encode(text))

    assert "".join(pieces) == text
    assert "\ufffd" in text or not any("\ufffd" in piece for piece in pieces)


def test_a_long_run_of_emoji_is_shown_as_it_comes(tiny_tokenizer: PlugTokenizer) -> None:
    text = "😀好🌏" * 40  # four, three and four byte pieces

    pieces = pieces_of(text_stream(tiny_tokenizer), tiny_tokenizer.encode(text))

    assert [piece for piece in pieces if piece] == list(text)


@given(ids=st.lists(st.integers(0, 319), max_size=150))
def test_whatever_a_model_writes_is_shown_as_it_is_decoded(
    ids: list[int], tiny_tokenizer: PlugTokenizer
) -> None:
    shown = "".join(pieces_of(text_stream(tiny_tokenizer), ids))
    assert shown == tiny_tokenizer.decode(ids, is_cut=True)


@given(text=st.text("山🐉é", min_size=1, max_size=8), stop=st.sampled_from([(), ("庙",)]))
def test_a_text_that_is_cut_ends_with_a_whole_character(
    text: str, stop: tuple[str, ...], tiny_tokenizer: PlugTokenizer
) -> None:
    """A dragon takes four tokens here, é two."""
    ids = tiny_tokenizer.encode(text)
    for count in range(len(ids)):
        detokenizer = Detokenizer(tiny_tokenizer, stop=stop)
        for token_id in ids[:count]:
            detokenizer.push(token_id)
        detokenizer.flush()

        assert text.startswith(detokenizer.text)
        assert detokenizer.text == tiny_tokenizer.decode(ids[:count], is_cut=True)
    assert tiny_tokenizer.decode(tiny_tokenizer.encode("山🐉")[:-1]) == "山\ufffd"


@given(ids=st.lists(st.integers(FIRST_BYTE, FIRST_BYTE + 255), max_size=30))
def test_broken_bytes_are_replaced_and_do_not_swallow_the_text_around_them(
    ids: list[int], tiny_tokenizer: PlugTokenizer
) -> None:
    before, after = tiny_tokenizer.encode("山"), tiny_tokenizer.encode("庙")

    shown = "".join(pieces_of(text_stream(tiny_tokenizer), [*before, *ids, *after]))

    assert shown.startswith("山")
    assert shown.endswith("庙")


@pytest.mark.shared
@given(data=st.data())
def test_the_original_text_in_pieces_is_the_text_of_the_whole(
    data: st.DataObject, original_tokenizer: PlugTokenizer
) -> None:
    marks = [original_tokenizer.backend.token_to_id(token) for token in ("#", "##a", "##[", "[")]
    awkward = st.sampled_from([*marks, 0, 100, 101])
    ids = data.draw(st.lists(awkward | st.integers(0, 21127), max_size=40))

    shown = "".join(pieces_of(text_stream(original_tokenizer), ids))

    assert shown == original_text(ids, original_tokenizer)
    assert isinstance(text_stream(original_tokenizer), OriginalStream)


# --- stop strings ---------------------------------------------------------------------------------


def end_of_text(text: str, stops: Sequence[str]) -> int | None:
    """Where the text ends: before the stop string that is complete first, read by character."""
    for end in range(1, len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return min(starts)
    return None


def held_back(text: str, stops: Sequence[str]) -> int:
    """The longest end of the text that is a proper beginning of a stop string."""
    return max(
        length
        for length in range(len(text) + 1)
        if not length or any(s.startswith(text[-length:]) and s != text[-length:] for s in stops)
    )


@given(
    characters=st.lists(st.sampled_from("山庙🐉"), max_size=30),
    stops=st.lists(st.text("山庙🐉", min_size=1, max_size=5), min_size=1, max_size=3),
)
def test_the_text_ends_before_a_stop_string_and_no_more_than_its_beginning_is_held_back(
    characters: list[str], stops: list[str], tiny_tokenizer: PlugTokenizer
) -> None:
    """A dragon takes four tokens here; where tokens end makes no difference."""
    shown: list[str] = []
    detokenizer = Detokenizer(tiny_tokenizer, shown.append, stop=stops)
    text, stopped = "", False
    for character in characters:
        text += character
        stopped = any(list(map(detokenizer.push, tiny_tokenizer.encode(character))))
        if stopped:
            break
        assert "".join(shown) == text[: len(text) - held_back(text, stops)]
    if not stopped:
        detokenizer.flush()

    end = end_of_text("".join(characters), stops)
    assert stopped == (end is not None)
    assert "".join(shown) == detokenizer.text == "".join(characters)[:end]
    assert "" not in shown


def test_a_stop_string_within_one_token_and_over_several() -> None:
    detokenizer = Detokenizer(_Words(["ab", "cde", "f"]), stop=["cd"])  # type: ignore[arg-type]
    assert [detokenizer.push(each) for each in range(2)] == [False, True]
    assert detokenizer.text == "ab"
    detokenizer = Detokenizer(_Words(["a", "bc", "d"]), stop=["abcd"])  # type: ignore[arg-type]
    assert [detokenizer.push(each) for each in range(3)] == [False, False, True]
    assert detokenizer.text == ""


def test_the_stop_string_that_is_complete_first_counts() -> None:
    detokenizer = Detokenizer(_Words(["xabcdy"]), stop=["abcd", "bc"])  # type: ignore[arg-type]
    assert detokenizer.push(0)
    assert detokenizer.text == "xa"


def test_stop_strings_wait_for_the_minimum_length(tiny_tokenizer: PlugTokenizer) -> None:
    detokenizer = Detokenizer(tiny_tokenizer, stop=["山", "庙山"], min_length=2)
    ids = tiny_tokenizer.encode("山庙山")
    assert [detokenizer.push(each) for each in ids] == [False, False, True]
    assert detokenizer.text == "山庙"  # what was given out before stays


class _Words:
    """A tokenizer whose ids are places in a list of words."""

    is_original = False

    def __init__(self, words: list[str]) -> None:
        self._words = words

    def decoder_stream(self) -> _Words:
        return self

    def push(self, token_id: int) -> str:
        return self._words[token_id]

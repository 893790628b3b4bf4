from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plug.generation.detokenizer import OriginalStream, RowStreams, TextStream, text_stream
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
    assert "".join(pieces_of(text_stream(tiny_tokenizer), ids)) == tiny_tokenizer.decode(ids)


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


def test_each_row_has_its_own_stream_and_its_own_number(tiny_tokenizer: PlugTokenizer) -> None:
    heard: list[tuple[int, str]] = []
    streams = RowStreams(tiny_tokenizer, lambda row, piece: heard.append((row, piece)), 2, first=8)
    dragon, temple = tiny_tokenizer.encode("🐉"), tiny_tokenizer.encode("庙")

    for row, token_id in [(0, dragon[0]), (1, temple[0]), (0, dragon[1]), (0, dragon[2])]:
        streams.push(row, token_id)
    streams.push(0, dragon[3])
    streams.push(1, dragon[0])
    streams.flush()

    assert heard == [(9, "庙"), (8, "🐉"), (9, "\ufffd")]

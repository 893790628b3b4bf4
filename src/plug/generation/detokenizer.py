"""Text piece by piece, as ids come in; the pieces joined are the text of the whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from plug.tokenization import PlugTokenizer


class TextStream(Protocol):
    """Gives out text that no later id can change, never a part of a character."""

    def push(self, token_id: int) -> str:
        """What is complete now, beyond what was given out; "" if nothing is."""
        ...

    def flush(self) -> str:
        """What is left at the end."""
        ...


class OriginalStream:
    """`plug.tokenization.original_text`, piece by piece: runs of [UNK] are one “, `##` is removed.

    A # is held back until the next token: two of them, from whatever tokens, vanish.
    """

    def __init__(self, tokenizer: PlugTokenizer) -> None:
        self._tokenizer = tokenizer
        self._last = -1
        self._held = ""

    def push(self, token_id: int) -> str:
        if token_id == self._last == self._tokenizer.unk_token_id:
            return ""
        self._last = token_id
        shown = "“" if token_id == self._tokenizer.unk_token_id else self._token(token_id)
        text = (self._held + shown).replace("##", "")
        self._held = "#" if text.endswith("#") else ""
        return text.removesuffix("#")

    def flush(self) -> str:
        held, self._held = self._held, ""
        return held

    def _token(self, token_id: int) -> str:
        return self._tokenizer.backend.id_to_token(token_id) or ""


def text_stream(tokenizer: PlugTokenizer) -> TextStream:
    """The stream whose joined pieces are the text that `plug.generate` returns."""
    return OriginalStream(tokenizer) if tokenizer.is_original else tokenizer.decoder_stream()


class RowStreams:
    """One stream a row, for `window.write`'s ``on_token``.

    Args:
        tokenizer: of the ids.
        on_text: called with the row and each piece of its text that is not empty.
        rows: how many.
        first: added to the row that ``on_text`` is told.
    """

    def __init__(
        self,
        tokenizer: PlugTokenizer,
        on_text: Callable[[int, str], None],
        rows: int,
        first: int = 0,
    ) -> None:
        self._streams = [text_stream(tokenizer) for _ in range(rows)]
        self._on_text = on_text
        self._first = first

    def push(self, row: int, token_id: int) -> None:
        self._give(row, self._streams[row].push(token_id))

    def flush(self) -> None:
        for row, stream in enumerate(self._streams):
            self._give(row, stream.flush())

    def _give(self, row: int, piece: str) -> None:
        if piece:
            self._on_text(self._first + row, piece)

"""`Detokenizer`: the text of a sequence, piece by piece as ids come in, and its stop strings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from plug.tokenization import PlugTokenizer


class TextStream(Protocol):
    """Gives out text that no later id can change, never a part of a character."""

    def push(self, token_id: int) -> str:
        """Return what is complete now, beyond what was given out; "" if nothing is."""
        ...

    def flush(self) -> str:
        """Return what is left at the end."""
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
    """Return a stream whose joined pieces are the text that `plug.generate` returns."""
    return OriginalStream(tokenizer) if tokenizer.is_original else tokenizer.decoder_stream()


class Detokenizer:
    """The text of one sequence.

    Args:
        tokenizer: of the ids.
        on_text: called with each piece of text that no later token can change; never with "".
        stop: strings that end the text. The text ends before the first that is complete; no more
            is held back than the longest end of the text that a stop string may begin with.
        min_length: tokens in which no stop string counts, as `GenerationSettings.min_length`.
    """

    def __init__(
        self,
        tokenizer: PlugTokenizer,
        on_text: Callable[[str], None] | None = None,
        *,
        stop: Sequence[str] = (),
        min_length: int = 0,
    ) -> None:
        self._stream = text_stream(tokenizer)
        self._on_text = on_text
        self._stop = stop
        self._wait = min_length
        self._held = ""
        self._pieces: list[str] = []

    @property
    def text(self) -> str:
        """What was given out so far."""
        return "".join(self._pieces)

    def push(self, token_id: int) -> bool:
        """Add a token; True where it completes a stop string, and the text is at its end."""
        piece = self._stream.push(token_id)
        if self._wait:
            self._wait -= 1
            self._give(piece)
            return False
        return self._add(piece)

    def flush(self) -> None:
        """Give out what was held back, since no token follows."""
        if not self._add(self._stream.flush()):
            self._give(self._held)
            self._held = ""

    def _add(self, piece: str) -> bool:
        if not self._stop:
            self._give(piece)
            return False
        text = self._held + piece
        found = [(at + len(stop), at) for stop in self._stop if (at := text.find(stop)) >= 0]
        if found:
            _, at = min(found)  # the first that is complete, so that tokens' borders do not matter
            self._held = ""
            self._give(text[:at])
            return True
        length = max(_overlap(text, stop) for stop in self._stop)
        self._held = text[len(text) - length :]
        self._give(text[: len(text) - length])
        return False

    def _give(self, piece: str) -> None:
        if piece:
            self._pieces.append(piece)
            if self._on_text is not None:
                self._on_text(piece)


def _overlap(text: str, stop: str) -> int:
    """Return how many characters at the end of ``text`` are the beginning of ``stop``."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0

"""`ServedModel`: one model of the server under its name, and what it can do."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from plug.errors import UsageError
from plug.generation.settings import GenerationSettings
from plug.serving.errors import bad_request
from plug.serving.jobs import Handle, Listener, TextEngine
from plug.tokenization import PlugTokenizer

if TYPE_CHECKING:
    import plug
    from plug.generation.async_engine import EngineStats

Capability = Literal[
    "generate", "tokenize", "embeddings", "classify", "fill_mask", "tag", "answer", "questions"
]


@dataclass(slots=True)
class ServedModel:
    """A model and its ways to be used; what it lacks is None.

    Attributes:
        name: what clients call it.
        tokenizer: its own.
        max_source_tokens: of a prompt, the last ones are read.
        window_tokens: written from one encoding at most; 0 where it does not write.
        token_count: ids below it can be given as a prompt.
        engine: writes.
        encode_prompt: text to ids, for writing.
        encoder: for embeddings, zero-shot classification and masks.
        tuned: a fine-tuned model's predictions: parts of an example to a record.
        tuned_for: what those are.
        question: the source of a question that is to be written, from its answer and context.
        question_settings: how the fine-tuned model writes it.
        check_alive: False when the engine's thread has died.
        stats: what the engine has done so far.
        on_close: ends the engine.
    """

    name: str
    tokenizer: PlugTokenizer
    max_source_tokens: int
    token_count: int
    window_tokens: int = 0
    engine: TextEngine | None = None
    encode_prompt: Callable[[str], list[int]] | None = None
    encoder: plug.TextEncoder | None = None
    tuned: Callable[[Sequence[Sequence[str]]], list[dict[str, Any]]] | None = None
    tuned_for: Capability | None = None
    question: Callable[[Sequence[str]], list[int]] | None = None
    question_settings: GenerationSettings | None = None
    check_alive: Callable[[], bool] = lambda: True
    stats: Callable[[], EngineStats] | None = None
    on_close: Callable[[], None] = lambda: None
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def capabilities(self) -> tuple[Capability, ...]:
        """What it can do, as `/v1/models` tells."""
        found: list[Capability] = ["tokenize"]
        if self.engine is not None:
            found.insert(0, "generate")
        if self.encoder is not None:
            found += ["embeddings", "classify", "fill_mask"]
        if self.tuned_for is not None and self.tuned_for not in found:
            found.append(self.tuned_for)
        return tuple(found)

    @property
    def is_alive(self) -> bool:
        return self.check_alive()

    def close(self) -> None:
        self.on_close()

    def encode(self, text: str) -> list[int]:
        """Ids of a text to continue.

        Raises:
            UsageError: it is empty, or holds nothing that the model knows.
        """
        assert self.encode_prompt is not None
        return self.encode_prompt(text)

    def check_ids(self, ids: Sequence[int]) -> list[int]:
        """A prompt that was given as token ids.

        Raises:
            ApiError: there are none, or one that the vocabulary lacks.
        """
        if not ids:
            raise bad_request("prompt 是空的。请给出至少一个词元。", "prompt")
        if (largest := max(ids)) >= self.token_count:
            raise bad_request(
                f"prompt 里的词元编号 {largest} 应小于词表的大小 {self.token_count}。", "prompt"
            )
        return list(ids)

    def submit(
        self, prompt: Sequence[int], settings: GenerationSettings, seed: int, listener: Listener
    ) -> Handle:
        """As `TextEngine.submit`."""
        assert self.engine is not None
        return self.engine.submit(prompt, settings, seed, listener)

    def tokens_read(self, count: int) -> int:
        """Tokens that the encoder reads of so many."""
        return min(count, self.max_source_tokens)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids."""
        return self.tokenizer.decode(ids)

    def token_text(self, token_id: int) -> str:
        """One token as text; a byte that is no whole character as OpenAI writes it."""
        if not (raw := self.token_bytes(token_id)):
            return self.tokenizer.backend.id_to_token(token_id) or ""
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    def token_bytes(self, token_id: int) -> bytes:
        """The UTF-8 bytes that one token stands for; none of a special token."""
        if token_id in self.tokenizer.special_ids:
            return b""
        piece = self.tokenizer.backend.id_to_token(token_id) or ""
        if len(piece) == 6 and piece.startswith("<0x") and not self.tokenizer.is_original:
            return bytes([int(piece[3:5], 16)])
        return piece.removeprefix("##").encode()

    def describe(self) -> dict[str, Any]:
        """The entry of `/v1/models`."""
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "plug",
            "capabilities": list(self.capabilities),
            "max_source_tokens": self.max_source_tokens,
            "window_tokens": self.window_tokens,
            "vocab_size": self.token_count,
        }


def check_names(models: Sequence[ServedModel]) -> None:
    """Raise a `UsageError` where two models have one name."""
    names = [model.name for model in models]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"有两个模型都叫 {name}。请给它们不同的名字。")

"""`Job`: the texts of one request while an engine's thread writes them, seen from the event loop.

The engine calls back on its own thread; `Bridge` collects what it says and wakes the loop once for
all texts of a step. A job then has its new pieces, or its end.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from plug.errors import PlugError
from plug.generation.settings import GenerationSettings
from plug.serving.errors import ApiError, as_api_error

logger = logging.getLogger(__name__)

# Tokens that a client has not fetched: one that reads no further is cut off there. Beyond that the
# transport holds 64 KiB more.
MAX_UNREAD = 4096


class Alternative(NamedTuple):
    """A token that could have come, and its log-probability."""

    token_id: int
    logprob: float


class Piece(NamedTuple):
    """What a step added to a text.

    Attributes:
        text: complete characters; "" while bytes are missing or held back.
        token_ids: one or more.
        logprobs: of each token, where they were asked for.
        alternatives: the likeliest tokens in the place of each.
    """

    text: str
    token_ids: Sequence[int]
    logprobs: Sequence[float] = ()
    alternatives: Sequence[Sequence[Alternative]] = ()


class End(NamedTuple):
    """A text is done.

    Attributes:
        finish_reason: "stop" or "length"; None where it failed.
        error: why it failed.
    """

    finish_reason: str | None
    error: PlugError | None = None


Listener = Callable[[Piece | End], None]


class Handle(Protocol):
    """A text that was submitted."""

    def cancel(self) -> None:
        """Free its place with the next step; from any thread."""
        ...


class TextEngine(Protocol):
    """What writes; `engine.py` has the real one."""

    def submit(
        self, prompt: Sequence[int], settings: GenerationSettings, seed: int, listener: Listener
    ) -> Handle:
        """Have ``prompt`` continued; ``listener`` hears of it on a thread of the engine.

        Raises:
            PlugError: the engine does not take it.
        """
        ...


@dataclass(slots=True, eq=False)
class Choice:
    """One of a job's texts."""

    index: int
    prompt: Sequence[int]
    seed: int
    handle: Handle | None = None
    pieces: list[Piece] = field(default_factory=list)
    token_count: int = 0
    finish_reason: str | None = None
    is_done: bool = False
    began: bool = False
    last_token: float = 0.0

    @property
    def text(self) -> str:
        return "".join(piece.text for piece in self.pieces)

    @property
    def mean_logprob(self) -> float:
        logprobs = [each for piece in self.pieces for each in piece.logprobs]
        return sum(logprobs) / max(1, len(logprobs))


class Observer(Protocol):
    """Is told of a job's progress, on the event loop."""

    def on_tokens(self, job: Job, choice: Choice, count: int) -> None: ...

    def on_choice_end(self, choice: Choice) -> None: ...

    def on_end(self, job: Job) -> None: ...


class Job:
    """The texts of one request.

    Args:
        choices: its texts.
        observer: is told of tokens and of the end.
        streams: whether pieces are fetched as they come; otherwise only the end is waited for.
    """

    def __init__(self, choices: list[Choice], observer: Observer, *, streams: bool) -> None:
        self.choices = choices
        self.error: ApiError | None = None
        self.is_done = False
        self._observer = observer
        self._streams = streams
        self._new: list[tuple[Choice, Piece | End]] = []
        self._unread = 0
        self._waiter: asyncio.Future[None] | None = None
        self._timer: asyncio.TimerHandle | None = None

    def take(self, choice: Choice, news: Piece | End) -> None:
        """Hear of one of its texts; on the event loop."""
        if choice.is_done or self.is_done:
            return
        if isinstance(news, Piece):
            choice.token_count += len(news.token_ids)
            if not self._streams:
                choice.pieces.append(news)
            self._unread += len(news.token_ids)
            if news.token_ids:  # else it is what was held back
                self._observer.on_tokens(self, choice, len(news.token_ids))
            if self._streams and self._unread > MAX_UNREAD:
                self.stop(ApiError(408, "客户端长时间没有读取，已中断。", code="slow_client"))
                return
        else:
            self._end(choice)
            choice.finish_reason = news.finish_reason
            if news.error is not None:
                self.stop(as_api_error(news.error))
                return
            if all(each.is_done for each in self.choices):
                self._finish()
        if self._streams:
            self._new.append((choice, news))
            self.wake()
        elif self.is_done:
            self.wake()

    def stop(self, error: ApiError | None = None) -> None:
        """End it now: its texts are cancelled, and ``error`` is what its client hears."""
        if self.is_done:
            return
        self.error = error
        for choice in self.choices:
            if not choice.is_done:
                if choice.handle is not None:
                    choice.handle.cancel()
                self._end(choice)
        self._finish()
        self.wake()

    def stop_at(self, seconds: float, error: ApiError) -> None:
        """Stop it with ``error`` in so many seconds, unless it has ended by then."""
        if not self.is_done:
            self._timer = asyncio.get_running_loop().call_later(seconds, self.stop, error)

    async def news(self) -> list[tuple[Choice, Piece | End]]:
        """What is new since the last call; may be nothing after `wake`, and when all is told."""
        if not self._new and not self.is_done:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        new, self._new, self._unread = self._new, [], 0
        return new

    async def finished(self) -> None:
        """Wait for the end.

        Raises:
            ApiError: it was stopped, or the engine failed.
        """
        while not self.is_done:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        if self.error is not None:
            raise self.error

    def wake(self) -> None:
        """Have `news` return."""
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _end(self, choice: Choice) -> None:
        choice.is_done = True
        self._observer.on_choice_end(choice)

    def _finish(self) -> None:
        self.is_done = True
        if self._timer is not None:
            self._timer.cancel()
        self._observer.on_end(self)


class Bridge:
    """From an engine's thread to the event loop: everything of a step in one call."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._lock = threading.Lock()
        self._posted: deque[tuple[Job, Choice, Piece | End]] = deque()
        self._is_called = False

    def listener(self, job: Job, choice: Choice) -> Listener:
        """What to give an engine for this text."""

        def listen(news: Piece | End) -> None:
            with self._lock:
                self._posted.append((job, choice, news))
                if self._is_called:
                    return
                self._is_called = True
            try:
                self._loop.call_soon_threadsafe(self._deliver)
            except RuntimeError:  # the loop is closed: nobody listens any more
                return

        return listen

    def _deliver(self) -> None:
        with self._lock:
            posted, self._posted = self._posted, deque()
            self._is_called = False
        for job, choice, news in posted:
            try:
                job.take(choice, news)
            except Exception as error:  # a bug with one request is no matter of the others
                logger.error("a job failed: %s", type(error).__name__)
                job.stop(ApiError(500, "服务器内部出错。", code="internal_error"))

"""`Engine`: a `plug.AsyncEngine`, and beam search beside it, as the `TextEngine` of the server."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor

from plug.errors import PlugError, UsageError
from plug.generation.async_engine import AsyncEngine, EngineStats, Progress
from plug.generation.generator import Generator
from plug.generation.result import GenerationResult
from plug.generation.settings import GenerationSettings
from plug.serving.jobs import Alternative, End, Handle, Listener, Piece

# The server has a bound of its own, with an answer that says when to come back.
_NO_BOUND = 1_000_000


class Engine:
    """Writes with one model.

    Args:
        generator: the model.
        rows: texts written at once; beams come on top, one request at a time.
        max_num_batched_tokens: as in `AsyncEngine`.
    """

    def __init__(
        self, generator: Generator, rows: int, max_num_batched_tokens: int | None = None
    ) -> None:
        self.generator = generator
        self._engine = AsyncEngine(
            generator,
            rows=rows,
            max_waiting=_NO_BOUND,
            max_num_batched_tokens=max_num_batched_tokens,
        )
        self._beams = ThreadPoolExecutor(1, thread_name_prefix="plug-beams")
        self._closed = threading.Event()

    @property
    def is_alive(self) -> bool:
        return not self._engine.is_closed

    @property
    def stats(self) -> EngineStats:
        return self._engine.stats

    def submit(
        self,
        prompt: Sequence[int],
        settings: GenerationSettings,
        seed: int,
        listener: Listener,
        adapter: int = 0,
    ) -> Handle:
        """As `TextEngine.submit`, with an adapter of the generator."""
        if settings.num_beams > 1:
            return self._submit_beams(prompt, settings, seed, listener, adapter)
        return self._engine.submit(
            list(prompt),
            settings,
            seed=seed,
            listener=lambda news: _tell(listener, news),
            adapter=adapter,
        )

    def _submit_beams(
        self,
        prompt: Sequence[int],
        settings: GenerationSettings,
        seed: int,
        listener: Listener,
        adapter: int,
    ) -> Handle:
        if self.generator.is_sharded:
            raise UsageError("模型分在多个进程上时不能用束搜索。请用 num_beams=1。")
        self.generator.window(settings)  # refuses what this model cannot do
        self.generator.check_adapter(adapter)
        cancelled = threading.Event()
        work = self._beams.submit(self._search, prompt, settings, seed, cancelled, adapter)

        def done(future: Future[GenerationResult]) -> None:
            try:
                result = future.result()
            except CancelledError:
                listener(End(None, PlugError("请求已取消。")))
            except Exception as error:
                listener(End(None, error if isinstance(error, PlugError) else _explained(error)))
            else:
                listener(Piece(result.text, result.token_ids))
                listener(End(result.finish_reason))

        work.add_done_callback(done)
        return _Beams(work, cancelled)

    def _search(
        self,
        prompt: Sequence[int],
        settings: GenerationSettings,
        seed: int,
        cancelled: threading.Event,
        adapter: int,
    ) -> GenerationResult:
        pieces = self.generator.stream([list(prompt)], settings, seed=seed, adapter=adapter)
        for piece in pieces:
            if piece.result is not None:
                return piece.result
            if cancelled.is_set() or self._closed.is_set():
                break
        raise CancelledError

    def close(self) -> None:
        self._closed.set()
        self._beams.shutdown(wait=False, cancel_futures=True)
        self._engine.close()


class AdaptedEngine:
    """`Engine` with one of its adapters, as a `TextEngine`; it shares each step with the others.

    Args:
        engine: whose generator has the adapter.
        number: of the adapter.
    """

    def __init__(self, engine: Engine, number: int) -> None:
        self._engine = engine
        self._number = number

    def submit(
        self, prompt: Sequence[int], settings: GenerationSettings, seed: int, listener: Listener
    ) -> Handle:
        """As `TextEngine.submit`."""
        return self._engine.submit(prompt, settings, seed, listener, self._number)

    def close(self) -> None:
        """Drop the adapter; the engine goes on."""
        self._engine.generator.remove_adapter(self._number)


class _Beams:
    """A beam search that waits or runs."""

    def __init__(self, work: Future[GenerationResult], cancelled: threading.Event) -> None:
        self._work = work
        self._cancelled = cancelled

    def cancel(self) -> None:
        """End it: at once if it waits, else after its step."""
        self._cancelled.set()
        self._work.cancel()


def _tell(listener: Listener, news: Progress) -> None:
    if news.token_ids or news.text:
        logprobs = [each.logprob for each in news.logprobs]
        alternatives = [[Alternative(*pair) for pair in each.top] for each in news.logprobs]
        listener(Piece(news.text, news.token_ids, logprobs, alternatives))
    if news.result is not None:
        listener(End(news.result.finish_reason))
    elif news.error is not None:
        listener(End(None, news.error))


def _explained(error: Exception) -> PlugError:
    explained = PlugError(f"这个请求出错了（{type(error).__name__}）。")
    explained.__cause__ = error
    return explained

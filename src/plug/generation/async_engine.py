"""`AsyncEngine`: texts from many threads written together; each joins and leaves between steps.

One thread steps a `Writer`; who submits gets a `Request`, an iterator of the text's pieces. First
come, first served: a waiting text joins as soon as a row is free, whatever the others do. What a
text becomes does not depend on who shares the batch.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Iterator
from types import TracebackType

import torch

from plug.errors import PlugError, UsageError
from plug.generation.detokenizer import text_stream
from plug.generation.generator import DEFAULTS, GenerationResult, Generator
from plug.generation.scheduler import Row, Writer
from plug.generation.settings import GenerationSettings
from plug.generation.window import window_length


class Request:
    """A text that was submitted. Iterating gives its pieces as they are written.

    A consumer that goes away should call `cancel`, or use the request as a context manager; a
    request that nobody refers to any more is cancelled too.
    """

    def __init__(self, work: _Work) -> None:
        self._work = work

    def __iter__(self) -> Iterator[str]:
        while (piece := self._work.pieces.get()) is not None:
            yield piece
        self._work.pieces.put(None)  # for whoever iterates again
        if self._work.error is not None:
            raise self._work.error

    def result(self) -> GenerationResult:
        """Wait for the whole.

        Raises:
            PlugError: it was cancelled, or the batcher was closed or failed.
        """
        for _ in self:
            pass
        assert self._work.result is not None
        return self._work.result

    def cancel(self) -> None:
        """Stop writing it; its place is free with the next step. Nothing happens if it is done."""
        self._work.cancelled = True

    def __enter__(self) -> Request:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.cancel()

    def __del__(self) -> None:
        self.cancel()


class _Work:
    """What the batcher keeps of a request; it knows no `Request`, so that those can be missed."""

    def __init__(self, row: Row, generator: Generator) -> None:
        self.row = row
        self.pieces: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self.cancelled = False
        self.error: PlugError | None = None
        self.result: GenerationResult | None = None
        self._stream = text_stream(generator.tokenizer)
        self._text: list[str] = []
        self._began = time.perf_counter()
        row.on_token = self._push

    def _push(self, token_id: int) -> None:
        self._give(self._stream.push(token_id))

    def _give(self, piece: str) -> None:
        if piece:
            self._text.append(piece)
            self.pieces.put(piece)

    def finish(self) -> None:
        self._give(self._stream.flush())
        row = self.row
        assert row.finish_reason is not None
        self.result = GenerationResult(
            text="".join(self._text),
            token_ids=tuple(row.written),
            prompt_token_count=len(row.prompt),
            finish_reason=row.finish_reason,
            seed=row.seed,
            seconds=time.perf_counter() - self._began,
        )
        self.pieces.put(None)

    def fail(self, error: PlugError) -> None:
        self.error = error
        self.pieces.put(None)


class AsyncEngine:
    """Writes what any thread submits. A context manager; leaving it cancels what is not done.

    Args:
        generator: its engine is used by this batcher alone while it is open.
        rows: texts written at once at most.
        max_waiting: texts that may wait for a row.
        capacity: tokens from one encoding at most; None is as many as `generate` uses by default.
            With ``rows`` it decides the memory of the caches.

    Raises:
        UsageError: a value is out of range, or the model is shared out among processes, which
            would have to see the same requests between the same steps.
    """

    def __init__(
        self,
        generator: Generator,
        *,
        rows: int = 8,
        max_waiting: int = 64,
        capacity: int | None = None,
    ) -> None:
        for name, value in (("rows", rows), ("max_waiting", max_waiting), ("capacity", capacity)):
            if value is not None and (isinstance(value, bool) or value < 1):
                raise UsageError(f"{name}={value!r} 应是不小于 1 的整数。")
        if generator.is_shared_out:
            raise UsageError("多个进程的模型不能用于随到随写（AsyncEngine）。请用一个进程。")
        longest = generator.config.max_position_embeddings
        self._capacity = min(capacity or window_length(generator.config, DEFAULTS), longest)
        self._generator = generator
        self._rows = rows
        self._max_waiting = max_waiting
        self._waiting: deque[_Work] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="plug-batcher", daemon=True)
        self._thread.start()

    def submit(
        self,
        text: str,
        settings: GenerationSettings = DEFAULTS,
        *,
        seed: int | None = None,
        allow_special_tokens: bool = False,
    ) -> Request:
        """Have ``text`` continued; from any thread. Arguments as in `generate`.

        Raises:
            UsageError: `generate` would refuse it, it asks for beams, or for a window longer than
                the caches.
            PlugError: too many are waiting, or the batcher is closed.
        """
        generator = self._generator
        if settings.num_beams > 1:
            raise UsageError("束搜索不能和别的请求一起写。请用 num_beams=1，或 plug.generate。")
        asked = settings.window
        if asked is not None and min(asked, settings.out_length) > self._capacity:
            raise UsageError(
                f"window={asked} 超过缓存的长度 {self._capacity}。"
                "请取更小的 window（out_length 不受限）。"
            )
        window = min(window_length(generator.config, settings), self._capacity)
        [checked_seed] = generator.seeds(seed, 1)
        prompt = generator.encode(text, allow_special_tokens)
        work = _Work(
            Row(prompt, generator.rules(window, settings), settings, checked_seed), generator
        )
        with self._changed:
            if self._closed:
                raise PlugError("已经关闭，不再接受请求。")
            if len(self._waiting) >= self._max_waiting:
                raise PlugError(f"等待的请求已有 {self._max_waiting} 个，满了。请稍后再试。")
            self._waiting.append(work)
            self._changed.notify()
        return Request(work)

    def close(self) -> None:
        """Cancel what is not done, and wait until the thread is gone."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def __enter__(self) -> AsyncEngine:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _run(self) -> None:
        working: dict[Row, _Work] = {}
        error = PlugError("请求没有写完就关闭了。")
        try:
            with torch.inference_mode():
                writer = Writer(self._generator.engine, self._rows, self._capacity)
                while self._admit(writer, working):
                    for row in writer.step():
                        working.pop(row).finish()
        except Exception as failure:
            error = PlugError(f"写作的线程出错：{failure}。请重新建立 AsyncEngine。")
            raise
        finally:
            with self._changed:
                self._closed = True
                left = [*working.values(), *self._waiting]
                self._waiting.clear()
            for work in left:
                work.fail(error)

    def _admit(self, writer: Writer, working: dict[Row, _Work]) -> bool:
        """Let cancelled ones go and waiting ones in; False when closed. Waits while idle."""
        gone = [work for work in working.values() if work.cancelled]
        writer.leave([work.row for work in gone])
        for work in gone:
            del working[work.row]
            work.fail(PlugError("请求已取消。"))
        with self._changed:
            while True:
                for work in [each for each in self._waiting if each.cancelled]:
                    self._waiting.remove(work)
                    work.fail(PlugError("请求已取消。"))
                while self._waiting and not writer.is_full:
                    work = self._waiting.popleft()
                    working[work.row] = work
                    writer.join(work.row)
                if self._closed or writer.rows:
                    return not self._closed
                self._changed.wait()

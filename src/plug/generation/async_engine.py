"""`AsyncEngine`: continuous batching of requests from many threads.

One thread drives a `Scheduler` and a `ModelRunner`; sequences join and leave between two steps.
First come, first served: a waiting request joins as soon as a slot is free. What is written for a
request does not depend on the others, up to the rounding of sums ("Alone and in a batch" in
`docs/generation.md`). A request that fails does so alone.
"""

from __future__ import annotations

import atexit
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from plug.distributed.processes import Line
from plug.errors import PlugError, UsageError
from plug.generation.generator import Generator, Prompt, result_of
from plug.generation.model_runner import ModelRunner, Size
from plug.generation.result import GenerationResult
from plug.generation.scheduler import Scheduler
from plug.generation.sequence import Sequence as WrittenSequence
from plug.generation.sequence import TokenLogprobs
from plug.generation.settings import GenerationSettings
from plug.generation.window import prompt_limit, window_length

logger = logging.getLogger(__name__)

# Source tokens that a step encodes, at most, unless told otherwise. What runs waits for them: on a
# CPU as long as for some steps. A card waits for the host while requests are let in, so that more
# of them join at once (docs/experiments.md).
_ENCODED_AT_ONCE = {"cpu": 256, "cuda": 16_384}
# How long a text may wait for others that come, so that they are encoded together (`_gathers`).
_GATHER_SECONDS = {"cpu": 0.0, "cuda": 0.05}


class Request:
    """A submitted text. Iterating gives its pieces as they are written.

    A consumer that goes away should call `cancel`, or use the request as a context manager. A
    request that is garbage-collected is cancelled too.
    """

    def __init__(self, work: _Work) -> None:
        self._work = work

    def __iter__(self) -> Iterator[str]:
        return self._pieces(None)

    def _pieces(self, end: float | None) -> Iterator[str]:
        """The pieces still to come; ``end`` is when to give up, by `time.monotonic`."""
        work = self._work
        while True:
            left = None if end is None else max(0.0, end - time.monotonic())
            try:
                piece = work.pieces.get(timeout=left)
            except queue.Empty:
                raise TimeoutError("等待的时间到了，这个请求还没有写完。") from None
            if piece is None:
                break
            yield piece
        work.pieces.put(None)  # for whoever iterates again
        if work.error is not None:
            raise work.error

    def result(self, timeout: float | None = None) -> GenerationResult:
        """Wait for the whole text, and return its result.

        Args:
            timeout: seconds to wait at most; None waits without end.

        Raises:
            PlugError: the request failed or was cancelled, or the engine was closed.
            TimeoutError: the text is not finished yet. The request goes on: ask again, or cancel.
        """
        for _ in self._pieces(None if timeout is None else time.monotonic() + timeout):
            pass
        assert self._work.result is not None
        return self._work.result

    def cancel(self) -> None:
        """Stop writing; the slot is free with the next step. A finished request stays as it is."""
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


class Progress(NamedTuple):
    """What a listener is told of a request: after each step that wrote something, and at its end.

    Attributes:
        text: that no later token can change; "" while a character or a stop string is incomplete.
        token_ids: written since the last report.
        logprobs: of each of them, where the settings ask for it.
        result: of the whole, in the last report of a text that was finished.
        error: in the last report of one that was not.
    """

    text: str
    token_ids: Sequence[int] = ()
    logprobs: Sequence[TokenLogprobs] = ()
    result: GenerationResult | None = None
    error: PlugError | None = None


Listener = Callable[[Progress], None]


class EngineStats(NamedTuple):
    """What an engine has done so far, and holds now.

    Attributes:
        steps: decoding steps, each of all running sequences.
        encoder_seconds: spent on encoding sources.
        decoder_seconds: spent on the rest of the steps.
        cache_bytes: of the decoder's cache and of kept sources.
    """

    steps: int
    encoder_seconds: float
    decoder_seconds: float
    cache_bytes: int


class _Work:
    """The engine's side of a request. It holds no `Request`, so that a dropped one is collected.

    Args:
        listener: told of the progress, in place of `pieces`.
    """

    def __init__(self, listener: Listener | None) -> None:
        self.listener = listener
        self.pieces: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self.cancelled = False
        self.error: PlugError | None = None
        self.result: GenerationResult | None = None
        self.began = time.perf_counter()
        self.sequence: WrittenSequence
        self._new_text: list[str] = []
        self._reported = 0

    def add_text(self, piece: str) -> None:
        """Take a piece of the text; called by the sequence's detokenizer."""
        if self.listener is None:
            self.pieces.put(piece)
        else:
            self._new_text.append(piece)

    def report(self) -> None:
        """Tell the listener of what was written since the last report."""
        if self.listener is not None and len(self.sequence.written) > self._reported:
            self.listener(self._progress())

    def _progress(
        self, result: GenerationResult | None = None, error: PlugError | None = None
    ) -> Progress:
        new = slice(self._reported, None)
        self._reported = len(self.sequence.written)
        text = "".join(self._new_text)
        self._new_text.clear()
        sequence = self.sequence
        return Progress(text, sequence.written[new], sequence.logprobs[new], result, error)

    def finish(self) -> None:
        """Hand over the result of the finished sequence, or its error."""
        try:
            self.result = result_of(self.sequence, self.began)
            self._end()
        except Exception as error:
            self.fail(error if isinstance(error, PlugError) else _explained(error))

    def fail(self, error: PlugError) -> None:
        self.error = error
        self._end()

    def _end(self) -> None:
        if self.listener is None:
            self.pieces.put(None)
        else:
            self.listener(self._progress(self.result, self.error))


def _explained(error: Exception) -> PlugError:
    explained = PlugError(f"这个请求出错了（{type(error).__name__}：{error}）。别的请求不受影响。")
    explained.__cause__ = error
    return explained


class AsyncEngine:
    """Writes what any thread submits. A context manager; leaving it cancels what is not done.

    Args:
        generator: may serve other calls at the same time; or the name or directory of a model, as
            `Generator` takes it.
        rows: sequences written at once, at most.
        max_waiting: requests that may wait for a slot.
        capacity: steps from one encoding, at most; None is as many as `generate` uses by default.
            With ``rows`` it decides the memory of the caches.
        max_num_batched_tokens: source tokens of the requests that join in one step, at most; a
            longer source joins alone. Requests that came together so begin one after the other, and
            what runs never waits for all their sources. None is 256 on a CPU, else 16384.

    Raises:
        UsageError: a value is out of range.
    """

    def __init__(
        self,
        generator: Generator | str | Path,
        *,
        rows: int = 8,
        max_waiting: int = 64,
        capacity: int | None = None,
        max_num_batched_tokens: int | None = None,
    ) -> None:
        for name, value in (
            ("rows", rows),
            ("max_waiting", max_waiting),
            ("capacity", capacity),
            ("max_num_batched_tokens", max_num_batched_tokens),
        ):
            if value is not None and (isinstance(value, bool) or value < 1):
                raise UsageError(f"{name}={value!r} 应是不小于 1 的整数。")
        if isinstance(generator, (str, Path)):
            generator = Generator(generator)
        elif not isinstance(generator, Generator):
            raise UsageError(
                f"AsyncEngine 要一个 plug.Generator，或模型的名字或目录，而不是"
                f" {type(generator).__name__}。"
            )
        self._size = _size(generator, rows, capacity)
        self._line = Line() if generator.is_sharded else None
        self._generator = generator
        self._max_waiting = max_waiting
        device = generator.prepared.device.type
        self._encoded_at_once = max_num_batched_tokens or _ENCODED_AT_ONCE[device]
        self._gather_seconds = _GATHER_SECONDS[device]
        self._seen = 0  # of `_waiting`, when `_gathers` looked last
        self._waiting: deque[_Work] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._runner: ModelRunner | None = None
        self._steps = 0
        self._busy = self._encoding = 0.0  # seconds
        self._counted = 0.0  # seconds of the runner's encoding that `_encoding` has
        self._thread = threading.Thread(target=self._run, name="plug-async-engine", daemon=True)
        self._thread.start()
        # Python ends threads in the middle of C++ when it ends, which aborts the process.
        atexit.register(self.close)

    def submit(
        self,
        text: Prompt,
        settings: GenerationSettings | None = None,
        *,
        seed: int | None = None,
        allow_special_tokens: bool = False,
        listener: Listener | None = None,
        adapter: int = 0,
        **changes: Any,
    ) -> Request:
        """Have ``text`` continued; from any thread. Arguments as in `generate`.

        Texts with different adapters (`Generator.add_adapter`) and without one share each step.

        A ``listener`` is called on the engine's thread after each step (`Progress`); it must
        return at once and not raise. The request then has no pieces to iterate over.

        Raises:
            UsageError: `generate` would refuse it, or it asks for beams, several texts, or a window
                longer than the caches.
            PlugError: too many requests are waiting, or the engine is closed.
        """
        generator = self._generator
        settings = GenerationSettings.of(settings, **changes)
        if settings.num_beams > 1:
            raise UsageError("束搜索不能与别的请求同批写。请用 num_beams=1，或 plug.generate。")
        if (count := settings.num_return_sequences) > 1:
            raise UsageError(
                f"一个请求写一段，不能用 num_return_sequences={count}。"
                f"请提交 {count} 次，各用一个 seed。"
            )
        asked = settings.window
        if asked is not None and min(asked, settings.out_length) > self._size.window:
            raise UsageError(
                f"window={asked} 超过缓存的长度 {self._size.window}。"
                "请取更小的 window（out_length 不受限）。"
            )
        window = min(generator.window(settings), self._size.window)
        [checked_seed] = generator.seeds(seed, 1)
        prompt = generator.encode(text, allow_special_tokens, settings.simplify)
        generator.check_adapter(adapter)
        work = _Work(listener)
        work.sequence = generator.sequence(
            prompt, window, settings, checked_seed, work.add_text, adapter
        )
        with self._changed:
            if self._closed:
                raise PlugError("已经关闭，不再接受请求。")
            if len(self._waiting) >= self._max_waiting:
                raise PlugError(f"等待的请求已有 {self._max_waiting} 个，满了。请稍后再试。")
            self._waiting.append(work)
            self._changed.notify()
        return Request(work)

    @property
    def stats(self) -> EngineStats:
        """What was done so far; from any thread."""
        runner = self._runner
        cache = None if runner is None else runner.cache
        held = self._generator.prepared.encoder_cache.num_bytes
        held += 0 if cache is None else cache.num_bytes
        decoding = max(0.0, self._busy - self._encoding)
        return EngineStats(self._steps, self._encoding, decoding, held)

    @property
    def is_closed(self) -> bool:
        """Whether it takes no more requests: it was closed, or its thread has failed."""
        return self._closed

    def close(self) -> None:
        """Cancel what is not done, and wait until the thread has ended."""
        atexit.unregister(self.close)
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
        """Drive steps until `close`. A step that fails ends its requests, and no others."""
        working: dict[WrittenSequence, _Work] = {}
        error = PlugError("请求没有写完就关闭了。")
        try:
            scheduler, runner = self._begin()
            while self._admit(scheduler, working):
                began = time.perf_counter()
                try:
                    finished = scheduler.update(runner.step(scheduler.plan()))
                    self._count(began, runner)
                except Exception as failure:
                    if self._line is not None:  # where the others are now nobody knows
                        raise
                    logger.exception("连续批处理的一步出错，其中 %d 个请求失败。", len(working))
                    for work in working.values():
                        work.fail(PlugError(f"写作时出错：{failure}。请重新提交。"))
                    working.clear()
                    del runner
                    self._runner = None  # its memory is free before the next one's is taken
                    scheduler, runner = self._begin()
                    continue
                for sequence in finished:
                    working.pop(sequence).finish()
                for work in working.values():
                    work.report()
            if self._line is not None:
                self._line.send(None)
        except Exception as failure:
            error = PlugError(f"连续批处理的线程出错：{failure}。请重新建立 AsyncEngine。")
            raise
        finally:
            with self._changed:
                self._closed = True
                left = [*working.values(), *self._waiting]
                self._waiting.clear()
            for work in left:
                work.fail(error)

    def _count(self, began: float, runner: ModelRunner) -> None:
        self._steps += 1
        self._busy += time.perf_counter() - began
        encoding = runner.encoder_seconds
        self._encoding += encoding - self._counted
        self._counted = encoding

    def _begin(self) -> tuple[Scheduler, ModelRunner]:
        runner = ModelRunner(self._generator.prepared, self._size)
        self._runner, self._counted = runner, 0.0
        return Scheduler(self._size.slots, ahead=runner.ahead), runner

    def _admit(self, scheduler: Scheduler, working: dict[WrittenSequence, _Work]) -> bool:
        """Let cancelled requests go and waiting ones in; False when closed. Waits while idle."""
        gone = [work for work in working.values() if work.cancelled]
        news = News([scheduler.running.index(work.sequence) for work in gone], [])
        scheduler.leave([work.sequence for work in gone])
        for work in gone:
            del working[work.sequence]
            work.fail(PlugError("请求已取消。"))
        with self._changed:
            while True:
                for work in [each for each in self._waiting if each.cancelled]:
                    self._waiting.remove(work)
                    work.fail(PlugError("请求已取消。"))
                if not self._gathers(scheduler):
                    news.joined.extend(self._join(scheduler, working))
                if self._closed or scheduler.running:
                    break
                self._changed.wait()
        if self._closed:
            return False
        if self._line is not None:
            self._line.send(news)
        return True

    def _gathers(self, scheduler: Scheduler) -> bool:
        """Whether those that wait do so for one more step, since others come meanwhile.

        On a GPU the host takes nearly as long for one source as for many that are encoded together,
        and what follows texts that end together comes one by one.
        """
        earlier, self._seen = self._seen, len(self._waiting)
        if not self._gather_seconds or not scheduler.running or self._seen <= earlier:
            return False
        slots = self._size.slots - len(scheduler.running)
        tokens = sum(len(work.sequence.source) for work in self._waiting)
        is_enough = self._seen >= slots or tokens >= self._encoded_at_once
        waited = time.perf_counter() - self._waiting[0].began
        return not is_enough and waited < self._gather_seconds

    def _join(
        self, scheduler: Scheduler, working: dict[WrittenSequence, _Work]
    ) -> Iterator[Joined]:
        """Let the first ones in, as far as there are slots and tokens to encode; yield them."""
        left, read = self._encoded_at_once, None
        while self._waiting and not scheduler.is_full:
            sequence = self._waiting[0].sequence
            # Several texts of one prompt come one after the other, and share its encoding.
            source = sequence.adapter, sequence.source
            left -= 0 if source == read else len(sequence.source)
            if left < 0 and read is not None:
                break
            read = source
            work = self._waiting.popleft()
            working[work.sequence] = work
            scheduler.join(work.sequence)
            yield Joined(
                list(sequence.prompt), sequence.rules.window, sequence.settings, sequence.seed
            )
        self._seen = len(self._waiting)


class Joined(NamedTuple):
    """A text that joins; arguments of `Generator.sequence`."""

    prompt: list[int]
    window: int
    settings: GenerationSettings
    seed: int


class News(NamedTuple):
    """What changes before a step: the numbers of those that leave, and those that join then."""

    gone: list[int]
    joined: list[Joined]


def follow(generator: Generator, *, rows: int, capacity: int | None = None) -> None:
    """Take part in the steps of an `AsyncEngine`, in every process but the first, until it closes.

    All processes compute the same logits and draw the same tokens. So the first one sends only who
    joins and who leaves.

    Args:
        generator: this process's share of the model.
        rows: of the `AsyncEngine`, as is the next.
        capacity: see ``rows``.

    Raises:
        RuntimeError: the first process is gone.
    """
    size, line = _size(generator, rows, capacity), Line()
    runner = ModelRunner(generator.prepared, size)
    scheduler = Scheduler(size.slots, ahead=runner.ahead)
    while (news := line.receive()) is not None:
        scheduler.leave([scheduler.running[index] for index in news.gone])
        for each in news.joined:
            scheduler.join(generator.sequence(*each))
        scheduler.update(runner.step(scheduler.plan()))


def _size(generator: Generator, rows: int, capacity: int | None) -> Size:
    config = generator.config
    longest = config.max_position_embeddings
    window = min(capacity or window_length(config, GenerationSettings()), longest)
    return Size(rows, prompt_limit(config) + 2, window)

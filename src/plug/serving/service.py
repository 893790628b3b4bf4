"""`Service`: the models of a server and the work that is under way; what the routes stand on."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from plug.errors import PlugError
from plug.generation.settings import GenerationSettings
from plug.serving.admission import Admission
from plug.serving.errors import ApiError, as_api_error, bad_request
from plug.serving.jobs import Bridge, Choice, Job
from plug.serving.metrics import Metrics
from plug.serving.models import Capability, ServedModel
from plug.serving.protocol import field_of
from plug.serving.record import Record
from plug.serving.settings import ServeSettings

T = TypeVar("T")
Loader = Callable[[str, Path], ServedModel]

_INLINE_CHARS = 2048  # longer texts are tokenised in a thread, so that streams do not wait for it


class Service:
    """What a server knows and does; every method runs on its event loop.

    Args:
        models: by their names; the first is used where a request names none.
        settings: of the server.
        metrics: where it counts.
        loader: makes a model of a name and a directory, for `load`.
    """

    def __init__(
        self,
        models: Sequence[ServedModel],
        settings: ServeSettings,
        metrics: Metrics,
        loader: Loader | None = None,
    ) -> None:
        self.models = {model.name: model for model in models}
        self.settings = settings
        self.metrics = metrics
        self.admission = Admission(settings)
        self.jobs: dict[Job, Record] = {}
        self._loader = loader
        self._loaded: set[str] = set()
        self._loading = asyncio.Lock()
        self._bridge: Bridge | None = None
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="plug-understanding")
        self._tokenizing = ThreadPoolExecutor(1, thread_name_prefix="plug-tokenizing")
        self._add_gauges()

    # --- models -----------------------------------------------------------------------------------

    def find(self, name: str | None, capability: Capability, record: Record) -> ServedModel:
        """The model that a request asks for.

        Raises:
            ApiError: there is none of that name, or it cannot do what is asked.
        """
        if name is None:
            able = [each for each in self.models.values() if capability in each.capabilities]
            if not able:
                raise ApiError(
                    404,
                    f"这里没有能做 {capability} 的模型。请用 /v1/models 看各模型能做什么。",
                    code="model_not_found",
                    param="model",
                )
            model = able[0]
        elif name in self.models:
            model = self.models[name]
        else:
            raise self._not_found(name)
        if capability not in model.capabilities:
            raise bad_request(
                f"模型 {model.name} 不能做 {capability}，它能做 {'、'.join(model.capabilities)}。",
                "model",
                "model_not_capable",
            )
        record.model = model.name
        return model

    def _not_found(self, name: str) -> ApiError:
        return ApiError(
            404,
            f"没有模型 {name[:100]}。可用的有：{'、'.join(self.models)}。",
            code="model_not_found",
            param="model",
        )

    async def load(self, name: str) -> ServedModel:
        """Load a subdirectory of `models_dir`.

        Raises:
            ApiError: that is not allowed, there is a model of that name, or none to be loaded.
        """
        folder = self.settings.models_dir
        if folder is None or self._loader is None:
            raise ApiError(
                403,
                "这个服务没有打开运行时载入。请用 --models-dir 目录 启动。",
                code="loading_disabled",
            )
        if name in self.models:
            raise bad_request(f"已有模型 {name}。请先用 /v1/models/unload 去掉它。", "name")
        directory = Path(folder) / name
        if not directory.is_dir():
            raise ApiError(
                404, f"--models-dir 里没有目录 {name}。", code="model_not_found", param="name"
            )
        async with self._loading:
            if name in self.models:
                raise bad_request(f"已有模型 {name}。", "name")
            loader, loop = self._loader, asyncio.get_running_loop()
            model = await loop.run_in_executor(
                self._threads, _translated, lambda: loader(name, directory)
            )
            self.models[name] = model
            self._loaded.add(name)
        return model

    async def unload(self, name: str) -> None:
        """Take nothing more for a model that `load` loaded; it is closed when its texts are done.

        Raises:
            ApiError: there is no such model, or it was there from the start.
        """
        if name not in self._loaded:
            raise ApiError(
                404,
                f"没有用 /v1/models/load 载入过模型 {name[:100]}。",
                code="model_not_found",
                param="name",
            )
        self._loaded.discard(name)
        model = self.models.pop(name)
        # Another model may have the name by the time that these are done.
        left = {job for job, record in self.jobs.items() if record.model == name}
        while left & self.jobs.keys():
            await asyncio.sleep(0.05)
        await asyncio.get_running_loop().run_in_executor(self._threads, model.close)

    @property
    def is_alive(self) -> bool:
        """Whether every model's engine still runs."""
        return all(model.is_alive for model in self.models.values())

    # --- writing ----------------------------------------------------------------------------------

    async def encode(self, model: ServedModel, text: str, param: str = "prompt") -> list[int]:
        """Token ids of a text to continue.

        Args:
            model: that continues it.
            text: what it is.
            param: the field that it comes from, for errors.

        Raises:
            ApiError: it is empty, too long, or has nothing that the vocabulary knows.
        """
        self.check_length(text, param)
        try:
            if len(text) <= _INLINE_CHARS:
                return _translated(lambda: model.encode(text))
            return await self.tokenize(lambda: model.encode(text))
        except ApiError as error:
            error.param = param
            raise

    async def tokenize(self, work: Callable[[], T]) -> T:
        """Run ``work`` in the thread for tokenising.

        Raises:
            ApiError: ``work`` refuses its input.
        """
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._tokenizing, _translated, work)

    def check_length(self, text: str, param: str = "prompt") -> None:
        """Raise an `ApiError` where a text is longer than the server takes."""
        if len(text) > self.settings.max_prompt_chars:
            raise bad_request(
                f"{param} 有 {len(text)} 个字，超过上限 {self.settings.max_prompt_chars}。请截短。",
                param,
                "context_length_exceeded",
            )

    def start(
        self,
        model: ServedModel,
        prompts: Sequence[tuple[Sequence[int], int]],
        settings: GenerationSettings,
        record: Record,
        *,
        streams: bool,
    ) -> Job:
        """Have prompts continued, each with its seed.

        Raises:
            ApiError: there is no room, the engine refuses, or the model was unloaded meanwhile.
        """
        if self.models.get(model.name) is not model:
            raise self._not_found(model.name)
        if self._bridge is None:
            self._bridge = Bridge(asyncio.get_running_loop())
        choices = [Choice(index, ids, seed) for index, (ids, seed) in enumerate(prompts)]
        self.admission.enter([model.tokens_read(len(choice.prompt)) for choice in choices])
        job = Job(choices, _Observer(self, model), streams=streams)
        self.jobs[job] = record
        try:
            for choice in choices:
                listener = self._bridge.listener(job, choice)
                choice.handle = model.submit(choice.prompt, settings, choice.seed, listener)
        except PlugError as error:
            job.stop()
            refused = as_api_error(error)
            refused.param = field_of(str(error))
            raise refused from None
        except BaseException:
            job.stop()
            raise
        spent = time.perf_counter() - record.began
        job.stop_at(max(0.0, self.settings.request_timeout - spent), self.timed_out())
        return job

    def timed_out(self) -> ApiError:
        """The error of a request whose time is over."""
        return ApiError(
            504,
            f"请求超过了 {self.settings.request_timeout:g} 秒。请减小 max_tokens，或稍后再试。",
            code="request_timeout",
        )

    # --- understanding ----------------------------------------------------------------------------

    async def compute(self, tokens: int, work: Callable[[], T]) -> T:
        """Run ``work`` in the thread for understanding, one after another.

        Args:
            tokens: that it reads, for the bound of the queue.
            work: uses a model.

        Raises:
            ApiError: there is no room, the time is over, or ``work`` refuses its input.
        """
        self.admission.enter([tokens])
        began = False

        def run() -> T:
            loop.call_soon_threadsafe(begin)
            return work()

        def begin() -> None:
            nonlocal began
            if not left:
                began = True
                self.admission.begin(tokens)

        left = False
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self.settings.request_timeout):
                return await loop.run_in_executor(self._threads, _translated, run)
        except TimeoutError:
            raise self.timed_out() from None
        finally:
            left = True
            self.admission.leave(tokens, began=began)

    # --- the end ----------------------------------------------------------------------------------

    async def drain(self) -> None:
        """Take nothing new, and wait for what runs; what is left after the time is cut."""
        self.admission.is_draining = True
        deadline = time.monotonic() + self.settings.shutdown_timeout
        while self.is_busy and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
        for job in list(self.jobs):
            job.stop(ApiError(503, "服务器关闭，这次写作没有写完。请重试。", code="shutting_down"))

    @property
    def is_busy(self) -> bool:
        return bool(self.admission.running or self.admission.waiting)

    def close(self) -> None:
        """End the engines' threads."""
        for model in self.models.values():
            model.close()
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._tokenizing.shutdown(wait=False, cancel_futures=True)

    def _add_gauges(self) -> None:
        metrics, admission = self.metrics, self.admission
        metrics.gauge(
            "plug_running_texts", "Texts being worked on now", lambda: float(admission.running)
        )
        metrics.gauge("plug_waiting_texts", "Texts in the queue", lambda: float(admission.waiting))
        metrics.gauge(
            "plug_waiting_source_tokens",
            "Source tokens in the queue",
            lambda: float(admission.waiting_tokens),
        )
        metrics.gauge(
            "plug_cache_bytes",
            "Bytes of decoder caches and kept sources",
            lambda: self._sum("cache_bytes"),
        )
        metrics.total("plug_steps", "Decoding steps", lambda: self._sum("steps"))
        metrics.total(
            "plug_encoder_seconds",
            "Seconds of engines spent on encoding",
            lambda: self._sum("encoder_seconds"),
        )
        metrics.total(
            "plug_decoder_seconds",
            "Seconds of engines spent on decoding",
            lambda: self._sum("decoder_seconds"),
        )

    def _sum(self, name: str) -> float:
        """Of all engines' stats."""
        models = list(self.models.values())
        return sum(float(getattr(each.stats(), name)) for each in models if each.stats is not None)


class _Observer:
    """Keeps the counts while a job is written."""

    def __init__(self, service: Service, model: ServedModel) -> None:
        self._service = service
        self._model = model

    def on_tokens(self, job: Job, choice: Choice, count: int) -> None:
        now = time.perf_counter()
        service, record = self._service, self._service.jobs[job]
        if choice.began:
            # Tokens of one step (prompt lookup) come together; each took its share of the time.
            service.metrics.time_between_tokens.observe((now - choice.last_token) / count)
        else:
            choice.began = True
            service.admission.begin(self._model.tokens_read(len(choice.prompt)))
            if record.first_token is None:
                record.first_token = now
                service.metrics.time_to_first_token.observe(now - record.began)
        choice.last_token = now
        record.completion_tokens += count

    def on_choice_end(self, choice: Choice) -> None:
        tokens = self._model.tokens_read(len(choice.prompt))
        self._service.admission.leave(tokens, began=choice.began)

    def on_end(self, job: Job) -> None:
        service = self._service
        record = service.jobs.pop(job)
        metrics = service.metrics
        metrics.request_seconds.observe(time.perf_counter() - record.began)
        metrics.request_prompt_tokens.observe(record.prompt_tokens)
        metrics.request_completion_tokens.observe(record.completion_tokens)
        metrics.prompt_tokens.inc(record.prompt_tokens)
        metrics.completion_tokens.inc(record.completion_tokens)


def _translated(work: Callable[[], T]) -> T:
    """The result of ``work``; errors of the package become answers."""
    try:
        return work()
    except PlugError as error:
        raise as_api_error(error) from None

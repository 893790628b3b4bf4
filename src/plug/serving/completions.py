"""`/v1/completions` and `/v1/chat/completions`: requests to jobs, texts to OpenAI's answers."""

from __future__ import annotations

import asyncio
import secrets
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from fastapi import Request, Response
from starlette.responses import JSONResponse

import plug
from plug.generation.detokenizer import text_stream
from plug.generation.settings import GenerationSettings
from plug.serving.errors import bad_request
from plug.serving.guard import ClientGone, record_of
from plug.serving.jobs import Choice, End, Job, Piece
from plug.serving.models import ServedModel
from plug.serving.protocol import (
    ChatBody,
    CompletionBody,
    GenerationBody,
    dumps,
    fold_messages,
    header_text,
    usage,
)
from plug.serving.record import Record
from plug.serving.service import Service
from plug.serving.streaming import EventStream, disconnected

DONE = b"data: [DONE]\n\n"


@dataclass(slots=True)
class Reply:
    """What answers of one request have in common."""

    model: ServedModel
    record: Record
    is_chat: bool
    logprobs: int | None  # alternatives of each token; None: no log-probabilities at all
    echo: bool = False
    best_of: int = 1
    n: int = 1
    include_usage: bool = False
    continuous_usage: bool = False
    timings: bool = False
    warnings: list[str] = field(default_factory=list)
    created: int = field(default_factory=lambda: int(time.time()))
    id: str = ""

    def __post_init__(self) -> None:
        self.id = f"{'chatcmpl' if self.is_chat else 'cmpl'}-{uuid.uuid4().hex}"

    @property
    def headers(self) -> dict[str, str]:
        return {"X-Plug-Warning": "; ".join(self.warnings)} if self.warnings else {}

    def head(self, *, is_chunk: bool) -> dict[str, Any]:
        """The fields before the choices."""
        kind = "text_completion"
        if self.is_chat:
            kind = "chat.completion.chunk" if is_chunk else "chat.completion"
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model.name,
            "system_fingerprint": f"plug-{plug.__version__}",
        }

    def seconds(self) -> dict[str, Any]:
        """The seconds of this request, if they were asked for."""
        if not self.timings:
            return {}
        record, now = self.record, time.perf_counter()
        first = record.first_token or now
        return {
            "timings": {
                "time_to_first_token": round(first - record.began, 4),
                "total": round(now - record.began, 4),
                "tokens_per_second": round(
                    record.completion_tokens / max(1e-6, now - record.began), 2
                ),
            }
        }

    def usage(self) -> dict[str, int]:
        return usage(self.record.prompt_tokens, self.record.completion_tokens)


async def complete(service: Service, request: Request, body: CompletionBody) -> Response:
    """Answer `/v1/completions`."""
    record = record_of(request.scope)
    model = service.find(body.model, "generate", record)
    prompts = body.prompts()
    best_of = body.best_of or body.n
    if best_of < body.n:
        raise bad_request(f"best_of={best_of} 应不小于 n={body.n}。", "best_of")
    if best_of > body.n and body.stream:
        raise bad_request("best_of 大于 n 时不能用 stream=true。请去掉其中一个。", "best_of")
    _check_count(service, len(prompts), best_of)
    settings = body.generation_settings(service.settings.max_output_tokens, body.logprobs)
    _refuse_beams(settings, "n" if best_of == body.n else "best_of", best_of)
    if best_of > body.n and settings.logprobs is None:
        settings = replace(settings, logprobs=0)  # they tell the best, even if nobody asks for them
    ids = [
        model.check_ids(each) if isinstance(each, list) else await service.encode(model, each)
        for each in prompts
    ]
    include, continuous = body.wants_usage()
    reply = Reply(
        model,
        record,
        is_chat=False,
        logprobs=body.logprobs,
        echo=body.echo,
        best_of=best_of,
        n=body.n,
        include_usage=include,
        continuous_usage=continuous,
        timings=body.timings,
    )
    _warn(reply, body, ids)
    record.prompt_tokens = sum(map(len, ids))
    record.stream = body.stream
    job = service.start(
        model, _seeded(ids, best_of, body.seed), settings, record, streams=body.stream
    )
    return await _answer(service, request, job, reply, body.stream)


async def chat(service: Service, request: Request, body: ChatBody) -> Response:
    """Answer `/v1/chat/completions`."""
    record = record_of(request.scope)
    model = service.find(body.model, "generate", record)
    if body.top_logprobs is not None and not body.logprobs:
        raise bad_request("top_logprobs 要和 logprobs=true 一起用。", "top_logprobs")
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    _check_count(service, 1, body.n)
    prompt, stops = fold_messages(body.messages)
    if stops:
        body.add_stops(stops)
    settings = body.generation_settings(service.settings.max_output_tokens, logprobs)
    _refuse_beams(settings, "n", body.n)
    ids = await service.encode(model, prompt, "messages")
    include, continuous = body.wants_usage()
    reply = Reply(
        model,
        record,
        is_chat=True,
        logprobs=logprobs,
        best_of=body.n,
        n=body.n,
        include_usage=include,
        continuous_usage=continuous,
        timings=body.timings,
    )
    _warn(reply, body, [ids])
    record.prompt_tokens = len(ids)
    record.stream = body.stream
    job = service.start(
        model, _seeded([ids], body.n, body.seed), settings, record, streams=body.stream
    )
    return await _answer(service, request, job, reply, body.stream)


async def _answer(
    service: Service, request: Request, job: Job, reply: Reply, stream: bool
) -> Response:
    record = reply.record

    def gone() -> None:
        record.outcome = "cancelled"

    if stream:
        # The job is stopped when its time is over; what is left is to send what it wrote.
        seconds = service.settings.request_timeout + 30
        return EventStream(job, _frames(job, reply), seconds, gone, reply.headers)
    await finish(job, request)
    return JSONResponse(_whole(job, reply), headers=reply.headers)


async def finish(job: Job, request: Request) -> None:
    """Wait until a job is done; it is stopped where its client leaves.

    Raises:
        ApiError: it failed, or its time is over.
        ClientGone: nobody waits for it any more.
    """
    watching = asyncio.create_task(disconnected(request.receive))
    finished = asyncio.create_task(job.finished())
    try:
        await asyncio.wait((watching, finished), return_when=asyncio.FIRST_COMPLETED)
        if not finished.done():
            raise ClientGone
        finished.result()
    finally:
        job.stop()
        for task in (watching, finished):
            task.cancel()


# --- whole answers --------------------------------------------------------------------------------


def _whole(job: Job, reply: Reply) -> dict[str, Any]:
    chosen: list[Choice] = []
    for first in range(0, len(job.choices), reply.best_of):
        group = job.choices[first : first + reply.best_of]
        if reply.best_of > reply.n:
            group = sorted(group, key=lambda each: -each.mean_logprob)[: reply.n]
        chosen += group
    choices = [_choice(index, choice, reply) for index, choice in enumerate(chosen)]
    head = reply.head(is_chunk=False)
    return {**head, "choices": choices, "usage": reply.usage(), **reply.seconds()}


def _choice(index: int, choice: Choice, reply: Reply) -> dict[str, Any]:
    found: dict[str, Any] = {"index": index}
    if reply.is_chat:
        found["message"] = {"role": "assistant", "content": choice.text, "refusal": None}
    else:
        echoed = reply.model.decode(choice.prompt) if reply.echo else ""
        found["text"] = echoed + choice.text
    found["logprobs"] = None
    if reply.logprobs is not None:
        logprobs = Logprobs(reply, choice)
        found["logprobs"] = logprobs.of(choice.pieces)
    return {**found, "finish_reason": choice.finish_reason, "seed": choice.seed}


class Logprobs:
    """OpenAI's two forms of log-probabilities, in the order of a text's pieces."""

    def __init__(self, reply: Reply, choice: Choice) -> None:
        self._reply = reply
        self._prompt = choice.prompt if reply.echo else ()
        self._offset = 0
        self._stream = text_stream(reply.model.tokenizer)  # without what stop strings hold back

    def of(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        """What stands at `logprobs` for these pieces; the echoed prompt comes first."""
        return self._chat(pieces) if self._reply.is_chat else self._completion(pieces)

    def _chat(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        content = []
        for piece in pieces:
            for token_id, logprob, alternatives in zip(
                piece.token_ids, piece.logprobs, piece.alternatives, strict=True
            ):
                top = [self._token(each.token_id, each.logprob) for each in alternatives]
                content.append({**self._token(token_id, logprob), "top_logprobs": top})
        return {"content": content, "refusal": None}

    def _token(self, token_id: int, logprob: float) -> dict[str, Any]:
        model = self._reply.model
        return {
            "token": model.token_text(token_id),
            "logprob": logprob,
            "bytes": list(model.token_bytes(token_id)),
        }

    def _completion(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        model = self._reply.model
        tokens: list[str] = []
        logprobs: list[float | None] = []
        top: list[dict[str, float] | None] = []
        offsets: list[int] = []
        if self._prompt:
            echoed = model.tokenizer.decoder_stream()
            for token_id in self._prompt:
                tokens.append(model.token_text(token_id))
                logprobs.append(None)
                top.append(None)
                offsets.append(self._offset)
                self._offset += len(echoed.push(token_id))
            self._offset = len(model.decode(self._prompt))
            self._prompt = ()
        for piece in pieces:
            for token_id, logprob, alternatives in zip(
                piece.token_ids, piece.logprobs, piece.alternatives, strict=True
            ):
                tokens.append(model.token_text(token_id))
                logprobs.append(logprob)
                likeliest = {model.token_text(each.token_id): each.logprob for each in alternatives}
                likeliest.setdefault(
                    tokens[-1], logprob
                )  # one more than was asked for, as at OpenAI
                top.append(likeliest)
                offsets.append(self._offset)
                self._offset += len(self._stream.push(token_id))
        return {
            "tokens": tokens,
            "token_logprobs": logprobs,
            "top_logprobs": top if self._reply.logprobs else None,
            "text_offset": offsets,
        }


# --- streams --------------------------------------------------------------------------------------


async def _frames(job: Job, reply: Reply) -> AsyncIterator[bytes]:
    """Events of a stream; b"" where there was nothing to tell for a while."""
    chunks = [_Chunks(choice, reply) for choice in job.choices]
    for each in chunks:
        if opening := each.opening():
            yield opening
    while True:
        news = await job.news()
        if job.error is None and not job.is_done and not news:
            yield b""
        pieces: list[bytes] = []
        for choice, item in news:
            frame = chunks[choice.index].frame(item)
            if frame:
                pieces.append(frame)
        if pieces:
            yield b"".join(pieces)
        if job.is_done:
            break
    if job.error is not None:
        reply.record.outcome = "timeout" if job.error.status == 504 else "failed"
        reply.record.error = job.error.code
        yield b"data: " + dumps(job.error.body()) + b"\n\n"
        return
    closing = reply.seconds()
    if reply.include_usage:
        closing["usage"] = reply.usage()
    if closing:
        yield b"data: " + dumps({**reply.head(is_chunk=True), "choices": [], **closing}) + b"\n\n"
    yield DONE


class _Chunks:
    """The chunks of one choice; what is the same in all of them is put together once."""

    def __init__(self, choice: Choice, reply: Reply) -> None:
        self._choice = choice
        self._reply = reply
        self._logprobs = None if reply.logprobs is None else Logprobs(reply, choice)
        head = dumps(reply.head(is_chunk=True))[:-1]
        text = b'"delta":{"content":' if reply.is_chat else b'"text":'
        self._before = b'data: %b,"choices":[{"index":%d,%b' % (head, choice.index, text)
        self._between = b"}" if reply.is_chat else b""
        self._written = 0

    def opening(self) -> bytes:
        """The first chunk: the role of a chat, or the echoed prompt."""
        if self._reply.is_chat:
            head = self._reply.head(is_chunk=True)
            delta = {"role": "assistant", "content": ""}
            choice = {"index": self._choice.index, "delta": delta, "finish_reason": None}
            return b"data: " + dumps({**head, "choices": [choice], **self._usage()}) + b"\n\n"
        if self._reply.echo:
            logprobs = None if self._logprobs is None else self._logprobs.of([])
            return self._chunk(self._reply.model.decode(self._choice.prompt), logprobs, None)
        return b""

    def frame(self, news: Piece | End) -> bytes:
        """The chunk for these news; b"" where there is nothing to show yet."""
        if isinstance(news, End):
            return self._chunk("", None, news.finish_reason)
        self._written += len(news.token_ids)
        if self._logprobs is not None:
            return self._chunk(news.text, self._logprobs.of([news]), None)
        return self._chunk(news.text, None, None) if news.text else b""

    def _chunk(
        self, text: str, logprobs: dict[str, Any] | None, finish_reason: str | None
    ) -> bytes:
        tail: dict[str, Any] = {"logprobs": logprobs, "finish_reason": finish_reason}
        if finish_reason is not None:
            tail["seed"] = self._choice.seed
        shown = dumps(text)
        if text and logprobs is None and not self._reply.include_usage:
            return b"".join((self._before, shown, self._between, _PLAIN_TAIL))
        fields = b",".join((b"%b%b" % (shown, self._between), dumps(tail)[1:-1])) + b"}]"
        counted = dumps(self._usage())[1:-1]
        rest = b"," + counted if counted else b""
        return b"".join((self._before, fields, rest, b"}\n\n"))

    def _usage(self) -> dict[str, Any]:
        reply = self._reply
        if not reply.include_usage:
            return {}
        return {"usage": reply.usage() if reply.continuous_usage else None}


_PLAIN_TAIL = b',"logprobs":null,"finish_reason":null}]}\n\n'


# --- requests -------------------------------------------------------------------------------------


def _check_count(service: Service, prompts: int, each: int) -> None:
    most = service.settings.max_choices
    if not 1 <= prompts * each <= most:
        raise bad_request(
            f"一次请求要写 {prompts * each} 段文字（prompt 的个数 × n 或 best_of），"
            f"应在 1 到 {most} 之间。",
            "n" if prompts == 1 else "prompt",
        )


def _refuse_beams(settings: GenerationSettings, name: str, texts: int) -> None:
    """Raise an `ApiError` where a beam search, which draws nothing, is to give several texts."""
    if settings.num_beams > 1 and texts > 1:
        raise bad_request(
            f"束搜索（num_beams={settings.num_beams}）只有一种续写，{name}={texts} 没有意义。"
            "请去掉其中一个。",
            name,
        )


def _seeded(
    prompts: Sequence[list[int]], each: int, seed: int | None
) -> list[tuple[list[int], int]]:
    """Every prompt ``each`` times. Texts of one prompt have seeds that follow one another."""
    seeded = []
    for ids in prompts:
        first = secrets.randbits(32) if seed is None else seed
        seeded += [(ids, (first + index) % 2**63) for index in range(each)]
    return seeded


def _warn(reply: Reply, body: GenerationBody, prompts: Sequence[list[int]]) -> None:
    if ignored := body.ignored():
        reply.warnings.append(header_text(f"ignored fields: {', '.join(ignored)}"))
    most = reply.model.max_source_tokens
    longest = max(map(len, prompts))
    if longest > most:
        reply.warnings.append(f"prompt has {longest} tokens, the last {most} are read")

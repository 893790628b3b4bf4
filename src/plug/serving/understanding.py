"""The routes that read: embeddings, labels, masks, entities, answers, questions, tokens."""

from __future__ import annotations

import base64
import struct
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from fastapi import Request, Response
from starlette.responses import JSONResponse

from plug.serving.completions import finish
from plug.serving.errors import bad_request
from plug.serving.guard import ClientGone, record_of
from plug.serving.models import Capability, ServedModel
from plug.serving.protocol import (
    AnswerBody,
    Body,
    ClassifyBody,
    DetokenizeBody,
    EmbeddingsBody,
    FillMaskBody,
    LoadBody,
    QuestionsBody,
    TagBody,
    TokenizeBody,
    UnloadBody,
    fold_messages,
    header_text,
)
from plug.serving.service import Service

T = TypeVar("T")

_TOGETHER = 16  # texts of a request computed in one go; other requests come in between


async def embeddings(service: Service, request: Request, body: EmbeddingsBody) -> Response:
    """Vectors of texts, as OpenAI's; their products are cosine similarities."""
    import plug

    model = service.find(body.model, "embeddings", record_of(request.scope))
    if body.dimensions is not None:
        raise bad_request("dimensions 还不支持，向量的长度由模型决定。请去掉它。", "dimensions")
    texts = [body.input] if isinstance(body.input, str) else body.input
    for text in texts:
        service.check_length(text, "input")
    vectors = await _in_parts(
        service, model, request, texts, lambda part: plug.embed(part, model=model.encoder).tolist()
    )

    def answer() -> Response:
        data = [
            {"object": "embedding", "index": index, "embedding": _encoded(each, encoding)}
            for index, each in enumerate(vectors)
        ]
        tokens = sum(len(ids) for ids in model.tokenizer.encode_batch(texts))
        record_of(request.scope).prompt_tokens = tokens
        counts = {"prompt_tokens": tokens, "total_tokens": tokens}
        return _json({"object": "list", "data": data, "model": model.name, "usage": counts}, body)

    encoding = body.encoding_format
    return await service.tokenize(answer)  # a megabyte of text, and 2,048 vectors, take a second


async def classify(service: Service, request: Request, body: ClassifyBody) -> Response:
    """Labels of texts: those given, or a fine-tuned model's own."""
    import plug
    from plug.zero_shot.classify import PROMPT

    record = record_of(request.scope)
    model = service.find(body.model, "classify", record)
    texts = [body.input] if isinstance(body.input, str) else body.input
    for text in (*texts, body.text_pair or ""):
        service.check_length(text, "input")
    if model.tuned_for == "classify":
        pair = [] if body.text_pair is None else [body.text_pair]
        return _json(await _tuned(service, model, request, [[text, *pair] for text in texts]), body)
    if body.labels is None:
        raise bad_request("请在 labels 里给出两个以上的标签。", "labels")
    if body.text_pair is not None:
        raise bad_request("text_pair 只用于微调过的模型。请去掉它。", "text_pair")
    labels = body.labels
    examples = [(each.text, each.label) for each in body.examples]

    def score(part: Sequence[str]) -> list[list[dict[str, Any]]]:
        return [
            [
                {"label": each.label, "probability": each.probability}
                for each in plug.classify(
                    text,
                    labels,
                    examples=examples,
                    prompt=body.prompt or PROMPT,
                    method=body.method,
                    model=model.encoder,
                )
            ]
            for text in part
        ]

    scored = await _in_parts(service, model, request, texts, score, together=1)
    data = [
        {"index": index, "label": each[0]["label"], "labels": each}
        for index, each in enumerate(scored)
    ]
    return _json({"object": "list", "model": model.name, "data": data}, body)


async def fill_mask(service: Service, request: Request, body: FillMaskBody) -> Response:
    """What may stand at each [MASK]."""
    import plug

    model = service.find(body.model, "fill_mask", record_of(request.scope))
    service.check_length(body.input, "input")
    masks = await service.compute(
        model.tokens_read(len(body.input)),
        lambda: plug.fill_mask(body.input, top_k=body.top_k, model=model.encoder),
    )
    data = [
        {
            "index": index,
            "candidates": [{"text": each.text, "probability": each.probability} for each in mask],
        }
        for index, mask in enumerate(masks)
    ]
    found = [{"index": 0, "masks": data}]
    return _json({"object": "list", "model": model.name, "data": found}, body)


async def tag(service: Service, request: Request, body: TagBody) -> Response:
    """The entities of texts."""
    texts = [body.input] if isinstance(body.input, str) else body.input
    return await _predict(service, request, body, "tag", [[text] for text in texts])


async def answer(service: Service, request: Request, body: AnswerBody) -> Response:
    """The stretch of a context that answers a question."""
    return await _predict(service, request, body, "answer", [[body.question, body.context]])


async def questions(service: Service, request: Request, body: QuestionsBody) -> Response:
    """A question that an answer answers, given where the answer stands."""
    record = record_of(request.scope)
    model = service.find(body.model, "questions", record)
    for text in (body.answer, body.context):
        service.check_length(text, "context")
    source, settings = model.question, model.question_settings
    assert source is not None
    assert settings is not None
    ids = await service.tokenize(lambda: source([body.answer, body.context]))
    record.prompt_tokens = len(ids)
    job = service.start(model, [(ids, 0)], settings, record, streams=False)
    await finish(job, request)
    data = [{"index": 0, "question": job.choices[0].text}]
    return _json({"object": "list", "model": model.name, "data": data}, body)


async def _predict(
    service: Service,
    request: Request,
    body: Body,
    capability: Capability,
    examples: Sequence[Sequence[str]],
) -> Response:
    model = service.find(body.model, capability, record_of(request.scope))
    for parts in examples:
        for part in parts:
            service.check_length(part, "input")
    return _json(await _tuned(service, model, request, examples), body)


async def _tuned(
    service: Service, model: ServedModel, request: Request, examples: Sequence[Sequence[str]]
) -> dict[str, Any]:
    """What a fine-tuned model predicts, as `plug predict` shows it."""
    predict = model.tuned
    assert predict is not None
    found = await _in_parts(service, model, request, examples, predict)
    data = [{"index": index, **each} for index, each in enumerate(found)]
    return {"object": "list", "model": model.name, "data": data}


async def _in_parts(
    service: Service,
    model: ServedModel,
    request: Request,
    inputs: Sequence[Any],
    work: Callable[[Sequence[Any]], list[T]],
    together: int = _TOGETHER,
) -> list[T]:
    """``work`` on a few inputs at a time, so that a long list holds nobody up.

    Raises:
        ClientGone: nobody waits for the rest.
    """
    found: list[T] = []
    for first in range(0, len(inputs), together):
        if await request.is_disconnected():
            raise ClientGone
        part = list(inputs[first : first + together])
        # A character is a token at most; counting them all would take longer than it is worth.
        # Fine-tuned models read a long text in several windows, the others its end.
        lengths = [len(text) for each in part for text in _texts(each)]
        tokens = sum(lengths if model.tuned is not None else map(model.tokens_read, lengths))
        found += await service.compute(tokens, lambda part=part: work(part))  # type: ignore[misc]
    return found


def _texts(one: Any) -> Sequence[str]:
    return [one] if isinstance(one, str) else one


async def tokenize(service: Service, request: Request, body: TokenizeBody) -> Response:
    """The tokens of a text, and which of them the encoder reads."""
    model = service.find(body.model, "tokenize", record_of(request.scope))
    if (body.prompt is None) == (body.messages is None):
        raise bad_request("请给出 prompt 或 messages，二者选一。", "prompt")
    prompt = body.prompt if body.prompt is not None else fold_messages(body.messages or [])[0]
    service.check_length(prompt)

    def work() -> tuple[list[int], list[tuple[int, int]]]:
        return model.tokenizer.encode_with_offsets(prompt)

    ids, offsets = await service.tokenize(work)
    found: dict[str, Any] = {
        "count": len(ids),
        "max_model_len": model.max_source_tokens,
        "tokens": ids,
        "first_read": max(0, len(ids) - model.max_source_tokens),
    }
    if body.return_token_strs:
        found["token_strs"] = [model.token_text(each) for each in ids]
    if body.return_offsets:
        found["offsets"] = offsets
    return _json(found, body)


async def detokenize(service: Service, request: Request, body: DetokenizeBody) -> Response:
    """The text of tokens."""
    model = service.find(body.model, "tokenize", record_of(request.scope))
    if body.tokens:
        model.check_ids(body.tokens)
    prompt = await service.tokenize(lambda: model.decode(body.tokens))
    return _json({"prompt": prompt}, body)


async def load(service: Service, _request: Request, body: LoadBody) -> Response:
    """Load a model of `--models-dir`."""
    model = await service.load(body.name)
    return _json(model.describe(), body)


async def unload(service: Service, _request: Request, body: UnloadBody) -> Response:
    """Unload a model that was loaded while the server runs."""
    await service.unload(body.name)
    return _json({"id": body.name, "object": "model", "deleted": True}, body)


def _encoded(vector: list[float], encoding: str) -> list[float] | str:
    if encoding == "float":
        return vector
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()


def _json(content: dict[str, Any], body: Body) -> Response:
    ignored = body.ignored()
    headers = {}
    if ignored:
        headers["X-Plug-Warning"] = header_text(f"ignored fields: {', '.join(ignored)}")
    return JSONResponse(content, headers=headers)

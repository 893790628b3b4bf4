"""`create_app`: the routes, each a line; what they do is in the files beside this one."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse

import plug
from plug.serving import completions, protocol, understanding
from plug.serving.body import body_of
from plug.serving.errors import ApiError
from plug.serving.guard import Guard, error_response, record_of
from plug.serving.metrics import Metrics
from plug.serving.models import ServedModel, check_names
from plug.serving.protocol import Body
from plug.serving.service import Loader, Service
from plug.serving.settings import ServeSettings

PAGE_DIRECTORY = Path(__file__).parent / "page"
PAGE_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}

Handler = Callable[[Service, Request, Any], Awaitable[Response]]
ROUTES: tuple[tuple[str, type[Body], Handler], ...] = (
    ("/v1/completions", protocol.CompletionBody, completions.complete),
    ("/v1/chat/completions", protocol.ChatBody, completions.chat),
    ("/v1/embeddings", protocol.EmbeddingsBody, understanding.embeddings),
    ("/v1/classify", protocol.ClassifyBody, understanding.classify),
    ("/v1/fill-mask", protocol.FillMaskBody, understanding.fill_mask),
    ("/v1/tag", protocol.TagBody, understanding.tag),
    ("/v1/answer", protocol.AnswerBody, understanding.answer),
    ("/v1/questions", protocol.QuestionsBody, understanding.questions),
    ("/v1/models/load", protocol.LoadBody, understanding.load),
    ("/v1/models/unload", protocol.UnloadBody, understanding.unload),
    ("/tokenize", protocol.TokenizeBody, understanding.tokenize),
    ("/detokenize", protocol.DetokenizeBody, understanding.detokenize),
)


def create_app(
    models: Sequence[ServedModel], settings: ServeSettings, loader: Loader | None = None
) -> FastAPI:
    """The ASGI application; `app.state.service` is its `Service`.

    Args:
        models: the first is used where a request names none.
        settings: of the server.
        loader: makes the models of `/v1/models/load`.

    Raises:
        UsageError: two models have one name.
    """
    check_names(models)
    metrics = Metrics()
    service = Service(models, settings, metrics, loader)
    files = {f"/{path.name}": path for path in PAGE_DIRECTORY.iterdir() if path.is_file()}
    files["/"] = PAGE_DIRECTORY / "index.html"
    app = FastAPI(
        title="PLUG",
        version=plug.__version__,
        docs_url=None,  # they load scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,
        middleware=[Middleware(Guard, settings=settings, metrics=metrics, page=list(files))],
        exception_handlers={ApiError: _answer_api_error, HTTPException: _answer_http_error},
    )
    app.state.service = service
    for path, model, handler in ROUTES:
        _add_post(app, service, path, model, handler)
    _add_reads(app, service)
    for path, file in files.items():
        _add_file(app, path, file)
    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]
    return app


def _add_post(
    app: FastAPI, service: Service, path: str, model: type[Body], handler: Handler
) -> None:
    async def route(request: Request, body: Any = body_of(model)) -> Response:  # noqa: B008
        return await handler(service, request, body)

    schema = {"$ref": f"#/components/schemas/{model.__name__}"}
    content = {"application/json": {"schema": schema}}
    app.post(
        path,
        name=handler.__name__,
        description=handler.__doc__,
        response_class=JSONResponse,
        openapi_extra={"requestBody": {"required": True, "content": content}},
        responses={
            status: {"description": text, "content": {"application/json": {"schema": _ERROR}}}
            for status, text in _REFUSALS.items()
        },
    )(route)


def _add_reads(app: FastAPI, service: Service) -> None:
    @app.get("/health")
    async def health() -> Response:
        """200 while the engines run."""
        if not service.is_alive:
            raise ApiError(503, "写作的线程已停止。请重启服务。", code="engine_dead")
        return JSONResponse({"status": "ok"})

    @app.get("/ready")
    async def ready() -> Response:
        """200 while new requests are taken."""
        if service.admission.is_draining or not service.is_alive:
            raise ApiError(503, "服务器正在关闭，或写作的线程已停止。", code="not_ready")
        return JSONResponse({"status": "ready"})

    @app.get("/metrics")
    async def metrics() -> Response:
        """For Prometheus."""
        return PlainTextResponse(
            service.metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8"
        )

    @app.get("/v1/models")
    async def models() -> Response:
        """The models by name, and what each can do."""
        described = [model.describe() for model in service.models.values()]
        return JSONResponse({"object": "list", "data": described})

    @app.get("/v1/models/{name:path}")
    async def model(name: str, request: Request) -> Response:
        """One model."""
        found = service.find(name, "tokenize", record_of(request.scope))
        return JSONResponse(found.describe())


def _add_file(app: FastAPI, path: str, file: Path) -> None:
    async def page() -> Response:
        return FileResponse(file, headers=PAGE_HEADERS)

    app.api_route(path, methods=["GET", "HEAD"], include_in_schema=False)(page)


async def _answer_api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    record_of(request.scope).error = error.code
    return error_response(error)


async def _answer_http_error(_request: Request, error: Exception) -> Response:
    """What Starlette itself refuses: no such path, or no such method."""
    assert isinstance(error, HTTPException)
    messages = {
        404: ("没有这个地址。", "not_found"),
        405: ("这个地址不接受这种方法（GET 或 POST）。", "method_not_allowed"),
    }
    message, code = messages.get(error.status_code, ("请求不能处理。", "http_error"))
    return error_response(
        ApiError(error.status_code, message, code=code, headers=error.headers or {})
    )


_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
_REFUSALS: dict[int | str, str] = {
    400: "the request is wrong; the message says how",
    401: "the key is missing or wrong",
    404: "no such model",
    408: "the body did not arrive in time",
    413: "the body is too large",
    415: "the body is not declared as JSON",
    429: "the queue is full; Retry-After has the seconds to wait",
    503: "the server shuts down",
    504: "the request took too long",
}


def _openapi(app: FastAPI) -> dict[str, Any]:
    """The schema that FastAPI makes, with the bodies that `body_of` reads."""
    if app.openapi_schema is None:
        schema = FastAPI.openapi(app)
        _, bodies = models_json_schema(
            [(model, "validation") for _, model, _ in ROUTES],
            ref_template="#/components/schemas/{model}",
        )
        for name in ("CompletionBody", "ChatBody"):
            bodies["$defs"][name]["properties"] |= protocol.sampling_schema()
        schema.setdefault("components", {}).setdefault("schemas", {}).update(bodies["$defs"])
        app.openapi_schema = schema
    return app.openapi_schema

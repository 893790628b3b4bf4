"""`Guard`: what stands before every route, as plain ASGI: request ids, keys, limits, the log.

Only `OPEN_PATHS` and the page's static files are served without a key; any other path, known or
not, needs one. A new route is therefore guarded without being told.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import time
import uuid
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from typing import Any

from starlette.datastructures import Headers
from starlette.responses import JSONResponse

from plug.serving.errors import ApiError
from plug.serving.metrics import OTHER, PAGE, Metrics
from plug.serving.record import Record, log_failure
from plug.serving.settings import ServeSettings, is_local

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

OPEN_PATHS = ("/health", "/ready")
MAX_HEADER_BYTES = 32_768
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


class ClientGone(Exception):  # noqa: N818 (no error: the client left, and nothing can be answered)
    """The client closed its connection."""


class Guard:
    """Lets a request through to ``app``, or answers it with an error.

    Args:
        app: the routes.
        settings: of the server.
        metrics: where requests are counted.
        page: paths of the page's files.
    """

    def __init__(
        self, app: App, settings: ServeSettings, metrics: Metrics, page: Sequence[str]
    ) -> None:
        self._app = app
        self._page = frozenset(page)
        self._open = self._page | set(OPEN_PATHS)
        self._settings = settings
        self._metrics = metrics
        self._keys = [_digest(key.encode()) for key in settings.api_key]
        # A page that a browser was sent to can name any host (DNS rebinding); without keys only the
        # names of this machine are answered.
        self._checks_host = not (settings.api_key or settings.is_public or settings.uds)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        # Set here and not by uvicorn, so that a proxy may take the prefix away or leave it.
        scope["root_path"] = self._settings.root_path
        headers = Headers(scope=scope)
        record = Record(_request_id(headers), method=scope["method"])
        scope["state"] = {**scope.get("state", {}), "record": record}
        own_headers = [(b"x-request-id", record.request_id.encode())]

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                message["headers"] = [*message.get("headers", ()), *own_headers]
            await send(message)

        try:
            try:
                self._check(scope, headers)
                await self._app(scope, self._limited(receive, headers), send_with_id)
            except ApiError as error:
                record.error = error.code
                if record.status:
                    raise
                await error_response(error)(scope, receive, send_with_id)
            except ClientGone:
                record.outcome = "cancelled"
        except Exception as error:
            record.error, record.outcome = type(error).__name__, "failed"
            log_failure(record, error)
            if not record.status:
                answer = ApiError(
                    500,
                    f"服务器内部出错（{record.request_id}）。请把这个编号告诉管理员。",
                    code="internal_error",
                )
                await error_response(answer)(scope, receive, send_with_id)
        finally:
            if (route := scope.get("route")) is not None:
                path = getattr(route, "path", OTHER)
                record.route = PAGE if path in self._page else path
            self._metrics.requests.labels(record.route, record.end()).inc()
            record.log()

    def _check(self, scope: Scope, headers: Headers) -> None:
        size = sum(len(name) + len(value) for name, value in scope["headers"])
        if size + len(scope.get("query_string", b"")) > MAX_HEADER_BYTES:
            raise ApiError(
                431,
                f"请求头共 {size} 字节，超过 {MAX_HEADER_BYTES}。请减少请求头。",
                code="headers_too_large",
                headers={"Connection": "close"},
            )
        if self._checks_host and not _names_this_machine(headers.get("host", "")):
            raise ApiError(
                403,
                "没有密钥的服务只接受发往 localhost 或 IP 地址的请求。请改用这样的地址，"
                "或用 --api-key 启动服务。",
                code="host_not_allowed",
            )
        if not self._is_open(scope) and not self._has_key(headers):
            raise ApiError(
                401,
                "缺少密钥，或密钥不对。请加上请求头 Authorization: Bearer 密钥。",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        declared = headers.get("content-length", "0")
        if not declared.isdigit() or int(declared[:18]) > self._settings.max_body_bytes:
            raise self._too_large()

    def _is_open(self, scope: Scope) -> bool:
        path = scope["path"].removeprefix(scope["root_path"])
        return scope["method"] in ("GET", "HEAD") and path in self._open

    def _has_key(self, headers: Headers) -> bool:
        if not self._keys:
            return True
        scheme, _, given = headers.get("authorization", "").partition(" ")
        digest = _digest(given.strip().encode("latin-1"))
        # Every key is compared, and in constant time: how long it takes tells nothing.
        matches = [hmac.compare_digest(digest, key) for key in self._keys]
        return any(matches) and scheme.lower() == "bearer"

    def _limited(self, receive: Receive, headers: Headers) -> Receive:
        """``receive`` that refuses more bytes than are allowed, which a chunked body may send."""
        if "content-length" in headers:  # the server reads no more than that
            return receive
        received = 0

        async def limited() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._settings.max_body_bytes:
                raise self._too_large()
            return message

        return limited

    def _too_large(self) -> ApiError:
        return ApiError(
            413,
            f"请求的正文超过 {self._settings.max_body_bytes} 字节。请分几次发送。",
            code="body_too_large",
        )  # not closed at once: a client that still sends would see a reset, and no answer


def error_response(error: ApiError) -> JSONResponse:
    """The answer to a request that failed."""
    return JSONResponse(error.body(), error.status, error.headers)


def record_of(scope: Scope) -> Record:
    """The record that the guard keeps of a request."""
    record: Record = scope["state"]["record"]
    return record


def seconds_since(record: Record) -> float:
    return time.perf_counter() - record.began


def _request_id(headers: Headers) -> str:
    given = headers.get("x-request-id", "")
    return given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _names_this_machine(host: str) -> bool:
    """Whether a Host header is an IP address or localhost; any port will do."""
    name = host.rsplit(":", 1)[0] if not host.endswith("]") else host
    name = name.removeprefix("[").removesuffix("]")
    return is_local(name) or bool(re.fullmatch(r"[0-9.]+|[0-9A-Fa-f:]+", name))

"""`ApiError`: what a client did wrong or the server could not do, in the shape of OpenAI's API."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from plug.errors import PlugError, UsageError

TYPES = {  # status -> the error's type, as OpenAI names them where OpenAI has one
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    429: "rate_limit_error",
    431: "invalid_request_error",
    500: "server_error",
    503: "server_error",
    504: "timeout_error",
}


class ApiError(Exception):
    """An answer that is an error.

    Args:
        status: of HTTP.
        message: one sentence for the client, which says what to do.
        code: a word that programs can compare.
        param: the field of the request that is wrong.
        headers: sent with the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """The JSON of the answer."""
        kind = TYPES.get(self.status, "invalid_request_error")
        fields = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": fields}


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """The error of a request that cannot be answered as it is."""
    return ApiError(400, message, param=param, code=code)


def as_api_error(error: PlugError) -> ApiError:
    """A `PlugError` of the package as an answer: wrong use is 400, all else 500."""
    if isinstance(error, UsageError):
        return bad_request(str(error))
    return ApiError(500, str(error), code="engine_error")


def shutting_down() -> ApiError:
    """The error while the server drains: another server may take the request."""
    return ApiError(
        503,
        "服务器正在关闭，不再接受新的请求。请稍后重试。",
        code="shutting_down",
        headers={"Retry-After": "5", "Connection": "close"},
    )

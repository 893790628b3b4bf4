"""Request bodies: read within limits, parsed strictly, checked against a model of `protocol.py`."""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any, NoReturn, TypeVar

from fastapi import Depends, Request
from pydantic import BaseModel, ValidationError

from plug.serving.errors import ApiError, bad_request

M = TypeVar("M", bound=BaseModel)

READ_SECONDS = 30.0  # a body that has not arrived whole by then is refused (slow loris)
_SURROGATE = b"\\ud"  # how JSON escapes one

_SENTENCES = {  # pydantic's kind of error -> what the field should be
    "missing": "不能缺少",
    "string_type": "应是字符串",
    "int_type": "应是整数",
    "int_from_float": "应是整数",
    "float_type": "应是一个数",
    "finite_number": "应是有限的数",
    "bool_type": "应是 true 或 false",
    "list_type": "应是数组",
    "dict_type": "应是对象",
    "model_type": "应是对象",
    "model_attributes_type": "应是对象",
}


# What pydantic names between a field and its items.
_TYPE = re.compile(r"function-after|str$|list\[")


def body_of(model: type[M]) -> Any:
    """A FastAPI dependency: the request's body as a ``model``."""

    async def read(request: Request) -> M:
        return validate(model, parse_json(await read_body(request)))

    return Depends(read)


async def read_body(request: Request) -> bytes:
    """The body's bytes.

    Raises:
        ApiError: the body is not declared as JSON, or does not arrive in time. That it is too
            large is noticed by `guard.py`, which counts what arrives.
    """
    media_type = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if media_type != "application/json" and not media_type.endswith("+json"):
        raise ApiError(
            415,
            "请求的正文应是 JSON。请加上请求头 Content-Type: application/json。",
            code="unsupported_media_type",
        )
    try:
        async with asyncio.timeout(READ_SECONDS):
            return await request.body()
    except TimeoutError:
        raise ApiError(
            408,
            f"请求的正文 {READ_SECONDS:g} 秒内没有收完。请检查网络后重试。",
            code="body_timeout",
            headers={"Connection": "close"},
        ) from None


def parse_json(raw: bytes) -> dict[str, Any]:
    """A JSON object of UTF-8.

    Raises:
        ApiError: it is anything else; NaN, infinities and lone surrogates are refused too.
    """
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise bad_request(
            f"请求的正文不是 UTF-8（第 {error.start + 1} 个字节）。请用 UTF-8 编码。",
            code="invalid_utf8",
        ) from None
    try:
        value = json.loads(text, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        raise bad_request(
            f"请求的正文不是 JSON（第 {error.lineno} 行第 {error.colno} 个字符）。请检查格式。",
            code="invalid_json",
        ) from None
    except RecursionError:
        raise bad_request("请求的 JSON 嵌套太深。请减少层数。", code="invalid_json") from None
    except ValueError:  # an integer of thousands of digits
        raise bad_request("请求的 JSON 里有过长的整数。请改小。", code="invalid_json") from None
    if not isinstance(value, dict):
        raise bad_request("请求的 JSON 应是一个对象，如 {…}。", code="invalid_json")
    if _SURROGATE in raw.lower():
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise bad_request(
                "请求里有孤立的代理码位（\\ud800 到 \\udfff），不是字符。请检查文字的编码。",
                code="invalid_unicode",
            ) from None
        except RecursionError:
            raise bad_request("请求的 JSON 嵌套太深。请减少层数。", code="invalid_json") from None
    return value


def validate(model: type[M], value: dict[str, Any]) -> M:
    """The value as a ``model``; fields that are null count as not given.

    Raises:
        ApiError: a field has the wrong type, or is missing; it is named, its value is not.
    """
    try:
        return model.model_validate({key: each for key, each in value.items() if each is not None})
    except ValidationError as error:
        [first, *_] = error.errors(include_url=False, include_context=True, include_input=False)
        place = [part for part in map(str, first["loc"]) if not _TYPE.match(part)]
        param = place[0] if place else None
        shown = "".join(f"[{part}]" if part.isdigit() else f".{part}" for part in place).lstrip(".")
        kinds = {each["type"] for each in error.errors() if each["loc"][:1] == first["loc"][:1]}
        raise bad_request(f"{shown} {_sentence(first, len(kinds))}。", param) from None


def _sentence(error: Any, alternatives: int) -> str:
    if alternatives > 1:  # of a union: its parts complain one by one
        return "的类型或值不对，请看文档里它可取的值"
    limits = error.get("ctx", {})
    match error["type"]:
        case "literal_error":
            return f"只能是 {limits['expected'].replace(' or ', ' 或 ')}"
        case "greater_than_equal":
            return f"应不小于 {limits['ge']}"
        case "less_than_equal":
            return f"应不大于 {limits['le']}"
        case "less_than":
            return f"应小于 {limits['lt']}"
        case "too_long" | "string_too_long":
            return f"太长，至多 {limits['max_length']}"
        case "too_short" | "string_too_short":
            return f"太短，至少 {limits['min_length']}"
        case "value_error":
            return str(limits["error"])
        case "string_pattern_mismatch":
            return "里有不能用的字符"
        case kind:
            return _SENTENCES.get(kind, "的值不对")


def _refuse_constant(name: str) -> NoReturn:
    raise bad_request(f"JSON 里不能有 {name}。请给出有限的数。", code="invalid_json")

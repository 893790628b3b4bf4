"""Bad input: the right 4xx, a sentence that helps, and the server goes on."""

from __future__ import annotations

import contextlib
import http.client
import socket
import time
from collections.abc import Callable
from typing import Any

import pytest

from plug.serving import server

COMPLETIONS = "/v1/completions"


@pytest.fixture(scope="module")
def client(scripted_model: Callable[..., Any], serving: Callable[..., Any]) -> Any:
    with serving([scripted_model()]) as found:
        yield found


@pytest.fixture(autouse=True)
def _the_server_goes_on(client: Any) -> Any:
    yield
    assert client.post(COMPLETIONS, {"prompt": "花", "max_tokens": 1})[0] == 200
    client.wait_until(lambda: not client.service.jobs)


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"", "invalid_json"),
        (b"{", "invalid_json"),
        (b"[]", "invalid_json"),
        (b'"text"', "invalid_json"),
        (b'{"prompt": "x",}', "invalid_json"),
        (b'{"prompt": "x", "temperature": NaN}', "invalid_json"),
        (b'{"prompt": "x", "temperature": -Infinity}', "invalid_json"),
        (b'{"prompt": "x", "seed": ' + b"9" * 5000 + b"}", "invalid_json"),
        (b"[" * 100_000, "invalid_json"),
        (b'{"a":' * 50_000, "invalid_json"),
        (b'{"prompt": "\xff\xfe"}', "invalid_utf8"),
        (b'{"prompt": "\\ud800"}', "invalid_unicode"),
        (b'{"user": "\\uDFFF", "prompt": "x"}', "invalid_unicode"),
        (b'{"stop": {"\\ud83d": 1}, "prompt": "x"}', "invalid_unicode"),
    ],
)
def test_a_body_that_is_no_json_object(client: Any, body: bytes, code: str) -> None:
    status, answer, _ = client.post(COMPLETIONS, body)

    assert status == 400
    assert answer["error"]["code"] == code
    assert answer["error"]["type"] == "invalid_request_error"


def test_a_pair_of_surrogates_is_a_character(client: Any) -> None:
    assert client.post(COMPLETIONS, b'{"prompt": "\\ud83d\\ude00", "max_tokens": 1}')[0] == 200


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": {"text": "花"}}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [""]}, "prompt"),
        ({"prompt": [300, "花"]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [100_000]}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": "花" * 70_000}, "prompt"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -5}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_tokens": "5"}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"max_tokens": 5000}, "max_tokens"),
        ({"max_tokens": 10**30}, "max_tokens"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"min_tokens": 9, "max_tokens": 8}, "min_tokens"),
        ({"n": 0}, "n"),
        ({"n": 33}, "n"),
        ({"n": 2, "best_of": 1}, "best_of"),
        ({"best_of": 2, "stream": True}, "best_of"),
        ({"prompt": ["花"] * 33}, "prompt"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": 3}, "stream_options"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**63}, "seed"),
        ({"seed": 1.0}, "seed"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": 1e300}, "temperature"),
        ({"temperature": [1]}, "temperature"),
        ({"top_p": 2}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"min_p": -0.5}, "min_p"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"frequency_penalty": "a"}, "frequency_penalty"),
        ({"no_repeat_ngram_size": 2**63}, "no_repeat_ngram_size"),
        ({"stop": ["x"] * 1000}, "stop"),
        ({"stop": ["x" * 1000]}, "stop"),
        ({"stop": 5}, "stop"),
        ({"stop": [""]}, "stop"),
        ({"stop_token_ids": ["a"]}, "stop_token_ids"),
        ({"logit_bias": {"a": 1}}, "logit_bias"),
        ({"logit_bias": {"5": 1000}}, "logit_bias"),
        ({"logit_bias": {str(i): 1 for i in range(2000)}}, "logit_bias"),
        ({"logit_bias": [1]}, "logit_bias"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"num_beams": 1000}, "num_beams"),
        ({"window": 0}, "window"),
        ({"ignore_eos": "no"}, "ignore_eos"),
        ({"model": "other"}, "model"),
        ({"model": 5}, "model"),
        ({"user": {}}, "user"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"suffix": "end"}, "suffix"),
    ],
)
def test_a_wrong_field_is_named(client: Any, fields: dict[str, Any], param: str) -> None:
    status, answer, _ = client.post(COMPLETIONS, {"prompt": "花", **fields})
    error = answer["error"]

    assert status == (404 if fields.get("model") == "other" else 400)
    assert error["param"] == param
    assert error["message"].endswith("。")
    assert len(error["message"]) < 300


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"seed": 10**40}, "seed 应小于 9223372036854775808。"),
        ({"prompt": [-1]}, "prompt 的类型或值不对，请看文档里它可取的值。"),
    ],
)
def test_a_value_out_of_range_is_explained(
    client: Any, fields: dict[str, Any], sentence: str
) -> None:
    _, answer, _ = client.post(COMPLETIONS, {"prompt": "花", **fields})

    assert answer["error"]["message"] == sentence


@pytest.mark.parametrize(
    "messages",
    [
        [],
        None,
        "花",
        [{"role": "tool", "content": "花"}],
        [{"role": "user"}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
        [{"role": "user", "content": {}}],
        ["花"],
    ],
)
def test_wrong_messages_are_refused(client: Any, messages: Any) -> None:
    status, answer, _ = client.post("/v1/chat/completions", {"messages": messages})

    assert status == 400
    assert answer["error"]["param"] == "messages"


def test_harmless_values_of_unsupported_fields_pass(client: Any) -> None:
    body = {"prompt": "花", "max_tokens": 1, "tools": [], "response_format": {"type": "text"}}
    status, _, headers = client.post(COMPLETIONS, {**body, "top_k": -1, "top_p": 1, "suffix": None})

    assert status == 200
    assert "x-plug-warning" not in headers


def test_unknown_fields_are_ignored_and_named(client: Any) -> None:
    body = {"prompt": "花", "max_tokens": 1, "store": True, "字段\r\nSet-Cookie: x": 1}
    status, _, headers = client.post(COMPLETIONS, body)

    assert status == 200
    assert headers["x-plug-warning"] == "ignored fields: store, ????Set-Cookie: x"
    assert "set-cookie" not in headers


def test_a_long_prompt_is_read_at_its_end_and_said_so(client: Any) -> None:
    status, _, headers = client.post(COMPLETIONS, {"prompt": "花" * 100, "max_tokens": 1})

    assert status == 200
    assert headers["x-plug-warning"] == "prompt has 100 tokens, the last 62 are read"


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/completions", 405),
        ("POST", "/v1/models", 405),
        ("DELETE", "/v1/models/plug-test", 405),
        ("GET", "/nothing", 404),
        ("GET", "/v1/models/nothing", 404),
        ("GET", "/v1/models/..%2f..%2fetc", 404),
    ],
)
def test_wrong_paths_and_methods(client: Any, method: str, path: str, status: int) -> None:
    answer = client.request(method, path)

    assert answer.status == status
    assert b'"error"' in answer.read()


def raw(client: Any) -> socket.socket:
    return socket.create_connection(("127.0.0.1", client.port), timeout=10)


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x02\x00\x01\x00",
        b"GET\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"\x00" * 1000,
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n"
        b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
    ],
)
def test_what_is_no_http_is_closed(client: Any, data: bytes) -> None:
    with raw(client) as connection:
        connection.sendall(data)
        connection.settimeout(5)
        assert connection.recv(65_536)[:13] in (b"", b"HTTP/1.1 400 ")


def test_a_half_closed_socket_frees_its_place(client: Any) -> None:
    body = b'{"prompt": "\xe8\x8a\xb1", "max_tokens": 4000}'
    head = (
        b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n" % len(body)
    )
    client.engine.seconds = 0.01
    with raw(client) as connection:
        connection.sendall(head + body)
        client.wait_until(lambda: client.engine.running)
        connection.shutdown(socket.SHUT_WR)
        client.wait_until(lambda: not client.engine.running)


def test_a_body_that_never_comes_whole(client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("plug.serving.body.READ_SECONDS", 0.1)
    with raw(client) as connection:
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\n"
            b"Content-Type: application/json\r\nContent-Length: 50\r\n\r\n{"
        )
        answer = http.client.HTTPResponse(connection)
        answer.begin()
        assert answer.status == 408


def test_a_head_that_never_comes_whole(client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "HEADER_SECONDS", 0.2)
    with raw(client) as silent, raw(client) as slow:
        slow.sendall(b"GET /health HTTP/1.1\r\nX-")
        began = time.monotonic()
        for connection in (silent, slow):
            with contextlib.suppress(ConnectionResetError):
                assert connection.recv(1) == b""
        assert time.monotonic() - began < 5

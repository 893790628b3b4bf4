"""Queue, clients that leave, deadlines, slow readers, the end."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from plug.errors import PlugError
from plug.serving import jobs

LONG = {"prompt": "花", "max_tokens": 4000}


def open_stream(client: Any, value: Any) -> socket.socket:
    """A connection on which a stream has been asked for."""
    body = json.dumps({**value, "stream": True}).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    connection = socket.create_connection(("127.0.0.1", client.port), timeout=20)
    connection.sendall(head.encode() + body)
    return connection


def read_all(connection: socket.socket) -> str:
    received = b""
    while piece := connection.recv(65_536):
        received += piece
        if b"\r\n0\r\n\r\n" in received:
            break
    connection.close()
    return received.decode()


@pytest.fixture
def busy(scripted_model: Callable[..., Any], serving: Callable[..., Any]) -> Any:
    """A server with two places and a queue of two, both short."""
    model = scripted_model(rows=2, seconds=0.01)
    options = {"max_num_seqs": 2, "max_waiting": 2, "max_waiting_tokens": 50}
    with serving([model], **options) as found:
        yield found


def test_a_full_queue_answers_429_with_the_seconds_to_wait(busy: Any) -> None:
    streams = []
    for expected in range(4):
        streams.append(open_stream(busy, LONG))
        busy.wait_until(lambda n=expected: len(busy.engine.seen) == n + 1)
    busy.wait_until(lambda: busy.service.admission.running == 2)
    status, answer, headers = busy.post("/v1/completions", LONG)
    read_status, _, _ = busy.post("/v1/embeddings", {"input": "花"})

    assert status == 429
    assert answer["error"]["code"] == "queue_full"
    assert 1 <= int(headers["retry-after"]) <= 60
    assert read_status == 404  # no model here embeds; the queue is not even asked
    for stream in streams:
        stream.close()
    busy.wait_until(lambda: not busy.service.is_busy)


def test_the_queue_is_bounded_in_source_tokens_too(busy: Any) -> None:
    streams = [open_stream(busy, LONG) for _ in range(2)]
    busy.wait_until(lambda: busy.service.admission.running == 2)
    streams.append(open_stream(busy, {**LONG, "prompt": "花" * 40}))
    busy.wait_until(lambda: busy.service.admission.waiting_tokens == 40)

    assert busy.post("/v1/completions", {**LONG, "prompt": "花" * 11})[0] == 429
    for stream in streams:
        stream.close()


def test_an_idle_server_takes_a_prompt_of_any_size(busy: Any) -> None:
    assert busy.post("/v1/completions", {"prompt": "花" * 60, "max_tokens": 1})[0] == 200


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_place_within_two_steps(client: Any, stream: bool) -> None:
    client.engine.seconds = 0.05
    body = json.dumps({**LONG, "stream": stream}).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", client.port)) as connection:
        connection.sendall(head.encode() + body)
        client.wait_until(lambda: client.engine.steps > 2)
        steps = client.engine.steps
    client.wait_until(lambda: not client.engine.running)

    assert client.engine.steps <= steps + 2
    client.wait_until(lambda: not client.service.jobs)
    assert not client.service.is_busy


def test_many_clients_that_leave_at_random_leave_nothing(client: Any) -> None:
    client.engine.seconds = 0.001

    def come_and_go(number: int) -> None:
        for each in range(10):
            connection = open_stream(client, {**LONG, "n": 1 + each % 3})
            if (number + each) % 2:
                connection.recv(100)
            connection.close()

    threads = [threading.Thread(target=come_and_go, args=(each,)) for each in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    client.wait_until(lambda: not client.service.is_busy and not client.service.jobs)
    client.wait_until(lambda: not client.engine.running and not client.engine.waiting)

    assert client.service.admission.waiting_tokens == 0


def test_a_request_that_takes_too_long_is_504(
    scripted_model: Callable[..., Any], serving: Callable[..., Any]
) -> None:
    with serving([scripted_model(seconds=0.05)], request_timeout=0.3) as client:
        status, answer, _ = client.post("/v1/completions", LONG)
        stream = read_all(open_stream(client, LONG))
        client.wait_until(lambda: not client.engine.running)

    assert status == 504
    assert answer["error"]["code"] == "request_timeout"
    assert '"code":"request_timeout"' in stream
    assert "[DONE]" not in stream


def test_a_slow_reader_stalls_nobody_and_is_cut_off(
    client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "MAX_UNREAD", 500)
    client.engine.seconds = 0.001
    slow = socket.socket()
    slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    slow.connect(("127.0.0.1", client.port))
    body = json.dumps({**LONG, "n": 4, "stream": True, "max_tokens": 4096}).encode()
    slow.sendall(
        b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n" % len(body) + body
    )
    client.wait_until(lambda: client.engine.running)
    began = time.monotonic()
    assert client.post("/v1/completions", {"prompt": "花", "max_tokens": 5})[0] == 200
    assert time.monotonic() - began < 15
    client.wait_until(lambda: not client.service.jobs, 60)  # long before all is written

    assert client.service.metrics.completion_tokens._value.get() < 4 * 4096
    slow.close()


def test_an_engine_that_fails_is_an_error_of_that_request(client: Any) -> None:
    client.engine.fails = PlugError("显存用完了。")
    status, answer, _ = client.post("/v1/completions", LONG)

    assert status == 500
    assert answer["error"] == {
        "message": "显存用完了。",
        "type": "server_error",
        "param": None,
        "code": "engine_error",
    }
    assert client.post("/v1/completions", {**LONG, "max_tokens": 1})[0] == 200


def test_a_text_that_fails_in_a_stream_is_an_error_event(client: Any) -> None:
    client.engine.seconds = 0.02
    connection = open_stream(client, {**LONG, "n": 2})
    client.wait_until(lambda: client.engine.steps > 2)
    client.engine.seen[0].listener(jobs.End(None, PlugError("写作时出错。")))
    stream = read_all(connection)

    assert 'data: {"error":{"message":' in stream
    assert "[DONE]" not in stream
    assert '"code":"engine_error"' in stream
    client.wait_until(lambda: client.engine.seen[1].is_cancelled)  # the other text too


def test_text_that_was_held_back_comes_without_a_token(client: Any) -> None:
    client.engine.seconds = 0.02
    connection = open_stream(client, LONG)
    client.wait_until(lambda: client.engine.steps > 2)
    text = client.engine.seen[0]
    text.cancel()
    text.listener(jobs.Piece("尾", ()))
    text.listener(jobs.End("stop"))
    stream = read_all(connection)

    assert '"text":"\\u5c3e"' in stream
    assert '"finish_reason":"stop"' in stream
    assert "[DONE]" in stream


def test_a_bug_with_one_text_is_no_matter_of_the_others(
    client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    client.engine.seconds = 0.02
    connection = open_stream(client, {"prompt": "花", "max_tokens": 30})
    client.wait_until(lambda: client.engine.running)

    def fail(*_: Any) -> None:
        raise ZeroDivisionError

    client.engine.seen[0].listener = lambda _: None  # the first goes on unheard
    first = next(iter(client.service.jobs))
    monkeypatch.setattr(first, "_observer", type("Failing", (), {
        "on_tokens": fail, "on_choice_end": lambda *_: None, "on_end": lambda *_: None
    })())  # fmt: skip
    client.engine.seen[0].listener = client.service._bridge.listener(first, first.choices[0])
    assert client.post("/v1/completions", {"prompt": "花", "max_tokens": 3})[0] == 200
    assert '"code":"internal_error"' in read_all(connection)
    client.service.jobs.clear()


def test_a_dead_engine_is_unhealthy(client: Any) -> None:
    assert client.get("/health")[0] == 200
    client.engine.close()

    assert client.get("/health")[0] == 503
    assert client.get("/ready")[0] == 503


def test_running_streams_end_whole_before_the_server_does(client: Any) -> None:
    client.engine.seconds = 0.01
    connection = open_stream(client, {"prompt": "花", "max_tokens": 60})
    client.wait_until(lambda: client.engine.running)
    client.call(client.server.drain)
    client.wait_until(lambda: client.service.admission.is_draining)

    assert client.get("/health")[0] == 200
    assert client.get("/ready")[0] == 503
    status, answer, headers = client.post("/v1/completions", LONG)
    assert (status, answer["error"]["code"]) == (503, "shutting_down")
    assert "retry-after" in headers
    stream = read_all(connection)
    assert "[DONE]" in stream
    assert stream.count('"text":') == 61
    client.wait_until(lambda: client.server.should_exit)


def test_what_is_not_done_in_time_is_cut_with_an_error_event(
    scripted_model: Callable[..., Any], serving: Callable[..., Any]
) -> None:
    with serving([scripted_model(seconds=0.01)], shutdown_timeout=0.2) as client:
        connection = open_stream(client, LONG)
        client.wait_until(lambda: client.engine.running)
        client.call(client.server.drain)
        stream = read_all(connection)

    assert '"code":"shutting_down"' in stream
    assert "[DONE]" not in stream


def test_a_silent_stream_is_kept_alive(client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("plug.serving.streaming.ALIVE_SECONDS", 0.02)
    client.engine.seconds = 0.3
    stream = read_all(open_stream(client, {"prompt": "花", "max_tokens": 2}))

    assert ": \n\n" in stream
    assert stream.rstrip().endswith("0") and "[DONE]" in stream  # noqa: PT018


def test_a_unix_socket(
    scripted_model: Callable[..., Any], serving: Callable[..., Any], tmp_path: Any
) -> None:
    path = tmp_path / "plug.sock"
    with serving([scripted_model()], uds=str(path)):
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(path))
            connection.sendall(b"GET /ready HTTP/1.1\r\nHost: plug\r\n\r\n")
            assert connection.recv(12) == b"HTTP/1.1 200"
        assert path.stat().st_mode & 0o777 == 0o660

    assert not path.exists()


def test_a_model_that_is_unloaded_ends_its_texts_and_gives_its_name_away(
    scripted_model: Callable[..., Any], serving: Callable[..., Any], tmp_path: Path
) -> None:
    """Whoever found the old one, and was slow, is told that there is no such model."""
    (tmp_path / "other").mkdir()
    old, new = (scripted_model("other", seconds=0.01) for _ in range(2))
    closed = threading.Event()
    old.on_close = closed.set
    left = [new, old]
    with serving([scripted_model()], models_dir=str(tmp_path)) as client:
        client.service._loader = lambda _name, _directory: left.pop()
        text = {**LONG, "model": "other"}
        assert client.post("/v1/models/load", {"name": "other"})[0] == 200
        first = open_stream(client, text)
        client.wait_until(lambda: old.engine.running)
        unloading = threading.Thread(
            target=client.post, args=("/v1/models/unload", {"name": "other"})
        )
        unloading.start()
        client.wait_until(lambda: "other" not in client.service.models)
        client.service.models["late"] = old  # as `find` gave it before
        late = client.post("/v1/completions", {**text, "model": "late"})
        del client.service.models["late"]
        assert client.post("/v1/models/load", {"name": "other"})[0] == 200
        second = open_stream(client, text)
        client.wait_until(lambda: new.engine.running)
        was_closed = closed.is_set()
        first.close()
        assert closed.wait(20), "the new model's texts are not the old one's"
        second.close()
        unloading.join()

    assert not was_closed
    assert late[0] == 404
    assert "没有模型 other" in late[1]["error"]["message"]

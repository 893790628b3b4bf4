"""A server on a loopback port, with an engine that follows a script."""

from __future__ import annotations

import asyncio
import http.client
import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("prometheus_client")

from plug.errors import PlugError
from plug.generation.settings import GenerationSettings
from plug.serving.app import create_app
from plug.serving.jobs import Alternative, End, Listener, Piece
from plug.serving.models import ServedModel
from plug.serving.server import Server, listen
from plug.serving.service import Service
from plug.serving.settings import ServeSettings
from plug.tokenization import PlugTokenizer

TEXT = "今天天气很好，我们去公园看花。"


class Text:
    """A text that the scripted engine writes."""

    def __init__(
        self, prompt: Sequence[int], settings: GenerationSettings, seed: int, listener: Listener
    ) -> None:
        self.prompt, self.settings, self.seed, self.listener = prompt, settings, seed, listener
        self.written = 0
        self.is_cancelled = False

    def cancel(self) -> None:
        self.is_cancelled = True


class ScriptedEngine:
    """Writes `TEXT` over and over, a token a step for each of at most ``rows`` texts.

    Attributes:
        seconds: of a step.
        steps: taken so far.
        running: texts being written now.
        seen: all that was submitted.
        fails: the error that the next submission gets.
    """

    def __init__(self, tokenizer: PlugTokenizer, rows: int = 4, seconds: float = 0.0) -> None:
        self.script = [(each, tokenizer.decode([each])) for each in tokenizer.encode(TEXT)]
        self.seconds, self.rows = seconds, rows
        self.steps = 0
        self.waiting: list[Text] = []
        self.running: list[Text] = []
        self.seen: list[Text] = []
        self.fails: PlugError | None = None
        self.is_alive = True
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def submit(
        self, prompt: Sequence[int], settings: GenerationSettings, seed: int, listener: Listener
    ) -> Text:
        if self.fails is not None:
            error, self.fails = self.fails, None
            raise error
        text = Text(prompt, settings, seed, listener)
        self.seen.append(text)
        with self._changed:
            self.waiting.append(text)
            self._changed.notify()
        return text

    def close(self) -> None:
        with self._changed:
            self.is_alive = False
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while self.is_alive:
            with self._changed:
                self.running = [each for each in self.running if not each.is_cancelled]
                self.waiting = [each for each in self.waiting if not each.is_cancelled]
                while self.waiting and len(self.running) < self.rows:
                    self.running.append(self.waiting.pop(0))
                if not self.running:
                    self._changed.wait(0.05)
                    continue
            self.steps += 1
            for text in list(self.running):
                token_id, piece = self.script[text.written % len(self.script)]
                text.written += 1
                wanted = getattr(text.settings, "logprobs", None)
                more = {}
                if wanted is not None:
                    top = [Alternative(token_id - each, -0.5 - each) for each in range(wanted)]
                    more = {"logprobs": (-0.5 - text.seed % 7,), "alternatives": (top,)}
                text.listener(Piece(piece, (token_id,), **more))
                if text.written >= text.settings.out_length:
                    self.running.remove(text)
                    text.listener(End("length"))
            if self.seconds:
                time.sleep(self.seconds)


@dataclass
class Client:
    """Talks to a server on a loopback port."""

    port: int
    service: Service
    engine: ScriptedEngine
    server: Server
    headers: dict[str, str] = field(default_factory=dict)
    _connections: list[http.client.HTTPConnection] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def request(
        self, method: str, path: str, body: bytes | None = None, **headers: str
    ) -> http.client.HTTPResponse:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        self._connections.append(connection)
        all_headers = {**self.headers, **{k.replace("_", "-"): v for k, v in headers.items()}}
        connection.request(method, path, body, all_headers)
        return connection.getresponse()

    def post(self, path: str, value: Any, **headers: str) -> tuple[int, Any, dict[str, str]]:
        """Status, JSON and headers of the answer; ``value`` is sent as it is where it is bytes."""
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        answer = self.request("POST", path, body, **{"Content_Type": "application/json", **headers})
        return answer.status, json.loads(answer.read()), _lowered(answer)

    def get(self, path: str, **headers: str) -> tuple[int, str, dict[str, str]]:
        answer = self.request("GET", path, **headers)
        return answer.status, answer.read().decode(), _lowered(answer)

    def close(self) -> None:
        for connection in self._connections:
            connection.close()

    def call(self, function: Callable[..., Any], *args: Any) -> None:
        """Run a function on the server's loop."""
        assert self.server._loop is not None
        self.server._loop.call_soon_threadsafe(function, *args)

    def wait_until(self, condition: Callable[[], bool], seconds: float = 10.0) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, "it did not come to pass"
            time.sleep(0.005)


def _lowered(answer: http.client.HTTPResponse) -> dict[str, str]:
    return {name.lower(): value for name, value in answer.getheaders()}


@pytest.fixture(scope="session")
def scripted_model(tiny_tokenizer: PlugTokenizer) -> Callable[..., ServedModel]:
    """`scripted_model(rows=…, seconds=…)`: a model without weights."""

    def make(name: str = "plug-test", **options: Any) -> ServedModel:
        engine = ScriptedEngine(tiny_tokenizer, **options)

        def encode(text: str) -> list[int]:
            if not text.strip():
                from plug.errors import UsageError

                raise UsageError("要续写的文字是空的，或只有空白。请给出至少一个字。")
            return tiny_tokenizer.encode(text)

        return ServedModel(
            name,
            tiny_tokenizer,
            max_source_tokens=62,
            token_count=tiny_tokenizer.vocab_size,
            engine=engine,
            encode_prompt=encode,
            check_alive=lambda: engine.is_alive,
            on_close=engine.close,
        )

    return make


@contextmanager
def running(models: list[ServedModel], settings: ServeSettings) -> Iterator[Client]:
    """A server in a thread."""
    app = create_app(models, settings)
    server = Server(app)
    with listen(settings) as listening:
        thread = threading.Thread(
            target=lambda: asyncio.run(server.serve(sockets=[listening])), daemon=True
        )
        thread.start()
        while not server.started:
            time.sleep(0.002)
        engine: Any = models[0].engine
        port = listening.getsockname()[1] if settings.uds is None else 0
        client = Client(port, app.state.service, engine, server)
        yield client
        client.close()
        server.should_exit = server.force_exit = True
        thread.join(10)
        app.state.service.close()
        assert not thread.is_alive()


@pytest.fixture(scope="session")
def serving() -> Callable[..., Any]:
    """`with serving([model], port=0, …) as client:`."""

    def start(models: list[ServedModel], **options: Any) -> Any:
        return running(models, ServeSettings(**{"port": 0, **options}))

    return start


@pytest.fixture
def client(
    scripted_model: Callable[..., ServedModel], serving: Callable[..., Any]
) -> Iterator[Client]:
    """A server with one scripted model and the usual settings."""
    with serving([scripted_model()]) as found:
        yield found

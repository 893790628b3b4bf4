"""`serve`: the application on uvicorn, with an orderly end.

SIGTERM or Ctrl-C: `/ready` answers 503, nothing new is taken, what runs is finished (for
`shutdown_timeout` seconds at most), then the process ends. A second signal ends it at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import socket
import stat
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI
from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from plug.errors import PlugError, UsageError
from plug.serving.app import create_app
from plug.serving.models import ServedModel
from plug.serving.record import JsonLines, log_event, logger
from plug.serving.service import Loader, Service
from plug.serving.settings import ServeSettings
from plug.serving.streaming import ABORT

if sys.platform != "win32":
    import resource

HEADER_SECONDS = 20.0  # for the head of a request to arrive whole (slow loris)
IDLE_SECONDS = 65  # a kept connection without a request; longer than a proxy's 60
_CONNECTIONS = 65_536  # open files wanted
_LAST_SECONDS = 5  # for answers to be sent when all is done


def serve(
    models: Sequence[ServedModel],
    settings: ServeSettings,
    loader: Loader | None = None,
    on_started: Callable[[str], None] | None = None,
    *,
    ends_with_engines: bool = False,
) -> None:
    """Serve until a signal ends it.

    Args:
        models: as in `create_app`, as are the next two.
        settings: see ``models``.
        loader: see ``models``.
        on_started: called with the address when the server listens.
        ends_with_engines: end when a model's engine has died, where `/health` would say so.

    Raises:
        UsageError: the address or the path cannot be listened on.
        PlugError: an engine has died.
    """
    _allow_many_connections()
    app = create_app(models, settings, loader)
    with listen(settings) as listening:
        set_up_logs()
        server = Server(app, on_started, ends_with_engines=ends_with_engines)
        try:
            server.run(sockets=[listening])
            if ends_with_engines and not server.service.is_alive:
                raise PlugError("写作的线程已停止，服务结束。原因见上面的日志。")
        finally:
            server.service.close()


class Server(uvicorn.Server):
    """uvicorn's, but a signal first lets what runs end."""

    def __init__(
        self,
        app: FastAPI,
        on_started: Callable[[str], None] | None = None,
        *,
        ends_with_engines: bool = False,
    ) -> None:
        super().__init__(_config(app))
        self._ends_with_engines = ends_with_engines
        self._on_started = on_started
        self.service: Service = app.state.service
        self._draining: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        freeze_heap()
        await super().startup(sockets)
        settings = self.service.settings
        where = address(settings, sockets[0]) if sockets else ""
        if self._on_started is not None:
            self._on_started(where)
        log_event(
            logging.INFO,
            event="started",
            address=where,
            models=list(self.service.models),
            has_key=bool(settings.api_key),
        )

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002
        """On a signal; uvicorn sets it as the handler."""
        if self._loop is None or self._draining is not None:
            self.should_exit = self.force_exit = True
        else:
            self._loop.call_soon_threadsafe(self.drain)

    def drain(self) -> None:
        """Begin the end; on the loop."""
        if self._draining is None:
            log_event(logging.INFO, event="draining", running=len(self.service.jobs))
            self._draining = asyncio.get_running_loop().create_task(self._drain())

    async def on_tick(self, counter: int) -> bool:
        """Called by uvicorn ten times a second; True ends the server."""
        if self._ends_with_engines and not self.service.is_alive:
            self.drain()
        return await super().on_tick(counter)

    async def _drain(self) -> None:
        await self.service.drain()
        self.should_exit = True


def _config(app: FastAPI) -> Config:
    return Config(
        app,
        http=Protocol,
        loop="auto",  # uvloop where it is installed
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=IDLE_SECONDS,
        timeout_graceful_shutdown=_LAST_SECONDS,
    )


class Protocol(HttpToolsProtocol):
    """uvicorn's, which waits for ever for the head of a request, with a time limit."""

    _waiting: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wait()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.cycle is None or self.cycle.response_complete:
            self._wait()  # a part of a head
        else:
            self._stop_waiting()
            self.cycle.scope[ABORT] = self.transport.abort  # type: ignore[literal-required]

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def _wait(self) -> None:
        if self._waiting is None and not self.transport.is_closing():
            self._waiting = self.loop.call_later(HEADER_SECONDS, self.transport.abort)

    def _stop_waiting(self) -> None:
        if self._waiting is not None:
            self._waiting.cancel()
            self._waiting = None


@contextlib.contextmanager
def listen(settings: ServeSettings) -> Iterator[socket.socket]:
    """The socket to listen on; a Unix socket's file is removed at the end.

    Raises:
        UsageError: the address is in use, or not one of this machine.
    """
    if settings.uds is None:
        family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
        listening = socket.socket(family, socket.SOCK_STREAM)
        if sys.platform != "win32":  # where it would share the port with another server
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        place: Any = (settings.host, settings.port)
        name = f"{settings.host}:{settings.port}"
    elif sys.platform == "win32":
        raise UsageError("--uds 在 Windows 上不能用。请用 --host 和 --port。")
    else:
        path = Path(settings.uds)
        _remove_dead_socket(path)
        listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        place = str(path)
        name = f"--uds {path}"
    try:
        listening.bind(place)
        if settings.uds is not None:
            Path(settings.uds).chmod(0o660)
    except OSError as error:
        listening.close()
        raise UsageError(
            f"不能在 {name} 上监听：{error.strerror or error}。请换一个 --host、--port 或 --uds。"
        ) from None
    try:
        yield listening
    finally:
        listening.close()
        if settings.uds is not None:
            Path(settings.uds).unlink(missing_ok=True)


def address(settings: ServeSettings, listening: socket.socket) -> str:
    """Where the server can be reached."""
    if settings.uds is not None:
        return f"unix:{settings.uds}"
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    return f"http://{host}:{listening.getsockname()[1]}"


def set_up_logs() -> None:
    """JSON lines on standard error: requests, and what libraries warn of."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines())
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
    logger.setLevel(logging.INFO)


def freeze_heap() -> None:
    """Leave what is loaded by now out of garbage collections.

    Else each full one goes through the objects of all libraries, and stops the engine's thread for
    0.2 s and more.
    """
    gc.collect()
    gc.freeze()


def _remove_dead_socket(path: Path) -> None:
    """Remove a socket file that a killed server left.

    Raises:
        UsageError: somebody listens there, or the path is something else.
    """
    try:
        mode = path.stat().st_mode
    except OSError:
        return
    if not stat.S_ISSOCK(mode):
        raise UsageError(f"--uds {path} 已存在，而且不是套接字。请换一个路径。")
    if sys.platform != "win32":  # there `listen` has refused
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as trial:
            try:
                trial.connect(str(path))
            except OSError:
                path.unlink(missing_ok=True)
                return
    raise UsageError(f"--uds {path} 上已有服务。请先停掉它，或换一个路径。")


def _allow_many_connections() -> None:
    if sys.platform != "win32":  # has no such limit
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = _CONNECTIONS if hard == resource.RLIM_INFINITY else min(_CONNECTIONS, hard)
        if soft != resource.RLIM_INFINITY and soft < wanted:
            with contextlib.suppress(ValueError, OSError):
                resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))

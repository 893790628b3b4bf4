"""`plug serve --replicas N`: N copies of the server behind the proxy of Ray Serve (extra `ray`).

Ray spreads requests, asks each copy for its health and replaces it when it is not well. Each copy
has the application of `app.py` with its own queue; a stream passes through as it is written.
SIGHUP replaces all copies, one after the other, while the others serve. SIGTERM or Ctrl-C ends
them as it ends one server: nothing new is taken, what runs is finished.
"""

from __future__ import annotations

import contextlib
import logging
import re
import signal
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from plug.errors import PlugError, UsageError
from plug.serving.record import log_event
from plug.serving.server import freeze_heap, listen, set_up_logs
from plug.serving.settings import ServeSettings

_APPLICATION = _DEPLOYMENT = "plug"
_HEALTH_SECONDS = 5.0  # between two questions
_LAST_SECONDS = 5.0  # for a copy to say that it has drained


@dataclass(frozen=True, kw_only=True, slots=True)
class Models:
    """What each copy loads; see `plug.serving.loading.load_models`."""

    name: str
    directory: str
    finetuned: Mapping[str, str]
    adapters: Mapping[str, str]
    device: str
    dtype: Any


class Replica:
    """One copy, as Ray Serve drives it.

    Args:
        models: to load.
        settings: of the server.
        generation: another number makes another version of the copy.
    """

    def __init__(self, models: Models, settings: ServeSettings, generation: int) -> None:  # noqa: ARG002
        import torch

        from plug.serving.app import create_app
        from plug.serving.loading import limit_memory, load_models

        device = torch.device(models.device)
        limit_memory(device, settings.gpu_memory_utilization)
        loaded, loader = load_models(
            models.name,
            models.directory,
            models.finetuned,
            models.adapters,
            settings,
            device=device,
            dtype=models.dtype,
        )
        self._app = create_app(loaded, settings, loader)
        set_up_logs()  # into the files that Ray keeps of each process
        freeze_heap()

    def __serve_build_asgi_app__(self) -> Any:
        """Ray's name for what answers requests."""
        return self._app

    def check_health(self) -> None:
        """Ray's question; an error has the copy replaced."""
        if not self._app.state.service.is_alive:
            raise PlugError("写作的线程已停止。")

    async def drain(self) -> None:
        """Take nothing new, and wait for what runs; called by `serve_replicas` at the end."""
        await self._app.state.service.drain()


def serve_replicas(
    models: Models, settings: ServeSettings, on_started: Callable[[str], None]
) -> None:
    """Serve until SIGTERM or Ctrl-C.

    Args:
        models: that each copy loads.
        settings: of the server.
        on_started: called with the address when all copies are ready.

    Raises:
        UsageError: Ray's proxy cannot do what the settings ask for, or the port is in use.
        PlugError: Ray is not installed, or the copies did not start.
    """
    if settings.uds is not None:
        raise UsageError("--replicas 不能和 --uds 一起用。请用 --host 和 --port。")
    with listen(settings) as trial:  # Ray would refuse a port in use with a traceback
        port = trial.getsockname()[1]
    try:
        import ray
        from ray import serve
    except ModuleNotFoundError as error:
        raise PlugError(f'缺少 {error.name}。请安装：pip install "plug-zh[serve,ray]"') from None
    changed, is_over = threading.Event(), threading.Event()

    def end(*_: int | FrameType | None) -> None:
        is_over.set()
        changed.set()

    def run(generation: int) -> None:
        options = {
            "num_replicas": settings.replicas,
            # The copies refuse with 429 by themselves.
            "max_ongoing_requests": 2 * (settings.max_num_seqs + settings.max_waiting),
            "graceful_shutdown_timeout_s": settings.shutdown_timeout,
            "health_check_period_s": _HEALTH_SECONDS,
            "ray_actor_options": {"num_cpus": 0, "num_gpus": int(models.device != "cpu")},
        }
        deployment = serve.deployment(serve.ingress()(Replica), name=_DEPLOYMENT, **options)
        serve.run(deployment.bind(models, settings, generation), name=_APPLICATION)

    ray.init(include_dashboard=False, log_to_driver=False, configure_logging=False)
    try:
        serve.start(http_options={"host": settings.host, "port": port})
        try:
            run(0)
        except RuntimeError as error:
            reason = _reason_of(serve.status().applications[_APPLICATION]) or str(error)
            raise PlugError(f"{settings.replicas} 个副本没有起来：{reason}") from None
        signal.signal(signal.SIGTERM, end)
        signal.signal(signal.SIGINT, end)
        if sys.platform != "win32":
            signal.signal(signal.SIGHUP, lambda *_: changed.set())
        set_up_logs()
        on_started(f"http://{settings.host}:{port}")
        generation = 0
        while True:
            changed.wait()
            changed.clear()
            if is_over.is_set():
                break
            generation += 1
            run(generation)
            log_event(logging.INFO, event="replaced", replicas=settings.replicas)
        log_event(logging.INFO, event="draining", replicas=settings.replicas)
        with contextlib.suppress(ray.exceptions.RayError, TimeoutError):  # a copy died meanwhile
            copies = serve.get_deployment_handle(_DEPLOYMENT, _APPLICATION)
            copies.broadcast("drain").results(timeout_s=settings.shutdown_timeout + _LAST_SECONDS)
        serve.delete(_APPLICATION)  # when the last answers have passed through the proxy
    finally:
        serve.shutdown()
        ray.shutdown()


def _reason_of(application: Any) -> str:
    """What a copy's start ended with, where it was one of the package's errors; else ""."""
    messages = [deployment.message for deployment in application.deployments.values()]
    found = re.findall(r"^plug\.errors\.\w+: (.+)$", "\n".join(messages), re.MULTILINE)
    return found[-1] if found else ""


def resolved(directory: str) -> str:
    """A directory by its whole path, since copies run elsewhere; a model's name as it is."""
    path = Path(directory).expanduser()
    return str(path.resolve()) if path.exists() else directory

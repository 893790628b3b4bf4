"""Two copies behind Ray Serve's proxy; without Ray only what needs none."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from plug.errors import PlugError, UsageError
from plug.generation.generator import Generator
from plug.serving.replicas import Models, Replica, _reason_of, resolved, serve_replicas
from plug.serving.settings import ServeSettings

has_ray = importlib.util.find_spec("ray") is not None


def models_of(directory: Path) -> Models:
    return Models(
        name="m", directory=str(directory), finetuned={}, adapters={}, device="cpu", dtype=None
    )


def test_a_copy_is_well_as_long_as_its_engines_run(
    model_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("plug.serving.replicas.set_up_logs", lambda: None)  # pytest has its own
    copy = Replica(models_of(model_directory), ServeSettings(max_num_seqs=2, replicas=2), 0)
    app: Any = copy.__serve_build_asgi_app__()
    copy.check_health()
    app.state.service.close()

    with pytest.raises(PlugError, match="已停止"):
        copy.check_health()


def test_directories_are_found_from_elsewhere(
    model_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(model_directory.parent)
    assert resolved(model_directory.name) == str(model_directory.resolve())
    assert resolved("plug-mini-zh") == "plug-mini-zh"


def test_why_the_copies_did_not_start() -> None:
    message = (
        "A replica failed to start with exception. Retrying 2 more time(s). Error:\n"
        "Traceback (most recent call last):\n"
        "plug.errors.UsageError: 找不到模型 /nowhere。\n"
    )

    def application(message: str) -> Any:
        return SimpleNamespace(deployments={"plug": SimpleNamespace(message=message)})

    assert _reason_of(application(message)) == "找不到模型 /nowhere。"
    assert _reason_of(application("something else")) == ""


def test_a_port_in_use_is_refused_before_anything_starts(tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        settings = ServeSettings(replicas=2, port=other.getsockname()[1])
        with pytest.raises(UsageError, match=f"127.0.0.1:{settings.port}"):
            serve_replicas(models_of(tmp_path), settings, lambda _: None)


@pytest.mark.skipif(has_ray, reason="Ray is installed")
def test_without_ray_it_says_what_to_install(run_plug: Callable[..., Any]) -> None:
    ran = run_plug("serve", "--replicas", "2", "--port", "0")

    assert ran.status == 1
    assert 'pip install "plug-zh[serve,ray]"' in ran.err


def stream(address: str, begun: threading.Semaphore, **body: Any) -> SimpleNamespace:
    """The text and the number of events of a stream; the first event releases ``begun``."""
    request = urllib.request.Request(
        f"{address}/v1/completions",
        json.dumps({**body, "stream": True}).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        lines = [answer.readline()[6:].strip()]
        begun.release()
        lines += [line[6:].strip() for line in answer if line.startswith(b"data: ")]
    events = [json.loads(line) for line in lines if line != b"[DONE]"]
    texts = [event["choices"][0]["text"] for event in events]
    return SimpleNamespace(text="".join(texts), count=len(texts), is_whole=lines[-1] == b"[DONE]")


@pytest.mark.skipif(not has_ray, reason="needs Ray: pip install plug-zh[ray]")
def test_streams_pass_through_and_outlive_a_restart_and_the_end(model_directory: Path) -> None:
    with socket.socket() as trial:
        trial.bind(("127.0.0.1", 0))
        port = trial.getsockname()[1]
    command = [sys.executable, "-m", "plug", "serve", "--model", str(model_directory)]
    command += ["--replicas", "2", "--port", str(port), "--device", "cpu"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    environment = os.environ | {"OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    server = subprocess.Popen(command, env=environment, **pipes)
    try:
        assert server.stdout is not None
        assert f"http://127.0.0.1:{port}" in server.stdout.readline()
        address = f"http://127.0.0.1:{port}"
        found: dict[int, SimpleNamespace] = {}
        begun = threading.Semaphore(0)

        def ask(seed: int, length: int) -> None:
            body = {"prompt": "今天天气", "max_tokens": length, "ignore_eos": True, "seed": seed}
            found[seed] = stream(address, begun, **body)

        threads = [threading.Thread(target=ask, args=(seed, 2000)) for seed in range(4)]
        for thread in threads:
            thread.start()
        server.send_signal(signal.SIGHUP)
        assert server.stderr is not None
        replaced = next(line for line in server.stderr if '"replaced"' in line)
        ask(9, 20)
        for thread in threads:
            thread.join(60)
        begun = threading.Semaphore(0)
        threads = [threading.Thread(target=ask, args=(seed, 1000)) for seed in range(10, 14)]
        for thread in threads:
            thread.start()
        for _ in threads:
            assert begun.acquire(timeout=30)
        server.send_signal(signal.SIGTERM)
        for thread in threads:
            thread.join(60)
        server.communicate(timeout=60)
    finally:
        server.kill()
        server.communicate()

    assert json.loads(replaced)["replicas"] == 2
    alone = Generator(model_directory, device="cpu")
    for seed, answer in found.items():
        length = 2000 if seed < 9 else 20 if seed == 9 else 1000
        [expected] = alone(["今天天气"], out_length=length, ignore_eos=True, seed=seed)
        assert answer.is_whole
        assert answer.text == expected.text
    assert found[9].count > 5  # as it was written, not in one piece
    assert server.returncode == 0

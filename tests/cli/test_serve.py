from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--host", "0.0.0.0"], "--allow-unauthenticated"),
        (["--api-key", "short"], "密钥应是 8 个以上"),
        (["--api-key-file", "nowhere"], "读不了密钥文件 nowhere"),
        (["--port", "70000"], "port=70000 应在 0 到 65535 之间"),
        (["--root-path", "plug/"], "root_path='plug/' 应以 / 开头"),
        (["--max-num-seqs", "0"], "max_num_seqs=0"),
        (["--model", "nowhere"], "nowhere"),
        (["--adapter", "x"], "--adapter x 应写成 名字=目录"),
        (["--adapter", "x=nowhere"], "--adapter nowhere 不是适配器的目录"),
        (["--adapter", "a=x", "--finetuned", "a=y"], "有两个模型都叫 a"),
    ],
)
def test_wrong_options_are_one_line(
    run_plug: Callable[..., Any], options: list[str], message: str
) -> None:
    ran = run_plug("serve", *options)

    assert ran.status == 2
    assert message in ran.err
    assert ran.err.count("\n") == 1


def test_an_address_in_use_is_one_line(run_plug: Callable[..., Any], model_directory: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ran = run_plug("serve", "--model", model_directory, "--port", port)

    assert ran.status == 2
    assert f"127.0.0.1:{port}" in ran.err


def test_the_help_names_every_limit(run_plug: Callable[..., Any]) -> None:
    shown = run_plug("serve", "--help").out

    for option in ("--max-waiting-tokens", "--api-key-file", "--shutdown-timeout", "--uds"):
        assert option in shown


def test_the_server_needs_no_transformers() -> None:
    check = (
        "import sys, plug.serving.server, plug.serving.loading\n"
        "print([m for m in ('transformers', 'peft', 'accelerate') if m in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True)

    assert ran.stdout == "[]\n", ran.stderr


def test_a_served_model_answers_and_ends_on_sigterm(model_directory: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "plug",
        "serve",
        "--model",
        str(model_directory),
        "--port",
        "0",
    ]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert server.stderr is not None
        started = json.loads(server.stderr.readline())
        assert started["models"] == ["tiny-model"]
        with urllib.request.urlopen(f"{started['address']}/v1/models", timeout=20) as answer:
            [model] = json.load(answer)["data"]
        assert model["id"] == "tiny-model"
        assert "generate" in model["capabilities"]
        server.send_signal(signal.SIGTERM)
        _, rest = server.communicate(timeout=20)
        assert server.returncode == 0
        assert [json.loads(line)["event"] for line in rest.splitlines()] == ["request", "draining"]
    finally:
        server.kill()
        server.communicate()

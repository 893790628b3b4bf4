"""Nobody has tried Windows yet. What can be known of it on Linux is held here."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

LIKE_WINDOWS = Path(__file__).parent / "like_windows.py"
pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="takes away what Linux has"),
    pytest.mark.slow,
]


def plug(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(LIKE_WINDOWS), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_text_is_written_also_by_a_model_that_was_quantised_there(tmp_path: Path) -> None:
    quantized = plug("quantize", "--model", "plug-mini-zh", "--to", tmp_path / "int8", "--bits", 8)
    assert quantized.returncode == 0, quantized.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["int8"]  # no lock, nothing half written

    for model in ("plug-mini-zh", tmp_path / "int8"):
        written = plug("generate", "春天来了，", "--out-length", 8, "--model", model)
        assert written.returncode == 0, written.stderr
        assert written.stdout.strip()


def test_what_windows_lacks_is_said_in_a_sentence(tmp_path: Path) -> None:
    refused = plug("serve", "--uds", tmp_path / "plug.sock")
    assert refused.returncode == 2
    assert "--uds 在 Windows 上不能用" in refused.stderr

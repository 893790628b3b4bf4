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


def test_what_works_there_and_what_windows_lacks_is_said_in_a_sentence(tmp_path: Path) -> None:
    """Quantised, written with both models; in one process, which takes seconds to start."""
    small = tmp_path / "int8"
    write = ("generate", "春天来了，", "--out-length", 8, "--model")
    ran = plug(
        *("quantize", "--model", "plug-mini-zh", "--to", small, "--bits", 8),
        *("then", *write, "plug-mini-zh", "then", *write, small),
        *("then", "serve", "--uds", tmp_path / "plug.sock"),
    )

    assert [path.name for path in tmp_path.iterdir()] == ["int8"]  # no lock, nothing half written
    assert f"已写入 {small}" in ran.stdout
    texts = ran.stdout.partition(f"已写入 {small}")[2].splitlines()[1:]
    assert len([text for text in texts if text.strip()]) >= 2, ran.stderr
    assert ran.returncode == 2
    assert "--uds 在 Windows 上不能用" in ran.stderr

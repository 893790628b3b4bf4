"""The script that kills every command runs: on one of them, at one of its system calls."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")


@pytest.mark.slow
@pytest.mark.skipif(
    shutil.which("strace") is None or not hasattr(os, "geteuid") or os.geteuid() != 0,
    reason="needs strace, and root to mount a small file system",
)
def test_the_script_finds_no_fault_with_saving() -> None:
    script = Path(__file__).with_name("kills.py")
    ran = subprocess.run(
        [sys.executable, str(script), "--most", "1", "--only", "plug.save"],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    if "strace: attach" in ran.stderr or "mount" in ran.stderr:
        pytest.skip("this container may not trace or mount")
    assert ran.returncode == 0, ran.stderr
    assert "| `plug.save` | 1 of " in ran.stdout

"""Benchmarks in processes of their own: a time limit each, and what went wrong if one fails."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

HERE = Path(__file__).resolve().parent
Found = dict[str, Any]
_TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
_DYING = 5  # seconds between the request for stacks and the end


def launched(count: int, script: str, *options: str) -> list[str]:
    """Return the command that runs a file of this folder in ``count`` processes by `torchrun`."""
    return [*_TORCHRUN, f"--nproc-per-node={count}", str(HERE / script), *options]


def run_part(name: str, command: Sequence[str], limit: float) -> Found:
    """Run a benchmark that writes a JSON line to what follows its `--output`.

    Its own output is passed on. One that takes longer than the limit is ended; each of its
    processes prints its Python stacks first.

    Args:
        name: what it is called in the output.
        command: without `--output`.
        limit: seconds.

    Returns:
        What it wrote, with `wall_s`; `error` besides if it failed.
    """
    began = time.perf_counter()
    print(f"== {name} (limit {limit:.0f} s)", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "line.json"
        process = subprocess.Popen(
            [*command, "--output", str(output)],
            env=os.environ | {"PYTHONFAULTHANDLER": "1", "PYTHONUNBUFFERED": "1"},
        )
        error = None
        try:
            if status := process.wait(limit):
                error = f"exit status {status}"
        except subprocess.TimeoutExpired:
            error = f"not done after {limit:.0f} s"
        finally:
            end(process)
        found: Found = json.loads(output.read_text()) if output.is_file() else {}
    took = time.perf_counter() - began
    print(f"== {name}: {error or 'done'} after {took:.1f} s", flush=True)
    return found | {"wall_s": round(took, 1)} | ({"error": error} if error else {})


def end(process: subprocess.Popen[bytes]) -> None:
    """End a process and all that it started, which may be in sessions of their own."""
    if process.poll() is not None:
        return
    parent = psutil.Process(process.pid)
    everyone = [*parent.children(recursive=True), parent]
    for number in (signal.SIGABRT, signal.SIGKILL):  # the first one prints stacks
        for each in everyone:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.send_signal(number)
        psutil.wait_procs(everyone, timeout=_DYING)
    process.wait()


def write(path: Path | None, line: Found) -> None:
    """Write what is known so far, so that a run that is cut off loses one part alone."""
    if path is not None:
        path.write_text(json.dumps(line, ensure_ascii=False) + "\n", encoding="utf-8")

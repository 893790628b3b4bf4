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
import torch

HERE = Path(__file__).resolve().parent
Found = dict[str, Any]
_TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
_DYING = 5  # seconds between the request for stacks and the end


def torchrun(count: int) -> list[str]:
    """Return the start of a command that `torchrun` runs in ``count`` processes."""
    return [*_TORCHRUN, f"--nproc-per-node={count}"]


def launched(count: int, script: str, *options: str) -> list[str]:
    """Return the command that runs a file of this folder in ``count`` processes."""
    return [*torchrun(count), str(HERE / script), *options]


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
            env=_environment(),
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


def _environment() -> dict[str, str]:
    """Processes that say where they hang, and share the cores: torchrun leaves each of them one."""
    threads = str(max(1, len(os.sched_getaffinity(0)) // max(1, torch.cuda.device_count())))
    own = {"PYTHONFAULTHANDLER": "1", "PYTHONUNBUFFERED": "1"}
    return {"OMP_NUM_THREADS": threads} | os.environ | own


def call(command: Sequence[str], limit: float | None, environment: dict[str, str]) -> str:
    """Run a command to its end; its standard output. Its errors are passed on.

    Raises:
        RuntimeError: it failed, or took longer than so many seconds.
    """
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            out, _ = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"not done after {limit:.0f} s: {list(command)[-6:]}") from None
        finally:
            end(process)
    if process.returncode:
        raise RuntimeError(f"exit status {process.returncode}: {list(command)[-6:]}")
    return out


def end(process: subprocess.Popen[Any], *, asks_for_stacks: bool = True) -> None:
    """End a process and all that it started, which may be in sessions of their own.

    Args:
        process: that may have ended already.
        asks_for_stacks: have each print its Python stacks (`PYTHONFAULTHANDLER=1`) first.
    """
    if process.poll() is not None:
        return
    parent = psutil.Process(process.pid)
    everyone = [parent, *parent.children(recursive=True)]
    for number in [signal.SIGABRT, signal.SIGKILL] if asks_for_stacks else [signal.SIGKILL]:
        for each in everyone:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.send_signal(number)
        psutil.wait_procs(everyone, timeout=_DYING)
    process.wait()


def write(path: Path | None, line: Found) -> None:
    """Write what is known so far, so that a run that is cut off loses one part alone."""
    if path is not None:
        path.write_text(json.dumps(line, ensure_ascii=False) + "\n", encoding="utf-8")

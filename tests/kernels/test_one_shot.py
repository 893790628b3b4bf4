"""Collectives by direct writes, on two GPUs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.gpu
@pytest.mark.multi_gpu
def test_they_give_what_nccl_gives() -> None:
    worker = Path(__file__).with_name("one_shot_worker.py")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(worker)]

    done = subprocess.run([sys.executable, *launcher], capture_output=True, text=True, timeout=120)

    assert done.returncode == 0, done.stderr

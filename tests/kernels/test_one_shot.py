"""Collectives by direct writes, on as many GPUs as there are."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch


@pytest.mark.gpu
@pytest.mark.multi_gpu
@pytest.mark.parametrize("count", [2, 4, 8])
def test_they_give_what_nccl_gives(count: int) -> None:
    if torch.cuda.device_count() < count:
        pytest.skip(f"needs {count} CUDA devices")
    worker = Path(__file__).with_name("one_shot_worker.py")
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]

    done = subprocess.run(
        [sys.executable, *launcher, str(worker)], capture_output=True, text=True, timeout=120
    )

    assert done.returncode == 0, done.stderr

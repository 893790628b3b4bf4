"""Compare `OneShot` with NCCL; `torchrun` starts it, and test_one_shot.py starts that."""

from __future__ import annotations

import torch
import torch.distributed as dist

from plug.distributed.processes import start_processes
from plug.kernels.one_shot import OneShot

with start_processes("cuda") as processes, torch.inference_mode():
    one_shot = OneShot.make(processes.device)
    assert one_shot is not None
    torch.manual_seed(processes.rank)
    for call in range(300):  # sizes in turn, so that a block skips calls
        rows, size = 1 + call % 7, (64, 8192, 1000)[call % 3]
        dtype = (torch.bfloat16, torch.float16)[call % 2]
        x = torch.randn(rows, size, device=processes.device).to(dtype)
        parts = [torch.empty_like(x) for _ in range(processes.world_size)]
        dist.all_gather(parts, x)
        assert torch.equal(one_shot.all_gather(x), torch.cat(parts, -1)), call
        total = sum(part.float() for part in parts).to(dtype)
        assert torch.equal(one_shot.all_reduce(x), total), call
    assert not OneShot.takes(torch.empty(65, 8192, dtype=torch.bfloat16))

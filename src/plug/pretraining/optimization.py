"""The optimiser and its learning rate over time."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import nn

from plug.errors import UsageError
from plug.pretraining.adamw8bit import AdamW8bit
from plug.pretraining.muon import Muon, ShardedMuon

SCHEDULES = ("linear", "cosine", "constant")
OPTIMIZERS = ("adamw", "adamw8bit", "muon")


def learning_rate_scale(step: int, steps: int, warmup_steps: int, schedule: str) -> float:
    """Return the factor on the peak learning rate at ``step``: warm-up, then decay to 0.

    Args:
        step: the step about to be taken, from 0.
        steps: all steps of the run.
        warmup_steps: linear rise over these.
        schedule: "linear", "cosine", or "constant" (no decay).
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    done = (step - warmup_steps) / max(1, steps - warmup_steps)
    if schedule == "linear":
        return 1.0 - done
    if schedule == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * done))
    if schedule == "constant":
        return 1.0
    raise UsageError(f"schedule={schedule!r} 应为 {'、'.join(SCHEDULES)} 之一。")


def build_optimizers(
    model: nn.Module,
    *,
    name: str,
    learning_rate: float,
    betas: tuple[float, float],
    weight_decay: float,
    rank: int = 0,
    world_size: int = 1,
    is_sharded: bool = False,
) -> list[torch.optim.Optimizer]:
    """Return AdamW for all weights, or another one for matrices and AdamW for the rest.

    "adamw8bit" keeps the moments of all matrices in 8 bits; those of vectors, a thousandth of all,
    stay in float32. "muon" takes the layers' matrices.

    Only matrices decay. Muon's update is scaled to the size of AdamW's (`match_rms_adamw`), so one
    learning rate serves both. Source: Jordan et al. 2024 and arXiv 2502.16982.

    Args:
        model: whose weights are trained.
        name: of `OPTIMIZERS`.
        learning_rate: the peak; every step sets its own.
        betas: of AdamW.
        weight_decay: of matrices.
        rank: this process's number.
        world_size: processes that train copies of the model; they share out Muon's work.
        is_sharded: each process holds a shard of every weight.

    Raises:
        UsageError: ``name`` is not in `OPTIMIZERS`.
    """
    if name not in OPTIMIZERS:
        raise UsageError(f"optimizer={name!r} 应为 {'、'.join(OPTIMIZERS)} 之一。")
    trained = [(key, p) for key, p in model.named_parameters() if p.requires_grad]
    in_layers = [p for key, p in trained if ".layers." in key and p.ndim == 2]
    matrices = [p for _, p in trained if p.ndim == 2]
    others = {"muon": in_layers, "adamw8bit": matrices}.get(name, [])
    chosen = {id(p) for p in others}
    rest = [p for _, p in trained if id(p) not in chosen]
    # Tensors of one group may be stepped in one call, which takes those of one mesh.
    together: dict[tuple[bool, Any], list[nn.Parameter]] = {}
    for p in rest:
        key = (p.ndim != 2, getattr(p, "device_mesh", None))
        together.setdefault(key, []).append(p)
    groups = [
        {"params": together[key], "weight_decay": 0.0 if key[0] else weight_decay}
        for key in sorted(together, key=lambda each: each[0])
    ]
    # Fused: one pass over the memory in place of eight, on a CPU too.
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(groups, lr=learning_rate, betas=betas, eps=1e-8, fused=True)
    ]
    if name == "adamw8bit":
        eight = [{"params": matrices, "weight_decay": weight_decay}]
        optimizers.append(AdamW8bit(eight, lr=learning_rate, betas=betas, eps=1e-8))
    if name == "muon" and in_layers:
        settings: dict[str, Any] = {"lr": learning_rate, "weight_decay": weight_decay}
        muon = ShardedMuon if is_sharded else partial(Muon, rank=rank, world_size=world_size)
        optimizers.append(muon(in_layers, adjust_lr_fn="match_rms_adamw", **settings))
    return optimizers

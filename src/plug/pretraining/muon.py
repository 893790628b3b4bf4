"""Muon with the matrices of one shape stacked, and shared out over the processes.

`torch.optim.Muon` takes one matrix after another: 15 small products each, 1,600 launches for a
model of 108 matrices, which cost a quarter of a step of the small model. Stacked they are a few
dozen batched products. The mathematics and the saved state are those of `torch.optim.Muon`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from plug.distributed.fully_sharded import region

MOST_STACKED = 2**26  # elements of one stack, in bf16; larger matrices fill a GPU alone


class Muon(torch.optim.Muon):
    """`torch.optim.Muon` for replicated weights; each process makes a share of the updates.

    Every process holds all momentum, so that a checkpoint is the same whatever their number.

    Args:
        params: matrices.
        rank: this process's number.
        world_size: processes that call `step` together, with the same gradients.
        settings: those of `torch.optim.Muon`.
    """

    def __init__(
        self, params: Iterable[Tensor], *, rank: int = 0, world_size: int = 1, **settings: Any
    ) -> None:
        super().__init__(params, **settings)
        self._rank, self._world_size = rank, world_size

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Take a step; weights without a gradient stay as they are."""
        assert closure is None
        for group in self.param_groups:
            by_shape: dict[tuple[int, ...], list[Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape.setdefault(tuple(sorted(parameter.shape)), []).append(parameter)
            for (short, long), parameters in by_shape.items():
                parameters.sort(key=lambda each: each.shape[0] > each.shape[1])  # the wide first
                size = max(1, MOST_STACKED // (short * long)) * self._world_size
                for start in range(0, len(parameters), size):
                    self._step_together(parameters[start : start + size], group)

    def _step_together(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        """Step with matrices that have one shape, or its transpose."""
        gradients = [each.grad for each in parameters if each.grad is not None]  # all have one
        momenta = [self._momentum(parameter) for parameter in parameters]
        torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
        updates = self._updates(gradients, momenta, group)
        scale = _rate(group["lr"], group["adjust_lr_fn"], parameters[0].shape)
        wide = sum(each.shape[0] <= each.shape[1] for each in parameters)
        torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        # Slices: a list of indices would be copied to the device, and wait for it.
        chosen = ((parameters[:wide], updates[:wide]), (parameters[wide:], updates[wide:].mT))
        for some, stack in chosen:
            if some:
                steps = stack.to(some[0].dtype, memory_format=torch.contiguous_format)
                torch._foreach_add_(some, steps.unbind(), alpha=-scale)

    def _momentum(self, parameter: Tensor) -> Tensor:
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        return state["momentum_buffer"]

    def _updates(
        self, gradients: list[Tensor], momenta: list[Tensor], group: dict[str, Any]
    ) -> Tensor:
        """(matrices, short, long) in bf16; each process makes its share, then all have all."""
        size = -(-len(gradients) // self._world_size)
        mine = slice(self._rank * size, (self._rank + 1) * size)
        ours = gradients[mine]
        if group["nesterov"] and ours:
            ours = list(torch._foreach_lerp(ours, momenta[mine], group["momentum"]))
        elif ours:
            ours = momenta[mine]
        short, long = sorted(gradients[0].shape)
        stack = gradients[0].new_zeros((size, short, long), dtype=torch.bfloat16)
        if ours:  # the last processes may have fewer, or none
            wide = [each if each.shape[0] == short else each.mT for each in ours]
            torch._foreach_copy_(stack[: len(wide)].unbind(), wide)
        stack = orthogonalize(stack, group["ns_coefficients"], group["ns_steps"], group["eps"])
        if self._world_size == 1:
            return stack
        gathered = stack.new_empty((self._world_size, *stack.shape))
        dist.all_gather(list(gathered.unbind()), stack)
        return gathered.flatten(0, 1)[: len(gradients)]


class ShardedMuon(torch.optim.Muon):
    """`Muon` for weights of which each process holds a part: some rows, or some rows and columns.

    Of the matrices of one shape each process gets some whole, makes their updates, and gives each
    process its part of them. So every update is computed once. Momentum stays sharded.

    Args:
        params: matrices, each of whose values one process holds.
        settings: those of `torch.optim.Muon`.
    """

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Take a step; weights without a gradient stay as they are."""
        assert closure is None
        world_size = dist.get_world_size()
        for group in self.param_groups:
            alike: dict[Any, list[Any]] = {}  # of one shape, and parted in one way
            for parameter in group["params"]:
                if parameter.grad is not None:
                    key = (tuple(parameter.shape), parameter.placements)
                    alike.setdefault(key, []).append(parameter)
            for ((rows, columns), _), parameters in alike.items():
                size = max(1, MOST_STACKED // (rows * columns)) * world_size
                for start in range(0, len(parameters), size):
                    self._step_together(parameters[start : start + size], group)

    def _step_together(self, parameters: list[Any], group: dict[str, Any]) -> None:
        mine = [each.to_local() for each in parameters]
        gradients = [each.grad.to_local() for each in parameters]
        momenta = []
        for parameter in parameters:
            state = self.state[parameter]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(parameter)
            momenta.append(state["momentum_buffer"].to_local())
        torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
        updates = momenta
        if group["nesterov"]:
            updates = list(torch._foreach_lerp(gradients, momenta, group["momentum"]))
        scale = _rate(group["lr"], group["adjust_lr_fn"], parameters[0].shape)
        regions = [region(parameters[0], rank) for rank in range(dist.get_world_size())]
        steps = self._updates(updates, parameters[0].shape, regions, group)
        torch._foreach_mul_(mine, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(mine, steps, alpha=-scale)

    def _updates(
        self,
        momenta: list[Tensor],
        shape: torch.Size,
        regions: list[tuple[slice, ...]],
        group: dict[str, Any],
    ) -> list[Tensor]:
        """This process's part of every update, each in the momentum's dtype.

        Args:
            momenta: this process's parts.
            shape: of a whole matrix.
            regions: of it, that each process holds.
            group: of the parameters.
        """
        world_size = dist.get_world_size()
        each = -(-len(momenta) // world_size)  # matrices that a process gets whole
        first = momenta[0]
        # Of all processes' parts of the matrices that a process gets: elements.
        sizes = [each * math.prod(part.stop - part.start for part in parts) for parts in regions]
        sent = first.new_zeros((each * world_size, *first.shape), dtype=torch.bfloat16)
        torch._foreach_copy_(list(sent[: len(momenta)].unbind()), momenta)
        equal = [sent.numel() // world_size] * world_size
        got = sent.new_empty(sum(sizes))
        dist.all_to_all_single(got, sent.flatten(), sizes, equal)
        whole = sent.new_empty((each, *shape))
        for piece, (rows, columns) in zip(got.split(sizes), regions, strict=True):
            target = whole[:, rows, columns]
            target.copy_(piece.view(target.shape))
        is_tall = shape[0] > shape[1]
        stack = whole.mT.contiguous() if is_tall else whole
        stack = orthogonalize(stack, group["ns_coefficients"], group["ns_steps"], group["eps"])
        whole = stack.mT if is_tall else stack
        back = torch.cat([whole[:, rows, columns].flatten() for rows, columns in regions])
        own = torch.empty_like(sent).flatten()
        dist.all_to_all_single(own, back, equal, sizes)
        return [x.to(first.dtype) for x in own.view(sent.shape)[: len(momenta)].unbind()]


def orthogonalize(
    stack: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float
) -> Tensor:
    """Return (n, rows, columns) matrices with their singular values moved towards 1.

    Args:
        stack: in bf16, rows <= columns.
        coefficients: of the quintic a x + b x^3 + c x^5.
        steps: how many times it is applied.
        eps: the smallest norm that is divided by.

    Source: Newton-Schulz as in Jordan et al. 2024, by `torch.optim.Muon`.
    """
    a, b, c = coefficients
    norms = torch.linalg.vector_norm(stack, dim=(1, 2), keepdim=True)
    stack = stack / norms.clamp(min=eps)
    for _ in range(steps):
        gram = stack @ stack.mT
        update = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        stack = torch.baddbmm(stack, update, stack, beta=a)
    return stack


def _rate(rate: float, adjustment: str | None, shape: torch.Size) -> float:
    """Return the rate for matrices of a shape or its transpose."""
    assert adjustment == "match_rms_adamw", "the others differ for a shape and its transpose"
    return float(rate * 0.2 * max(shape) ** 0.5)

"""The gradients of a model in a few flat buffers, summed over the processes during backward.

Each process has a whole copy of the model. One large all-reduce a bucket replaces one a weight, and
runs while backward computes the gradients of the layers below.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from plug.distributed.norms import norm_of

BUCKET_ELEMENTS = 2**23  # 32 MB in float32: large enough for NVLink's full speed


class Gradients:
    """Put gradients into flat buffers, and sum these over the processes.

    Autograd makes a gradient of its own for each weight. A bucket whose weights all have theirs
    copies them at once, and they become views of it: to have autograd add to views from the start
    would cost two operations a weight, which a GPU waits for.

    All processes sum the buckets in one order. That is the order in which backward fills them:
    layers from the last to the first, then what heads and both inputs share.

    Args:
        parameters: by name, those that are trained.
        world_size: processes that hold a copy each.
    """

    def __init__(self, parameters: Iterable[tuple[str, nn.Parameter]], world_size: int) -> None:
        named = [(name, p) for name, p in parameters if p.requires_grad]
        layers = [p for name, p in named if ".layers." in name]
        others = [p for name, p in named if ".layers." not in name]
        self._world_size = world_size
        self._is_last = True
        self._filled: set[nn.Parameter] = set()
        self._buckets = [_Bucket(each) for each in _parted([*reversed(layers), *reversed(others)])]
        self._bucket_of = {p: bucket for bucket in self._buckets for p in bucket.views}
        self._handles = [
            parameter.register_post_accumulate_grad_hook(self._note)
            for parameter in self._bucket_of
        ]
        self.clear()

    def clear(self) -> None:
        """Forget all gradients."""
        for parameter in self._bucket_of:
            parameter.grad = None
        for bucket in self._buckets:
            bucket.work = None
        self._filled.clear()
        self._next = 0
        self.begin(is_last=True)

    def begin(self, *, is_last: bool) -> None:
        """Make ready for a backward pass; the sums over the processes begin in the last one."""
        self._is_last = is_last
        for bucket in self._buckets:
            bucket.missing = len(bucket.views)

    def close(self) -> None:
        """Let go of the weights: hooks would keep them in memory, since nothing collects those."""
        for handle in self._handles:
            handle.remove()
        for parameter in self._bucket_of:
            parameter.grad = None

    def finish(self, max_norm: float) -> Tensor:
        """Wait for the sums, clip their norm to ``max_norm``, and return the norm before that.

        Weights that no loss depended on have ``grad`` None until `clear`, so that optimisers pass
        them over.
        """
        for bucket in self._buckets[self._next :]:
            bucket.take()
            for parameter in bucket.views.keys() - self._filled:
                bucket.views[parameter].zero_()
        self._sum(self._buckets[self._next :])
        for bucket in self._buckets:
            if bucket.work is not None:
                bucket.work.wait()
        norm = norm_of([bucket.flat for bucket in self._buckets])
        scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        for bucket in self._buckets:
            bucket.flat.mul_(scale)
        return norm

    def _note(self, parameter: nn.Parameter) -> None:
        self._filled.add(parameter)
        bucket = self._bucket_of[parameter]
        bucket.missing -= 1
        if bucket.missing:
            return
        bucket.take()
        if not self._is_last:
            return
        ready = self._next
        while ready < len(self._buckets) and not self._buckets[ready].missing:
            ready += 1
        self._sum(self._buckets[self._next : ready])
        self._next = ready

    def _sum(self, buckets: list[_Bucket]) -> None:
        if self._world_size > 1:
            for bucket in buckets:
                bucket.work = dist.all_reduce(bucket.flat, async_op=True)


class _Bucket:
    """Weights whose gradients lie one after another in ``flat``."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        sizes = [parameter.numel() for parameter in parameters]
        self.flat = parameters[0].new_zeros(sum(sizes))
        pieces = self.flat.split(sizes)
        self.views = {p: piece.view_as(p) for p, piece in zip(parameters, pieces, strict=True)}
        self.missing = len(parameters)  # gradients, in this backward pass
        self.work: dist.Work | None = None

    def take(self) -> None:
        """Have the gradients that autograd made in ``flat``."""
        new = [
            (parameter, view, parameter.grad)
            for parameter, view in self.views.items()
            if parameter.grad is not None and parameter.grad is not view
        ]
        if new:
            parameters, views, gradients = zip(*new, strict=True)
            torch._foreach_copy_(views, gradients)
            for parameter, view in zip(parameters, views, strict=True):
                parameter.grad = view


def _parted(parameters: list[nn.Parameter]) -> list[list[nn.Parameter]]:
    parts: list[list[nn.Parameter]] = [[]]
    for parameter in parameters:
        if sum(p.numel() for p in parts[-1]) + parameter.numel() > BUCKET_ELEMENTS and parts[-1]:
            parts.append([])
        parts[-1].append(parameter)
    return parts

"""DeepSpeed's ZeRO-3: parameters are partitioned among processes, and modules gather their own.

transformers sets it up; here is what the rest of the project needs to know of it. deepspeed is
imported where a model is partitioned.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn


def is_partitioned(model: nn.Module) -> bool:
    """Return whether each process holds a part of each parameter of ``model``."""
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())


@contextmanager
def whole(parameters: Iterable[Tensor]) -> Iterator[None]:
    """In its block partitioned ``parameters`` are whole in every process, to be read.

    Calling a module that owns one of them ends that: the module frees what it has gathered.
    """
    parameters = [each for each in parameters if hasattr(each, "ds_id")]
    if not parameters:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(parameters, modifier_rank=None):
        yield

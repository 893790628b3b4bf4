"""A model directory into a model whose layers are sharded, and back, without a whole copy of it.

Each process reads its own rows of each tensor. To save, tensors are gathered one at a time, and the
first process writes them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from plug.checkpoints.headers import read_places
from plug.checkpoints.weights import (
    MAX_SHARD_BYTES,
    TensorSpec,
    WeightWriter,
    check_finite,
    check_names_and_shapes,
)
from plug.distributed.fully_sharded import as_shard, gathered, own_region
from plug.distributed.tensor_parallel import shard_shape
from plug.loading.transfer import Part, Transfer


def fill(
    model: nn.Module,
    directory: Path,
    device: torch.device,
    saved_name: Callable[[str], str] = lambda name: name,
    *,
    partly: bool = False,
) -> set[str]:
    """Give every sharded parameter that has no memory its own rows, read from ``directory``.

    Args:
        model: of `plug.distributed.fully_sharded.shard`.
        directory: of the weights.
        device: where shards are kept.
        saved_name: given a parameter's name, returns the tensor's in the directory.
        partly: leave parameters that the directory lacks without memory.

    Returns:
        The names of the parameters that were read.

    Raises:
        PlugError: tensors are missing, have another shape, are damaged, or NaN or infinite.
    """
    places = read_places(directory)
    wanted = {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.is_meta and isinstance(parameter, DTensor)
        if not partly or saved_name(name) in places
    }
    shapes = {saved_name(name): tuple(parameter.shape) for name, parameter in wanted.items()}
    found = {name: places[name].spec.shape for name in shapes if name in places}
    check_names_and_shapes(directory, found, shapes)
    regions = {name: own_region(parameter) for name, parameter in wanted.items()}
    local = {
        name: torch.empty(
            shard_shape(regions[name], tuple(parameter.shape)),
            dtype=parameter.dtype,
            device=device,
        )
        for name, parameter in wanted.items()
    }
    with Transfer(device) as transfer:
        transfer.fill(
            Part(places[saved_name(name)], target, regions[name][:2])
            for name, target in local.items()
            if target.numel()  # a process may have no rows of a small tensor
        )
    check_finite(directory, local.items())
    model.load_state_dict(
        {name: as_shard(tensor, wanted[name]) for name, tensor in local.items()},
        strict=False,
        assign=True,
    )
    return set(local)


def write_gathered(
    directory: Path,
    tensors: Mapping[str, Tensor],
    *,
    writes: bool,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write sharded tensors as `model*.safetensors`; all processes call it together.

    Args:
        directory: exists, and holds no weights yet; only the process that writes needs it.
        tensors: by name.
        writes: whether this process writes; one does.
        max_shard_bytes: the largest file.

    Raises:
        OSError: the disk is full, or a file cannot be written.
    """
    if not writes:
        for _ in gathered(tensors):
            pass
        return
    shapes = {name: tuple(getattr(x, "ds_shape", x.shape)) for name, x in tensors.items()}
    specs = {name: TensorSpec(x.dtype, shapes[name]) for name, x in tensors.items()}
    with WeightWriter(directory, specs, max_shard_bytes) as writer:
        for name, tensor in gathered(tensors):
            writer.write(name, tensor)

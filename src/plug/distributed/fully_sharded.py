"""FSDP2 applied to a model from outside: each process keeps a shard of every layer.

A layer's parameters are gathered when it computes and freed after it (Zhao et al. 2023,
arXiv:2304.11277; PyTorch's `fully_shard`). What is gathered together:

- each layer of encoder and decoder;
- of each decoder layer, the two projections of the encoder's output: `Decoder.project_encoder`
  runs them for all layers before the first layer runs;
- all else in the root's group: the word table, which inputs and outputs share, norms, heads.

Sharded parameters are the masters: with `compute_dtype` layers compute in that, and the optimizer
steps in the parameters' own dtype. Gradients are reduced in float32, or as the
caller says.

FSDP2 takes two seconds to import, so it is imported where a model is sharded: decoding asks
`is_fully_sharded` of every model.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from plug.distributed.parallel_layers import parallelize_layers
from plug.distributed.settings import ParallelSettings
from plug.distributed.zero import is_partitioned, whole

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor

T = TypeVar("T")
_MARK = "gathers_its_weights"  # an attribute of modules that FSDP2 manages
_CALL = "call_with_own_parameters"


def shard(
    model: Any,
    mesh: DeviceMesh,
    settings: ParallelSettings,
    compute_dtype: torch.dtype | None = None,
    reduce_dtype: torch.dtype = torch.float32,
) -> None:
    """Shard ``model`` in place over ``mesh``; its parameters become `DTensor`s.

    Over two dimensions, "data" and "tensor", layers are split along "tensor" (`parallel_layers.py`)
    and the parts sharded along "data". What is outside of the layers is computed by all processes
    alike, so it is sharded over all of them.

    Args:
        model: has the parts of `PlugParts`; parameters may be on the meta device.
        mesh: of one dimension, or of two.
        settings: of the run.
        compute_dtype: what layers compute in; None is the parameters' own.
        reduce_dtype: what gradients are reduced in.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import (
        CPUOffloadPolicy,
        MixedPrecisionPolicy,
        OffloadPolicy,
        fully_shard,
        register_fsdp_forward_method,
    )

    # Of the projections of the encoder's output; nobody writes into them in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    every = mesh
    if mesh.ndim == 2:
        parallelize_layers(model, mesh["tensor"])
        every, mesh = init_device_mesh(mesh.device_type, (mesh.size(),)), mesh["data"]
    offload = OffloadPolicy()
    if settings.cpu_offload:
        offload = CPUOffloadPolicy(pin_memory=mesh.device_type != "cpu")
    options: dict[str, Any] = {
        "mp_policy": MixedPrecisionPolicy(
            param_dtype=compute_dtype, reduce_dtype=reduce_dtype, cast_forward_inputs=False
        ),
        "offload_policy": offload,
    }
    reshard = settings.reshard_after_forward
    decoder = getattr(model, "decoder", None)
    decoder_layers = list(decoder.layers) if decoder is not None else []
    for layer in decoder_layers:
        projections = [layer.cross_attention.k_proj, layer.cross_attention.v_proj]
        fully_shard(projections, mesh=mesh, reshard_after_forward=reshard, **options)
        # Layers of our own multiply by the weights and do not call these modules.
        projections[0].project = layer.cross_attention.project_key_value
        register_fsdp_forward_method(projections[0], "project")
        layer.cross_attention.project_key_value = projections[0].project
    for layer in [*model.encoder.layers, *decoder_layers]:
        fully_shard(layer, mesh=mesh, reshard_after_forward=reshard, **options)
        setattr(layer, _MARK, True)
    setattr(model, _MARK, True)
    setattr(model, _CALL, _call)
    fully_shard(model, mesh=every, **options)
    register_fsdp_forward_method(model, _CALL)


def _call(function: Callable[[], T]) -> T:
    return function()


def is_fully_sharded(model: nn.Module) -> bool:
    """Return whether each process holds a shard of ``model``, by `shard`, or of a part of it."""
    return any(hasattr(module, _MARK) for module in model.modules())


def gathers_layers(model: nn.Module) -> bool:
    """Return whether calling a layer of ``model`` gathers its weights, by FSDP2 or ZeRO-3."""
    return is_fully_sharded(model) or is_partitioned(model)


def run_forward(model: Any, function: Callable[[], T]) -> T:
    """Return what ``function`` returns, which runs parts of ``model`` as its `forward` would.

    Backward may go through what is returned. A model that is not sharded is left as it is.
    """
    return getattr(model, _CALL)(function) if hasattr(model, _MARK) else function()


def with_own_parameters(model: Any, function: Callable[[], T]) -> T:
    """Return what ``function`` returns, called while the root's own parameters are gathered.

    For what runs layers without the model's `forward`: the word table is whole meanwhile, and the
    layers gather themselves. All processes call it together. A model that is not sharded is left
    as it is.
    """
    if is_partitioned(model):
        # The word table's module frees it at each call: `ShardedModel` gathers it for the logits.
        own = ("token_type_embeddings", "final_norm")
        parameters = dict(model.named_parameters())
        with whole(x for name, x in parameters.items() if any(each in name for each in own)):
            return function()
    if not hasattr(model, _MARK):
        return function()
    try:
        return getattr(model, _CALL)(function)
    finally:
        reshard(model)


def reshard(model: nn.Module) -> None:
    """Free what is gathered; parameters are the process's shards again."""
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def own_region(parameter: DTensor) -> tuple[slice, ...]:
    """Return the slices of a sharded parameter that this process holds; they may be empty."""
    return region(parameter, dist.get_rank())


def region(parameter: DTensor, rank: int) -> tuple[slice, ...]:
    """Return the slices of a sharded parameter that the process ``rank`` holds.

    Along a dimension that is split twice, the "tensor" dimension of the mesh (its last) cuts first,
    and the "data" dimension cuts each part.
    """
    from torch.distributed.tensor import Replicate

    mesh: Any = parameter.device_mesh
    coordinate = (mesh.mesh == rank).nonzero()[0].tolist()
    spans = [(0, size) for size in parameter.shape]
    for count, index, placement in reversed(
        list(zip(mesh.shape, coordinate, parameter.placements, strict=True))
    ):
        if isinstance(placement, Replicate):
            continue
        start, end = spans[placement.dim]
        chunk = -(-(end - start) // count)
        first = min(start + index * chunk, end)
        spans[placement.dim] = (first, min(first + chunk, end))
    return tuple(slice(*span) for span in spans)


def copies(parameter: DTensor) -> int:
    """Return how many processes hold each value of a sharded parameter."""
    from torch.distributed.tensor import Replicate

    sizes = zip(parameter.device_mesh.shape, parameter.placements, strict=True)
    cut = math.prod(size for size, each in sizes if not isinstance(each, Replicate))
    return dist.get_world_size() // cut


def as_shard(local: Tensor, like: Any, shape: tuple[int, ...] | None = None) -> DTensor:
    """Return ``local``, this process's `own_region`, as a sharded tensor like ``like``.

    With ``shape``, a contiguous tensor of as many rows and other columns, split by rows alone.
    """
    from torch.distributed.tensor import DTensor

    size = torch.Size(like.shape if shape is None else shape)
    stride = tuple(math.prod(size[index + 1 :]) for index in range(len(size)))
    return DTensor.from_local(
        local,
        like.device_mesh,
        like.placements,
        run_check=False,
        shape=size,
        stride=like.stride() if shape is None else stride,
    )


def gathered(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield each tensor whole, one at a time; all processes take part."""
    from torch.distributed.tensor import DTensor, Replicate

    for name, tensor in tensors.items():
        if hasattr(tensor, "ds_id"):
            with whole([tensor]):
                yield name, tensor.detach()
        else:
            plain = tensor.detach()
            if isinstance(plain, DTensor):
                if plain.device_mesh.ndim == 2:  # one dimension after the other
                    plain = plain.redistribute(placements=(Replicate(), plain.placements[1]))
                plain = plain.full_tensor()
            yield name, plain

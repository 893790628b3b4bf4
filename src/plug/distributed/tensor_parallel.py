"""Tensor parallelism applied to a model from outside: each process holds a shard of each layer.

`q_proj`, `k_proj`, `v_proj` and `fc1` are column-parallel: a process holds some of their outputs
(some heads, some inner values). `out_proj` and `fc2` are row-parallel: a process holds some of
their inputs, and an all-reduce adds up the partial results. So each attention and each feed-forward
block needs one all-reduce, at its end (Shoeybi et al. 2019, arXiv:1909.08053, section 3). Norms,
heads and the word table are whole in every process. For the logits, each process multiplies its own
rows of the word table.

The shards are plain tensors in the model's own modules. `DTensor` and the hooks of
`parallelize_module` do not fit: the decoding engine calls products and not modules, and replays its
steps as CUDA graphs. A `DTensor` also costs the host more time than a product takes on the device.

The logits are gathered from the processes that computed them. All processes then hold the same
logits to the last bit, and choose the same tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from plug.distributed.processes import Processes
from plug.errors import UsageError
from plug.model.configuration import PlugConfig
from plug.model.plug import Plug
from plug.quantization.linear import QuantizedLinear, scheme_of

COLUMN_PARALLEL = ("q_proj", "k_proj", "v_proj", "fc1")
ROW_PARALLEL = ("out_proj", "fc2")
_PARTS = ("encoder.layers.", "decoder.layers.")


class RowParallelLinear(nn.Module):
    """A linear layer that holds some of the inputs; an all-reduce adds up the partial results.

    Args:
        shard: this process's part of the layer.
    """

    def __init__(self, shard: nn.Module) -> None:
        super().__init__()
        self.shard = shard

    def forward(self, x: Tensor) -> Tensor:
        return all_reduce(self.shard(x))


def all_reduce(x: Tensor) -> Tensor:
    """Add up ``x`` over all processes, in place."""
    dist.all_reduce(x)
    return x


def all_gather(x: Tensor) -> Tensor:
    """Return all processes' ``x`` side by side, along the last dimension."""
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x)
    return torch.cat(parts, dim=-1)


def check_divisible(model: Plug, count: int) -> None:
    """Raise a `UsageError` unless ``model`` can be sharded over ``count`` processes."""
    config = model.config
    for name in ("num_attention_heads", "intermediate_size"):
        if getattr(config, name) % count:
            raise UsageError(
                f"{name}={getattr(config, name)} 不能被进程数 {count} 整除，分不成 {count} 份。"
                f"请用 torchrun --nproc-per-node {_largest_divisor(config, count)}。"
            )
    scheme = scheme_of(model)
    size = None if scheme is None else scheme.group_size
    for name in ("hidden_size", "intermediate_size"):
        if size is not None and (getattr(config, name) // count) % size:
            raise UsageError(
                f"4 位的权重每 {size} 个输入一组，{name}={getattr(config, name)} 分成 {count} 份后"
                "不是整组。请用更少的进程，或 8 位的模型。"
            )


def _largest_divisor(config: PlugConfig, below: int) -> int:
    return next(
        count
        for count in range(below - 1, 0, -1)
        if not config.num_attention_heads % count and not config.intermediate_size % count
    )


def shard_slices(name: str, shape: tuple[int, ...], processes: Processes) -> tuple[slice, ...]:
    """Return the slices of the tensor ``name`` that this process holds; empty means all of it."""
    layer = name.split(".")[-2]
    if not name.startswith(_PARTS):
        return ()
    if layer in COLUMN_PARALLEL:
        return (_shard_slice(shape[0], processes),)
    # The bias of a row-parallel layer, and a scale for each output, are whole in every process.
    if layer in ROW_PARALLEL and len(shape) == 2:
        return slice(0, shape[0]), _shard_slice(shape[1], processes)
    return ()


def _shard_slice(size: int, processes: Processes) -> slice:
    own = size // processes.world_size
    return slice(processes.rank * own, (processes.rank + 1) * own)


def shard_shape(slices: tuple[slice, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape that ``slices`` cut out of a tensor of ``shape``."""
    sizes = [len(range(*part.indices(size))) for part, size in zip(slices, shape, strict=False)]
    return (*sizes, *shape[len(sizes) :])


def shard_model(model: Plug, weights: dict[str, Tensor], processes: Processes) -> None:
    """Put this process's shards into ``model`` and wrap its row-parallel layers.

    Args:
        model: on the meta device.
        weights: the shards by parameter or buffer name.
        processes: this process and how many there are.
    """
    for name, tensor in weights.items():
        parent, _, own = name.rpartition(".")
        module = model.get_submodule(parent)
        if own in module._buffers:
            module._buffers[own] = tensor
        else:
            module._parameters[own] = nn.Parameter(tensor, requires_grad=False)
    for name, module in list(model.named_modules()):
        parent, _, own = name.rpartition(".")
        if not name.startswith(_PARTS) or not isinstance(module, (nn.Linear, QuantizedLinear)):
            continue
        if isinstance(module, nn.Linear):
            module.out_features, module.in_features = module.weight.shape
        if own in ROW_PARALLEL:
            if not processes.is_first:  # the all-reduce must count the bias once
                weights[f"{name}.bias"].zero_()
            setattr(model.get_submodule(parent), own, RowParallelLinear(module))


def is_sharded(model: nn.Module) -> bool:
    """Return whether this process holds a shard of ``model`` and other processes hold the rest."""
    return any(isinstance(module, RowParallelLinear) for module in model.modules())


def vocabulary_shard(model: nn.Module, table: Tensor) -> Tensor:
    """Return the rows of the word table that this process multiplies; all rows if unsharded.

    The last process's shard is padded with zeros, so that all shards have one size.
    """
    if not is_sharded(model):
        return table
    count = -(-len(table) // dist.get_world_size())
    own = table[dist.get_rank() * count :][:count]
    return F.pad(own, (0, 0, 0, count - len(own)))


def gather_logits(
    model: nn.Module,
    head: Callable[..., Tensor],
    gather: Callable[[Tensor], Tensor] = all_gather,
) -> Callable[..., Tensor]:
    """Return a function that computes all logits, from ``head``, which computes a shard of them.

    Args:
        model: what the logits are of.
        head: multiplies with this process's `vocabulary_shard`.
        gather: does what `all_gather` does.
    """
    if not is_sharded(model):
        return head
    vocab_size = model.get_submodule("embeddings.word_embeddings").get_parameter("weight").shape[0]

    def logits(x: Tensor, **options: Any) -> Tensor:
        return gather(head(x, **options))[..., :vocab_size]

    return logits

"""Tensor parallelism of a model from outside: every process has a share of each layer.

Queries, keys, values and `fc1` are parted by outputs (heads, inner values), `out_proj` and `fc2` by
inputs, so a layer's attention or feed-forward needs one sum over the processes, at its end (Shoeybi
et al. 2019, arXiv:1909.08053, section 3). All else is in every process: norms, heads, and the word
table, of which each multiplies its own rows for the logits.

The shares are plain tensors in the model's own modules. `DTensor` and the hooks of
`parallelize_module` would not do: the decoding engine calls products and not modules, replays its
steps as CUDA graphs, and a `DTensor` costs the host more than a product takes the device.

The logits are gathered from those who made them, so that all processes have the same to the last
bit, whatever the order in which their sums were added up, and choose the same tokens.
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

BY_OUTPUTS = ("q_proj", "k_proj", "v_proj", "fc1")
BY_INPUTS = ("out_proj", "fc2")
_PARTS = ("encoder.layers.", "decoder.layers.")


class Reduced(nn.Module):
    """A linear layer parted by inputs: the processes' results are added up.

    Args:
        own: this process's share.
    """

    def __init__(self, own: nn.Module) -> None:
        super().__init__()
        self.own = own

    def forward(self, x: Tensor) -> Tensor:
        return added_up(self.own(x))


def added_up(x: Tensor) -> Tensor:
    """The sum of what all processes have; in place."""
    dist.all_reduce(x)
    return x


def check_divisible(model: Plug, count: int) -> None:
    """Raise a `UsageError` unless ``model`` can be shared out among ``count`` processes."""
    config = model.config
    for name in ("num_attention_heads", "intermediate_size"):
        if getattr(config, name) % count:
            raise UsageError(
                f"{name}={getattr(config, name)} 不能被进程数 {count} 整除，分不成 {count} 份。"
                f"请用 torchrun --nproc-per-node {_largest_divisor(config, count)}。"
            )
    scheme = scheme_of(model)
    size = None if scheme is None else scheme.group_size
    if size is not None and (config.hidden_size // count) % size:
        raise UsageError(
            f"4 位的权重每 {size} 个输入一组，hidden_size={config.hidden_size} 分成 {count} 份后"
            "不是整组。请用更少的进程，或 8 位的模型。"
        )


def _largest_divisor(config: PlugConfig, below: int) -> int:
    return next(
        count
        for count in range(below - 1, 0, -1)
        if not config.num_attention_heads % count and not config.intermediate_size % count
    )


def region(name: str, shape: tuple[int, ...], processes: Processes) -> tuple[slice, ...]:
    """The part of the tensor ``name`` that this process has; empty is all of it."""
    layer = name.split(".")[-2]
    if not name.startswith(_PARTS):
        return ()
    if layer in BY_OUTPUTS:
        return (_share(shape[0], processes),)
    if layer in BY_INPUTS and len(shape) == 2:  # a bias, or a scale an output, is in all
        return slice(0, shape[0]), _share(shape[1], processes)
    return ()


def _share(size: int, processes: Processes) -> slice:
    own = size // processes.world_size
    return slice(processes.rank * own, (processes.rank + 1) * own)


def shape_of(region: tuple[slice, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a region of a tensor of this shape."""
    sizes = [len(range(*part.indices(size))) for part, size in zip(region, shape, strict=False)]
    return (*sizes, *shape[len(sizes) :])


def set_shares(model: Plug, weights: dict[str, Tensor], processes: Processes) -> None:
    """Put this process's shares into a model without memory, and the sums where they belong."""
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
        if own in BY_INPUTS:
            if not processes.is_first:  # it counts once
                weights[f"{name}.bias"].zero_()
            setattr(model.get_submodule(parent), own, Reduced(module))


def is_shared_out(model: nn.Module) -> bool:
    """Whether this process has a share of the model, and others have the rest."""
    return any(isinstance(module, Reduced) for module in model.modules())


def own_rows(model: nn.Module, table: Tensor) -> Tensor:
    """The rows of the word table that this process multiplies: all, if it is alone."""
    if not is_shared_out(model):
        return table
    count = -(-len(table) // dist.get_world_size())
    own = table[dist.get_rank() * count :][:count]
    return F.pad(own, (0, 0, 0, count - len(own)))


def gathered(model: nn.Module, head: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The product with the whole word table, from ``head``, which has `own_rows` of it."""
    if not is_shared_out(model):
        return head
    vocab_size = model.get_submodule("embeddings.word_embeddings").get_parameter("weight").shape[0]

    def logits(x: Tensor, **options: Any) -> Tensor:
        own = head(x, **options)
        parts = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, own)
        return torch.cat(parts, dim=-1)[..., :vocab_size]

    return logits

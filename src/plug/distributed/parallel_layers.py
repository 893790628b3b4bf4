"""Tensor parallelism for training: `DTensor` weights, by PyTorch's `parallelize_module`.

The layers are split as in `tensor_parallel.py`, which decoding uses: `q_proj`, `k_proj`, `v_proj`
and `fc1` are column-parallel, `out_proj` and `fc2` row-parallel. Activations between them are
plain tensors: alike in all processes of a group outside of attention and feed-forward, and some
heads or inner values inside. Embeddings, norms and heads are computed by all of them.

A norm hands its output to the column-parallel layers as one replicated `DTensor`, so that the
gradients of those layers' inputs are added up before one all-reduce, not in one for each.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from plug.distributed.processes import Processes
from plug.distributed.tensor_parallel import COLUMN_PARALLEL, ROW_PARALLEL
from plug.errors import UsageError
from plug.model.configuration import PlugConfig

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def parallelize_layers(model: Any, mesh: DeviceMesh) -> None:
    """Split the layers of ``model`` in place over the one dimension of ``mesh``.

    Args:
        model: has the parts of `PlugParts`; parameters are on the meta device.
        mesh: of the processes that compute a layer together.
    """
    from torch.distributed.tensor import DTensor, Replicate
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        PrepareModuleOutput,
        RowwiseParallel,
        parallelize_module,
    )

    replicated = PrepareModuleOutput(
        output_layouts=Replicate(), desired_output_layouts=Replicate(), use_local_output=False
    )
    styles = {
        **dict.fromkeys(COLUMN_PARALLEL, ColwiseParallel()),
        **dict.fromkeys(ROW_PARALLEL, RowwiseParallel()),
    }
    decoder = getattr(model, "decoder", None)
    for layer in [*model.encoder.layers, *(decoder.layers if decoder is not None else [])]:
        plan = {}
        for name, module in layer.named_modules():
            own = name.rpartition(".")[2]
            if isinstance(module, nn.LayerNorm) or own in styles:
                plan[name] = styles.get(own, replicated)
        parallelize_module(layer, mesh, plan, src_data_rank=None)
    if decoder is not None:
        project = decoder.project_encoder

        def project_replicated(states: Tensor) -> Any:
            return project(DTensor.from_local(states, mesh, [Replicate()], run_check=False))

        decoder.project_encoder = project_replicated


def check_mesh(config: PlugConfig, processes: Processes) -> None:
    """Raise a `UsageError` unless `Processes.tensor` divides the processes and the layers."""
    tensor, world_size = processes.tensor, processes.world_size
    if world_size % tensor:
        raise UsageError(
            f"parallel.tensor={tensor} 不能整除进程数 {world_size}。"
            f"请用 {tensor} 的倍数个进程，或改 parallel.tensor。"
        )
    for name in ("num_attention_heads", "intermediate_size"):
        if (size := getattr(config, name)) % tensor:
            raise UsageError(
                f"{name}={size} 不能被 parallel.tensor={tensor} 整除，分不成 {tensor} 份。"
                "请改 parallel.tensor。"
            )

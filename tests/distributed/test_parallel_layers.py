"""Which meshes fit a model. `tests/pretraining/test_sharded.py` trains on some."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from plug.distributed.parallel_layers import check_mesh
from plug.distributed.processes import Processes
from plug.errors import UsageError
from plug.model.configuration import PRESETS

CONFIG = dataclasses.replace(
    PRESETS["test"], hidden_size=48, num_attention_heads=6, intermediate_size=40
)


@pytest.mark.parametrize(("world_size", "tensor"), [(1, 1), (3, 1), (2, 2), (6, 2)])
def test_processes_are_numbered_tensor_by_tensor(world_size: int, tensor: int) -> None:
    processes = [
        Processes(rank, world_size, torch.device("cpu"), tensor) for rank in range(world_size)
    ]
    check_mesh(CONFIG, processes[0])
    assert [each.data_rank for each in processes] == sorted(
        list(range(world_size // tensor)) * tensor
    )
    assert {each.data_size for each in processes} == {world_size // tensor}


@pytest.mark.parametrize(
    ("world_size", "tensor", "message"),
    [
        (4, 3, "parallel.tensor=3 不能整除进程数 4"),
        (4, 4, "num_attention_heads=6"),
        (3, 3, "intermediate_size=40"),
    ],
)
def test_what_a_mesh_does_not_divide_is_named(world_size: int, tensor: int, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        check_mesh(CONFIG, Processes(0, world_size, torch.device("cpu"), tensor))

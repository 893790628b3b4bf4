"""The table of names and cuts: every tensor of ours once, and shards that make the whole."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from plug.checkpoints.original_layout import (
    CONFIG_KEYS,
    FIXED_KEYS,
    original_config,
    read_original_config,
    tensor_table,
)
from plug.errors import UsageError
from plug.model.configuration import PRESETS
from plug.model.plug import Plug

CONFIG = dataclasses.replace(PRESETS["test"], encoder_final_norm_passes=2)


def test_every_tensor_of_ours_stands_in_the_table_once() -> None:
    ours = [name for entry in tensor_table(CONFIG).values() for name in entry.ours]
    assert sorted(ours) == sorted(Plug(CONFIG).state_dict())


@pytest.mark.parametrize("num_shards", [1, 2, 4])
def test_the_shards_regions_make_the_whole_tensor(num_shards: int) -> None:
    for name, entry in tensor_table(CONFIG).items():
        covered = torch.zeros(entry.shape)
        for rank in range(num_shards):
            covered[entry.region(rank, num_shards)] += 1
            part = covered[entry.region(rank, num_shards)]
            assert part.numel() * len(entry.ours) == entry.num_elements(num_shards), name
        assert (covered == (1 if entry.axis is not None else num_shards)).all(), name
        assert math.prod(entry.shard_shape(num_shards)) == entry.num_elements(num_shards)


def test_a_config_goes_there_and_back() -> None:
    values = original_config(CONFIG, half=True)
    own_ids = {f"{kind}_token_id": getattr(CONFIG, f"{kind}_token_id") for kind in ("pad", "unk")}
    back, notes = read_original_config(values)

    assert notes == []
    for ours in CONFIG_KEYS.values():
        assert getattr(back, ours) == getattr(CONFIG, ours)
    assert back.encoder_final_norm_passes == 2
    assert own_ids.keys().isdisjoint(values)  # the original's ids are fixed


@pytest.mark.parametrize("key", FIXED_KEYS)
def test_other_mathematics_is_refused(key: str) -> None:
    values = original_config(CONFIG, half=True) | {key: "other"}
    with pytest.raises(UsageError, match=f"{key}='other'"):
        read_original_config(values)


def test_unknown_keys_are_noted() -> None:
    _, notes = read_original_config(original_config(CONFIG, half=True) | {"hobby": 1})
    assert notes == ["没有用到配置里的这些键：hobby。"]

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from plug.checkpoints.original_shards import check_values, find_shards, open_shard, write_shard
from plug.errors import PlugError, UsageError


def write(folder: Path, ranks: list[int], world_size: int) -> None:
    (folder / "model").mkdir()
    for rank in ranks:
        path = folder / "model" / f"mp_rank_{rank:02d}_model_states.pt"
        write_shard(path, {"a": torch.full((2,), float(rank))}, world_size)


def test_shards_come_in_the_order_of_their_ranks(tmp_path: Path) -> None:
    write(tmp_path, [10, 2, *range(2), *range(3, 10)], 11)

    found = [open_shard(path) for path in find_shards(tmp_path)]

    assert [shard.tensors["a"][0].item() for shard in found] == list(range(11))
    assert {shard.world_size for shard in found} == {11}


@pytest.mark.parametrize(
    ("ranks", "world_size", "says"),
    [
        ([0, 2], 3, "缺少分片 mp_rank_01_model_states.pt（应有 3 片）"),
        ([0, 1, 2], 2, "有 3 个分片，而文件里写着 2 片"),
    ],
)
def test_missing_and_surplus_shards_are_refused(
    ranks: list[int], world_size: int, says: str, tmp_path: Path
) -> None:
    write(tmp_path, ranks, world_size)

    with pytest.raises(PlugError) as caught:
        find_shards(tmp_path)

    assert says in str(caught.value)


def test_a_folder_without_shards_is_wrong_use(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--to-original"):
        find_shards(tmp_path)


@pytest.mark.parametrize("count", [0, -1, 4097, True, 2.0, "2", None])
def test_a_number_of_shards_that_makes_no_sense_is_passed_over(
    count: object, tmp_path: Path
) -> None:
    path = tmp_path / "shard.pt"
    torch.save({"module": {"a": torch.ones(2)}, "mp_world_size": count}, path)

    assert open_shard(path).world_size is None


def test_values_must_be_finite_and_fit_the_dtype() -> None:
    check_values("a", torch.ones(3), torch.float16)
    with pytest.raises(PlugError, match="NaN"):
        check_values("a", torch.tensor([1.0, float("nan")]), None)
    with pytest.raises(PlugError, match="bfloat16"):
        check_values("a", torch.tensor([1e5]), torch.float16)

"""The shard files of an original's checkpoint: find, read safely, check, write."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from plug.checkpoints import original_layout as layout
from plug.checkpoints.torch_files import Foreign, read_torch_file
from plug.checkpoints.weights import DTYPES, check_names_and_shapes, save_pickle
from plug.errors import PlugError, UsageError
from plug.jsonfiles import shown
from plug.model.configuration import PlugConfig

SHARD_FILE = "mp_rank_{:02d}_model_states.pt"
MAX_SHARDS = 4096


def find_shards(source: Path) -> list[Path]:
    """The shards in the order of their ranks, none missing."""
    pattern = re.compile(r"mp_rank_(\d+)_model_states\.pt")
    found = {
        int(match[1]): path
        for path in (source / "model").glob("*.pt")
        if (match := pattern.fullmatch(path.name))
    }
    if not found:
        raise UsageError(
            f"{source} 里没有 model/mp_rank_NN_model_states.pt，不是原版 PLUG 的目录。"
            "若要把本项目的模型写成原版格式，请加 --to-original N。"
        )
    world_size = open_shard(found[min(found)]).world_size or max(found) + 1
    missing = [SHARD_FILE.format(rank) for rank in range(world_size) if rank not in found]
    if missing:
        raise PlugError(
            f"{source / 'model'} 缺少分片 {'、'.join(missing)}（应有 {world_size} 片）。"
        )
    if len(found) > world_size:
        raise PlugError(
            f"{source / 'model'} 有 {len(found)} 个分片，而文件里写着 {world_size} 片。"
        )
    return [found[rank] for rank in range(world_size)]


class Shard(NamedTuple):
    """What a shard file holds."""

    tensors: dict[str, Tensor]  # mapped from the file
    world_size: int | None  # the number of shards that it says there are
    foreign: list[str]  # names of objects beside the tensors, which were not loaded


def open_shard(path: Path) -> Shard:
    """Read a shard, whatever its trainer saved beside the tensors.

    Raises:
        PlugError: the file is damaged, or `module` is not a table of tensors alone.
    """
    payload, foreign = read_torch_file(path, "module")
    state = payload.get("module") if isinstance(payload, dict) else payload
    if isinstance(state, Foreign):
        raise PlugError(
            f"分片 {path} 里存的是 {state.origin} 对象，不是 'module' 张量表。文件没有损坏："
            "请在保存它的程序里改存 state_dict()。"
        )
    if not isinstance(state, dict):
        raise PlugError(f"分片 {path} 里没有 'module' 张量表，不是原版 PLUG 的权重。")
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            kind = value.origin if isinstance(value, Foreign) else type(value).__name__
            raise PlugError(
                f"分片 {path} 的 'module' 里，{shown(name)} 是 {kind} 对象，不是张量。"
                "文件没有损坏，其余张量是完整的：请在保存它的程序里只留下张量，再保存一次。"
            )
    world_size = payload.get("mp_world_size")
    is_count = type(world_size) is int and 1 <= world_size <= MAX_SHARDS
    return Shard(state, world_size if is_count else None, foreign)


def check_shards(
    shards: list[Path], config: PlugConfig, table: Mapping[str, layout.Entry]
) -> dict[str, torch.dtype]:
    """Check names, shapes and dtypes of every shard; the dtype of each tensor.

    Two shards with one content are one shard twice, under the name of another that is not there.
    """
    dtypes: dict[str, torch.dtype] = {}
    shard_of: dict[bytes, Path] = {}  # by digest of its rows of the word table
    for path in shards:
        state = open_shard(path).tensors
        expected = {name: entry.shard_shape(len(shards)) for name, entry in table.items()}
        optional = {
            f"{layout.POOLER}.weight": (config.hidden_size, config.hidden_size),
            f"{layout.POOLER}.bias": (config.hidden_size,),
            layout.TIED_TABLE: expected[layout.WORD_TABLE],
        }
        expected |= {name: shape for name, shape in optional.items() if name in state}
        found = {name: tuple(tensor.shape) for name, tensor in state.items()}
        check_names_and_shapes(path, found, expected)
        for name in table:
            dtype = state[name].dtype
            if dtype not in DTYPES.values():
                raise PlugError(f"{path} 的 {name} 是 {dtype}，只支持 {'、'.join(DTYPES)}。")
            if dtypes.setdefault(name, dtype) != dtype:
                raise PlugError(
                    f"{path} 的 {name} 是 {dtype}，{shards[0].name} 的是 {dtypes[name]}。"
                    "各分片应来自同一次保存。"
                )
        rows = state[layout.WORD_TABLE]
        if (rows != rows[:1, :1]).any() and (
            twin := shard_of.setdefault(digest(rows), path)
        ) != path:
            raise PlugError(
                f"{path} 与 {twin.name} 的内容相同，是同一片存了两次。请重新取得原来的那一片。"
            )
    return dtypes


def digest(tensor: Tensor) -> bytes:
    """Equal for equal bits."""
    return hashlib.blake2b(tensor.contiguous().view(torch.uint8).numpy().data).digest()


def check_tied_table(path: Path, state: Mapping[str, Tensor]) -> None:
    tied, table = state.get(layout.TIED_TABLE), state[layout.WORD_TABLE]
    if tied is not None and tied.data_ptr() != table.data_ptr() and not torch.equal(tied, table):
        raise PlugError(
            f"{path} 的 {layout.TIED_TABLE} 与 {layout.WORD_TABLE} 不同，本应是同一个张量。"
        )


def check_values(what: str, tensor: Tensor, dtype: torch.dtype | None) -> None:
    if not torch.isfinite(tensor).all():
        raise PlugError(f"{what} 里有 NaN 或无穷大，权重已损坏。请重新取得它。")
    if dtype == torch.float16 and tensor.abs().max() > torch.finfo(dtype).max:
        raise PlugError(f"{what} 里有超出 float16 范围的值。请改用 --dtype bfloat16。")


def write_shard(path: Path, state: dict[str, Tensor], num_shards: int) -> None:
    payload: dict[str, Any] = {
        "module": state,
        "optimizer": None,
        "lr_scheduler": None,
        "csr_tensor_module_names": [],
        "skipped_steps": 0,
        "global_steps": 0,
        "dp_world_size": 1,
        "mp_world_size": num_shards,
    }
    save_pickle(payload, path)

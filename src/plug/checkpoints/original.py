"""The original's checkpoints, both ways: `model/mp_rank_NN_model_states.pt` <-> a model directory.

Each shard is a pickle ``{"module": state_dict, …}`` with one tensor-parallel slice;
`original_layout` says which. Reading maps one shard at a time and copies its slices into the output
files in place; writing holds one shard. Nothing is unpickled but tensors and plain values.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from plug.checkpoints import original_layout as layout
from plug.checkpoints.directory import (
    CONFIG_FILE,
    check_tokenizer,
    find_model_directory,
    load_tokenizer,
    refuse_quantized,
    write_configs,
)
from plug.checkpoints.headers import locate_weights
from plug.checkpoints.original_shards import (
    SHARD_FILE,
    check_shards,
    check_tied_table,
    check_values,
    digest,
    find_shards,
    open_shard,
    write_shard,
)
from plug.checkpoints.weights import Region, TensorSpec, WeightWriter, shorten
from plug.errors import UsageError
from plug.files import new_directory, refuse_used, write_json, write_text
from plug.model.configuration import PlugConfig
from plug.tokenization import PlugTokenizer

Progress = Callable[[int, int], None]  # bytes done, bytes in all


class OriginalReader:
    """An original's directory whose names, shapes and dtypes are checked.

    Raises:
        UsageError: ``source`` is no such checkpoint.
        PlugError: a shard is missing or damaged, or names or shapes do not fit.
    """

    def __init__(self, source: Path) -> None:
        self.config, self.notes = _read_config(source)
        self.shards = find_shards(source)
        _check_divisible(self.config, len(self.shards))
        self.table = layout.tensor_table(self.config)
        self.shard_dtypes = check_shards(
            self.shards, self.config, self.table
        )  # by the shards' names
        self.tokenizer = _read_vocabulary(source, self.config, self.notes)
        self.notes.append(
            "encoder_final_norm_passes=2：原版推理时对编码器的输出做两次末层归一化，"
            "导入的模型照做，结果才与原版相同。"
        )
        self.notes.append(f"已略去 {layout.POOLER}.*：原版从不读取它。")
        if foreign := sorted({name for path in self.shards for name in open_shard(path).foreign}):
            self.notes.append(f"已略去分片里张量以外的对象：{shorten(foreign)}。")

    def dtypes(self) -> dict[str, torch.dtype]:
        """The dtype of each of our tensors."""
        return {
            ours: self.shard_dtypes[name]
            for name, entry in self.table.items()
            for ours in entry.ours
        }

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Each of our tensors, whole, put together from all shards (mapped, not read, at once)."""
        states = [open_shard(path).tensors for path in self.shards]
        for path, state in zip(self.shards, states, strict=True):
            check_tied_table(path, state)
        for name, entry in self.table.items():
            slices = [state[name].chunk(len(entry.ours)) for state in states]
            for index, ours in enumerate(entry.ours):
                parts = [each[index] for each in slices]
                yield ours, parts[0] if entry.axis is None else torch.cat(parts, entry.axis)


def import_original(
    source: Path,
    target: Path,
    *,
    dtype: torch.dtype | None = None,
    progress: Progress = lambda _done, _total: None,
) -> list[str]:
    """Turn an original's checkpoint of any number of shards into a model directory.

    Args:
        source: holds `config.json` and `model/mp_rank_NN_model_states.pt`.
        target: is not there yet, or empty; filled only when all goes well.
        dtype: of all weights; None keeps each tensor's own.
        progress: called after each tensor.

    Returns:
        What the user should know, in Chinese, a sentence each.

    Raises:
        UsageError: ``source`` is no such checkpoint, or ``target`` is in use.
        PlugError: a shard is missing or damaged, names or shapes do not fit, a value is not
            finite, or the disk is full.
    """
    refuse_used(target)
    original = OriginalReader(source)
    with new_directory(target) as temporary:
        return write_imported(original, temporary, dtype=dtype, progress=progress)


def write_imported(
    original: OriginalReader,
    directory: Path,
    *,
    dtype: torch.dtype | None = None,
    progress: Progress = lambda _done, _total: None,
) -> list[str]:
    """Write what `import_original` writes into an empty directory that is there."""
    notes, table, dtypes = original.notes, original.table, original.shard_dtypes
    num_shards = len(original.shards)
    specs = {
        ours: TensorSpec(dtype or dtypes[name], entry.shape)
        for name, entry in table.items()
        for ours in entry.ours
    }
    total = sum(
        entry.num_elements(num_shards) * dtypes[name].itemsize for name, entry in table.items()
    )
    done = 0
    digests: dict[str, bytes] = {}  # of tensors that are whole on every rank
    differing: set[str] = set()
    with WeightWriter(directory, specs) as writer:
        for rank, path in enumerate(original.shards):
            state = open_shard(path).tensors
            check_tied_table(path, state)
            for name, entry in table.items():
                tensor = state[name]
                check_values(f"{path} 的 {name}", tensor, dtype)
                found = digest(tensor) if entry.axis is None else b""
                if digests.setdefault(name, found) != found:
                    differing.add(name)
                if entry.axis is not None or rank == 0:
                    region = entry.region(rank, num_shards)
                    for ours, part in zip(entry.ours, tensor.chunk(len(entry.ours)), strict=True):
                        writer.write(ours, part, region)
                done += tensor.nbytes
                progress(done, total * num_shards)
    write_configs(directory, original.config, specs)
    if original.tokenizer is not None:
        original.tokenizer.save(directory, model_max_length=original.config.max_source_length)
    if differing:
        notes.append(
            f"{len(differing)} 个张量在各分片里本应相同，却不同，取第 0 片的值："
            + "、".join(sorted(differing)[:5])
        )
    return notes


def export_original(
    source: Path,
    target: Path,
    num_shards: int,
    *,
    dtype: torch.dtype | None = None,
    progress: Progress = lambda _done, _total: None,
) -> list[str]:
    """Write a model directory as an original's checkpoint of ``num_shards`` shards.

    The arguments, what is returned and what is raised are those of `import_original`.
    """
    refuse_used(target)
    source = find_model_directory(source)
    refuse_quantized(source)
    config = PlugConfig.from_file(source / CONFIG_FILE)
    if not config.num_decoder_layers:
        raise UsageError(f"{source} 只有编码器，写不成原版的格式。请用有解码器的模型。")
    _check_divisible(config, num_shards)
    table = layout.tensor_table(config)
    places = locate_weights(
        source, {ours: entry.shape for entry in table.values() for ours in entry.ours}
    )
    notes = [f"{layout.POOLER}.* 写成零：原版的文件里有它，但从不读取。"]
    if config.encoder_final_norm_passes == 1:
        notes.append(
            "这个模型只做一次末层归一化（encoder_final_norm_passes=1），原版代码推理时做两次："
            "用原版代码运行，结果会与这里不同。"
        )
    total = sum(
        entry.num_elements(num_shards) * (dtype or places[entry.ours[0]].spec.dtype).itemsize
        for entry in table.values()
    )
    done = 0
    with new_directory(target) as temporary:
        (temporary / "model").mkdir()
        for rank in range(num_shards):
            state: dict[str, Tensor] = {}
            for name, entry in table.items():
                region = entry.region(rank, num_shards)
                state[name] = torch.cat(
                    [_read_part(places[ours].file, ours, region, dtype) for ours in entry.ours]
                )
                done += state[name].nbytes
                progress(done, total * num_shards)
            _add_unused(state, config)
            write_shard(temporary / "model" / SHARD_FILE.format(rank), state, num_shards)
        half = state[layout.WORD_TABLE].dtype == torch.float16
        write_json(temporary / CONFIG_FILE, layout.original_config(config, half=half))
        write_json(temporary / "configuration.json", layout.original_configuration(num_shards))
        _write_vocabulary(source, temporary, notes)
    return notes


def _check_divisible(config: PlugConfig, num_shards: int) -> None:
    if num_shards < 1:
        raise UsageError(f"分片数 {num_shards} 应不小于 1。")
    for name in ("vocab_size", "num_attention_heads", "intermediate_size"):
        if getattr(config, name) % num_shards:
            raise UsageError(
                f"{name}={getattr(config, name)} 不能平分成 {num_shards} 片。"
                "请检查分片是否齐全，或换一个能整除的分片数。"
            )


def _read_config(source: Path) -> tuple[PlugConfig, list[str]]:
    path = source / CONFIG_FILE
    if not source.is_dir():
        raise UsageError(f"找不到目录 {source}。请检查 --from。")
    if not path.is_file():
        raise UsageError(f"{source} 里没有 {CONFIG_FILE}，不是原版 PLUG 的目录。")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UsageError(f"{path} 不是有效的 JSON：{error}。") from None
    if not isinstance(values, dict):
        raise UsageError(f"{path} 应是一个 JSON 对象。")
    try:
        return layout.read_original_config(values)
    except UsageError as error:
        raise UsageError(f"{path}：{error}") from None


def _read_part(file: Path, name: str, region: Region, dtype: torch.dtype | None) -> Tensor:
    """A copy of part of a tensor; opening the file anew lets its mapped pages go each time."""
    with safe_open(file, framework="pt") as opened:
        part = opened.get_tensor(name)[region]
    check_values(f"{file} 的 {name}", part, dtype)
    return part.to(dtype or part.dtype, copy=True).contiguous()


def _add_unused(state: dict[str, Tensor], config: PlugConfig) -> None:
    table = state[layout.WORD_TABLE]
    state[layout.TIED_TABLE] = table
    state[f"{layout.POOLER}.weight"] = table.new_zeros(config.hidden_size, config.hidden_size)
    state[f"{layout.POOLER}.bias"] = table.new_zeros(config.hidden_size)


def _read_vocabulary(source: Path, config: PlugConfig, notes: list[str]) -> PlugTokenizer | None:
    path = source / "vocab.txt"
    if not path.is_file():
        notes.append(f"{source} 里没有 vocab.txt，导入的模型没有分词器，只能处理词元编号。")
        return None
    tokenizer = PlugTokenizer.from_vocabulary_file(path)
    check_tokenizer(tokenizer, config, path)
    return tokenizer


def _write_vocabulary(source: Path, target: Path, notes: list[str]) -> None:
    if not (source / "tokenizer.json").is_file():
        notes.append(f"{source} 里没有分词器，没有写 vocab.txt。")
        return
    tokenizer = load_tokenizer(source)
    if not tokenizer.is_original:
        notes.append("这个模型的词表不是原版的 WordPiece，没有写 vocab.txt，原版代码不能给它分词。")
        return
    pieces = tokenizer.backend.get_vocab()
    lines = "".join(f"{piece}\n" for piece in sorted(pieces, key=pieces.__getitem__))
    write_text(target / "vocab.txt", lines)

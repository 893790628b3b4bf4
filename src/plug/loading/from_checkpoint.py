"""A checkpoint of a training run becomes an ordinary model directory, a tensor at a time.

One process and no GPU, however many processes wrote the checkpoint. What is read:

| run | sharded | directory |
|---|---|---|
| `plug pretrain` | no | `OUTPUT/checkpoint` |
| | yes | `OUTPUT/checkpoints/step-N`, its weights under names that begin with `model.` |
| `plug finetune` | no | `OUTPUT/checkpoints/checkpoint-N` |
| | yes | the same, its weights in `weights` |

A run's `OUTPUT` stands for its newest checkpoint that is whole.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from plug.checkpoints.directory import CONFIG_FILE, RUN_FILE, weight_shapes
from plug.checkpoints.headers import read_places
from plug.checkpoints.hub import CONFIGURATION_FILE
from plug.checkpoints.sharded import METADATA_FILE, is_sharded, read_whole, sharded_specs
from plug.checkpoints.weights import (
    TensorSpec,
    WeightWriter,
    check_names_and_shapes,
    finite,
    map_tensors,
)
from plug.errors import PlugError, UsageError
from plug.files import new_directory, recover, refuse_used, write_json
from plug.jsonfiles import read_json
from plug.model.configuration import PlugConfig
from plug.model.plug import Plug
from plug.model.without_memory import without_memory

_WEIGHT = "model."  # before the names of weights in a sharded checkpoint of pre-training
_WEIGHTS = "weights"  # directory of the weights in a sharded checkpoint of fine-tuning
_BESIDE = (
    *("generation_config.json", CONFIGURATION_FILE, RUN_FILE),
    *("tokenizer.json", "tokenizer_config.json"),
)


class _Source(NamedTuple):
    """The tensors of a checkpoint: what they are, and one after another."""

    specs: dict[str, TensorSpec]
    tensors: Iterator[tuple[str, Tensor]]


def convert_checkpoint(
    source: Path,
    target: Path,
    *,
    dtype: torch.dtype | None = None,
    progress: Callable[[int, int], object] = lambda _done, _total: None,
) -> list[str]:
    """Write the weights of a training checkpoint as a model directory.

    Args:
        source: a checkpoint, or the output directory of a run.
        target: is not there yet, or empty; filled only when all goes well.
        dtype: of all weights; None keeps each tensor's own.
        progress: called after each tensor with the bytes done and all bytes.

    Returns:
        What the user should know, in Chinese, a sentence each.

    Raises:
        UsageError: ``source`` is no checkpoint, is not finished, or holds an adapter alone;
            ``target`` is in use.
        PlugError: the checkpoint is damaged, its tensors are not those of its config, a value is
            not finite, or the disk is full.
    """
    refuse_used(target)
    directory = find_checkpoint(source)
    checkpoint = _open(directory)
    config = read_json(directory / CONFIG_FILE)
    specs = {name: TensorSpec(dtype or x.dtype, x.shape) for name, x in checkpoint.specs.items()}
    _check_shapes(directory, specs)
    total, done = sum(spec.num_bytes for spec in specs.values()), 0
    with new_directory(target) as temporary:
        with WeightWriter(temporary, specs) as writer:
            for name, tensor in finite(directory, checkpoint.tensors):
                writer.write(name, tensor)
                done += specs[name].num_bytes
                progress(done, total)
        if dtype is not None:
            config["dtype"] = str(dtype).removeprefix("torch.")
        write_json(temporary / CONFIG_FILE, config)
        for name in _BESIDE:
            place = directory / name
            if name == RUN_FILE and not place.is_file():  # of fine-tuning: the run has it
                place = directory.parent.parent / name
            if place.is_file():
                shutil.copyfile(place, temporary / name)
    return [f"读的是 {directory}；优化器的状态没有写入，接着训练请用原来的检查点。"]


def find_checkpoint(source: Path) -> Path:
    """Return the directory of a checkpoint, given that or the output directory of its run.

    Raises:
        UsageError: there is none, or it was not finished.
    """
    recover(source)
    if not source.is_dir():
        raise UsageError(f"找不到检查点 {source}：没有这个目录。请检查路径。")
    if ".partial-" in source.name or (
        any(source.glob("*.distcp")) and not (source / METADATA_FILE).is_file()
    ):
        raise UsageError(f"检查点 {source} 没有写完。请用同一次训练更早的检查点。")
    if _is_checkpoint(source):
        return source
    recover(source / "checkpoint")
    folder = source if source.name == "checkpoints" else source / "checkpoints"
    numbered = [path for path in folder.glob("*-*") if path.name.rpartition("-")[2].isdecimal()]
    newest = sorted(numbered, key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)
    found = next((path for path in [*newest, source / "checkpoint"] if _is_checkpoint(path)), None)
    if found is not None:
        return found
    if any((source / name).is_file() for name in ("settings.json", RUN_FILE)):
        raise UsageError(
            f"{source} 是一次训练，但里面没有写完的检查点。训练完的模型请直接使用；"
            "没有训练完的，请等它写下第一个检查点。"
        )
    raise UsageError(
        f"{source} 不是训练的检查点。请给出 plug pretrain 或 plug finetune 的输出目录，"
        "或其中的一个检查点。"
    )


def _is_checkpoint(directory: Path) -> bool:
    """Whether it holds the state of a run; a model directory alone does not."""
    is_trained = any(
        (directory / name).is_file()
        for name in ("training_state.pt", "state.json", "trainer_state.json")
    )
    return is_trained and not directory.name.startswith(".")


def _open(directory: Path) -> _Source:
    if not (directory / CONFIG_FILE).is_file():
        if any(directory.glob("adapter_*")) or is_sharded(directory / _WEIGHTS):
            raise UsageError(
                f"检查点 {directory} 里只有适配器，没有整个模型。请用 --resume 把微调做完。"
            )
        raise UsageError(
            f"检查点 {directory} 里没有 {CONFIG_FILE}，不知道模型的形状：它是更早的版本写的。"
            "请用 --resume 把训练做完。"
        )
    for place, prefix in ((directory, _WEIGHT), (directory / _WEIGHTS, "")):
        if is_sharded(place):
            specs = {
                name.removeprefix(prefix): spec
                for name, spec in sharded_specs(place).items()
                if name.startswith(prefix)
            }
            return _Source(specs, _whole(place, prefix, specs))
    places = read_places(directory)
    return _Source({name: place.spec for name, place in places.items()}, map_tensors(places))


def _whole(place: Path, prefix: str, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in read_whole(place, (f"{prefix}{name}" for name in names)):
        yield name.removeprefix(prefix), tensor


def _check_shapes(directory: Path, specs: dict[str, TensorSpec]) -> None:
    """Raise a `PlugError` unless the tensors are those of the config beside them.

    A fine-tuned model lacks parts of `Plug` and has others; what both have must agree.
    """
    if not specs:
        raise PlugError(f"检查点 {directory} 里没有权重。请用更早的检查点。")
    with without_memory():
        expected = weight_shapes(Plug(PlugConfig.from_file(directory / CONFIG_FILE)))
    found = {name: spec.shape for name, spec in specs.items()}
    if (directory / "trainer_state.json").is_file():
        both = found.keys() & expected.keys()
        found, expected = ({name: each[name] for name in both} for each in (found, expected))
    check_names_and_shapes(directory, found, expected)

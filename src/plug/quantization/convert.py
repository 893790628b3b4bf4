"""A model directory, or an original's shards, to a quantised directory, a tensor at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from plug.checkpoints.directory import (
    CONFIG_FILE,
    RUN_FILE,
    find_model_directory,
    is_original,
    load_tokenizer,
    refuse_quantized,
    weight_shapes,
    write_configs,
)
from plug.checkpoints.headers import locate_weights
from plug.checkpoints.hub import CONFIGURATION_FILE
from plug.checkpoints.original import OriginalReader
from plug.checkpoints.weights import TensorSpec, WeightWriter, map_tensors
from plug.errors import PlugError
from plug.files import new_directory, refuse_used, write_json
from plug.jsonfiles import read_json
from plug.model.configuration import PlugConfig
from plug.model.plug import Plug
from plug.model.without_memory import without_memory
from plug.quantization.linear import quantized_names
from plug.quantization.scheme import Scheme, check_saved

Progress = Callable[[int, int], None]  # weights done, weights in all


def quantize_directory(
    source: str | Path,
    target: Path,
    *,
    bits: int,
    layers: Iterable[tuple[str, dict[str, Tensor]]] = (),
    progress: Progress = lambda _done, _total: None,
) -> list[str]:
    """Write ``source`` with its encoder and decoder layers in 8 or 4 bits.

    Memory holds one tensor and its quantised form at a time, whatever the model's size.

    Args:
        source: a name or directory as `plug.load` takes it, or an original's directory.
        target: is not there yet, or empty; filled only when all goes well.
        bits: 8 or 4.
        layers: names of linear layers and the tensors that stand for their weights, as `calibrated`
            gives them. Weights that are not among them are rounded to the nearest.
        progress: called after each tensor.

    Returns:
        What the user should know, in Chinese, a sentence each.

    Raises:
        UsageError: no such model, one that is quantised already or too narrow for groups, or
            ``target`` is in use.
        PlugError: the weights are damaged, or the disk is full.
    """
    refuse_used(target)
    scheme = Scheme.of(bits)
    notes: list[str] = []
    tensors: Iterator[tuple[str, Tensor]]
    if is_original(Path(source)):
        original = OriginalReader(Path(source))
        config, notes, tokenizer = original.config, original.notes, original.tokenizer
        dtypes, tensors = original.dtypes(), original.tensors()
    else:
        directory = find_model_directory(source)
        refuse_quantized(directory)
        config = PlugConfig.from_file(directory / CONFIG_FILE)
        tokenizer = load_tokenizer(directory) if _has_tokenizer(directory) else None
        with without_memory():
            shapes = weight_shapes(Plug(config))
        places = locate_weights(directory, shapes)
        dtypes = {name: place.spec.dtype for name, place in places.items()}
        for name, dtype in dtypes.items():
            check_saved(directory, name, dtype, torch.float32)
        tensors = map_tensors(places)
    specs, names = _specs(config, scheme, dtypes)
    total = sum(spec.num_bytes for spec in specs.values())
    done = 0
    with new_directory(target) as temporary:
        with WeightWriter(temporary, specs) as writer:
            given = set()
            for layer, parts in layers:
                given.add(f"{layer}.weight")
                for own, value in parts.items():
                    writer.write(f"{layer}.{own}", value)
                    done += specs[f"{layer}.{own}"].num_bytes
                progress(done, total)
            for name, tensor in tensors:
                if name in given:
                    continue
                if not torch.isfinite(tensor).all():
                    raise PlugError(f"{source} 的 {name} 里有 NaN 或无穷大，权重已损坏。")
                for own, value in _kept(name, tensor, scheme, names).items():
                    writer.write(own, value)
                    done += specs[own].num_bytes
                progress(done, total)
        write_configs(temporary, config, specs, scheme.to_dict())
        if tokenizer is not None:
            tokenizer.save(temporary, model_max_length=config.max_source_length)
        if (Path(source) / RUN_FILE).is_file():  # fine-tuned: its task, and how ModelScope calls it
            for name in (RUN_FILE, CONFIGURATION_FILE):
                if (Path(source) / name).is_file():
                    write_json(temporary / name, read_json(Path(source) / name))
    return notes


def _specs(
    config: PlugConfig, scheme: Scheme, dtypes: dict[str, torch.dtype]
) -> tuple[dict[str, TensorSpec], set[str]]:
    """Every tensor to be written, and the names of the layers that are quantised."""
    with without_memory():
        model = Plug(config)
    layers = set(quantized_names(model))
    specs: dict[str, TensorSpec] = {}
    for name, shape in weight_shapes(model).items():
        layer, _, kind = name.rpartition(".")
        if layer in layers and kind == "weight":
            for own, (dtype, own_shape) in scheme.tensors(shape[0], shape[1]).items():
                specs[f"{layer}.{own}"] = TensorSpec(dtype, own_shape)
        else:
            specs[name] = TensorSpec(dtypes[name], shape)
    return specs, layers


def _kept(name: str, tensor: Tensor, scheme: Scheme, layers: set[str]) -> dict[str, Tensor]:
    layer, _, kind = name.rpartition(".")
    if layer not in layers or kind != "weight":
        return {name: tensor}
    return {f"{layer}.{own}": value for own, value in scheme.quantize(tensor).items()}


def _has_tokenizer(directory: Path) -> bool:
    return (directory / "tokenizer.json").is_file() or (directory / "vocab.txt").is_file()

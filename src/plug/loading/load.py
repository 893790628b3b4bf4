"""`plug.load`: a model directory to a model whose weights are on the device."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from plug.checkpoints.directory import CONFIG_FILE, find_model_directory, weight_shapes
from plug.checkpoints.headers import locate_weights
from plug.checkpoints.weights import DTYPES, Place, TensorSpec, check_finite, finite, map_tensors
from plug.distributed import tensor_parallel
from plug.distributed.processes import Processes
from plug.errors import UsageError
from plug.loading import huge_pages
from plug.loading.adapters import attach, read_adapter
from plug.loading.estimate import STREAMED_AT_ONCE, Room
from plug.loading.memory import check_dtype, check_host_memory, check_memory
from plug.loading.offload import DeviceMap, choose, is_elsewhere, keep_elsewhere, layer_bytes
from plug.loading.page_cache import read_ahead
from plug.loading.transfer import Part, Transfer
from plug.model.configuration import PlugConfig
from plug.model.plug import Plug
from plug.model.without_memory import without_memory
from plug.quantization.linear import quantize_modules, scheme_of
from plug.quantization.scheme import check_saved, is_quantized, read_scheme

logger = logging.getLogger(__name__)


def load(
    name_or_path: str | Path | None = None,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    room: Room | None = None,
    processes: Processes | None = None,
    device_map: DeviceMap | None = None,
    adapter: str | Path | None = None,
) -> Plug:
    """A model in eval mode, its weights read straight onto ``device``.

    Host memory holds no second copy: on the CPU, weights of the wanted dtype stay views of the
    mapped file, or are read into huge pages (`huge_pages.py`); elsewhere they pass through a few
    buffers (`transfer.py`).

    Args:
        name_or_path: as in `find_model_directory`.
        device: "cpu", "cuda", "cuda:1", …
        dtype: of all weights but those of quantised layers; None is float32 on the CPU and each
            tensor's saved dtype elsewhere.
        room: what must be free on ``device`` besides the weights, to write; None is nothing.
        processes: of several, each reads and gets its shard of the model
            (`plug.distributed.tensor_parallel`), to write with; it cannot be trained or saved.
        device_map: where layers of the encoder are kept that ``device`` has no memory for, until
            they are needed: "auto", or from names ("encoder.layers.23") to "cpu" (the file itself,
            by way of the system's page cache) or another card. Not to be trained or saved either.
        adapter: directory of a LoRA adapter, of `plug finetune` or peft, that is added to the
            weights (`plug.loading.adapters`).

    Raises:
        UsageError: as in `find_model_directory`, ``dtype`` is none of `weights.DTYPES`, or the
            model cannot be shared out among so many; or the adapter is of another model, or does
            not go with ``processes``, ``device_map`` or a model without a head.
        PlugError: weights are missing, damaged, NaN or infinite, do not fit `config.json` or the
            device's memory, or have a dtype that the device lacks.
    """
    directory = find_model_directory(name_or_path)
    device = torch.device(device)
    if dtype is not None and dtype not in DTYPES.values():
        raise UsageError(f"dtype={dtype} 不支持。可用：{'、'.join(DTYPES)}。")
    if dtype is None and device.type == "cpu":
        dtype = torch.float32
    if adapter is not None and (device_map is not None or (processes and processes.world_size > 1)):
        raise UsageError(
            "--adapter 不能和 --device-map 或多个进程一起用。"
            "请先合并：plug merge --model … --adapter … --to …"
        )
    added = None if adapter is None else read_adapter(adapter, directory)
    if added is not None and added.head:
        raise UsageError(
            f"适配器 {adapter} 带有任务的输出层（{'、'.join(sorted(added.head)[:3])}），不能写作。"
            "请用 plug predict --adapter。"
        )
    model = _empty(directory)
    places = locate_weights(directory, weight_shapes(model))
    specs = _specs(directory, model, places, dtype)
    began = time.perf_counter()
    kept = choose(device_map, model, specs, device, room)
    if processes is not None and processes.world_size > 1:
        if device_map is not None:
            raise UsageError("--device-map 和多个进程不能一起用。请只用其中一种。")
        tensor_parallel.check_divisible(model, processes.world_size)
        regions = {
            name: tensor_parallel.shard_slices(name, x.shape, processes)
            for name, x in specs.items()
        }
        weights = _read(directory, places, specs, regions, device, model, room)
        tensor_parallel.shard_model(model, weights, processes)
    elif device.type == "cpu" and not kept:
        if dtype == torch.float32:
            check_host_memory(model.config, _saved_bits(model, places), room)
        read_ahead(place.file for place in places.values())
        by_steps = {} if room is None else huge_pages.read_by_steps(places)
        rest = {name: place for name, place in places.items() if name not in by_steps}
        copied = ((name, huge_pages.read(place)) for name, place in by_steps.items())
        mapped = ((name, x.to(specs[name].dtype)) for name, x in map_tensors(rest))
        weights = dict(finite(directory, chain(copied, mapped)))
        model.load_state_dict(weights, assign=True)
    else:
        here = {name: spec for name, spec in specs.items() if not is_elsewhere(name, kept)}
        besides = STREAMED_AT_ONCE * layer_bytes(specs) if kept else 0
        weights = _read(directory, places, here, {}, device, model, room, besides)
        model.load_state_dict(weights, assign=True, strict=not kept)
        if kept:
            keep_elsewhere(model, kept, places, specs, device)
    if added is not None:
        attach(model, added)
    size, seconds = sum(x.nbytes for x in weights.values()), time.perf_counter() - began
    logger.info(
        "权重 %.2f GB，%.2f 秒读到 %s（%.2f GB/s）。",
        *(size / 1e9, seconds, device, size / seconds / 1e9),
    )
    return model.eval()


def _empty(directory: Path) -> Plug:
    """The model that the directory's `config.json` describes, without memory."""
    with without_memory():
        model = Plug(PlugConfig.from_file(directory / CONFIG_FILE))
        if (scheme := read_scheme(directory / CONFIG_FILE)) is not None:
            quantize_modules(model, scheme)
    return model


def _specs(
    directory: Path, model: Plug, places: Mapping[str, Place], dtype: torch.dtype | None
) -> dict[str, TensorSpec]:
    """What each tensor becomes in memory.

    Raises:
        PlugError: integers where floats should be or the reverse, or a part of a quantised weight
            in another dtype than its format's.
    """
    specs = {}
    for name, wanted in model.state_dict().items():
        saved = places[name].spec
        check_saved(directory, name, saved.dtype, wanted.dtype)
        keeps = dtype is None or is_quantized(name, wanted.dtype)
        specs[name] = saved if keeps or dtype is None else saved._replace(dtype=dtype)
    return specs


def _saved_bits(model: Plug, places: Mapping[str, Place]) -> int:
    """Of the layers' weights in their file; those of the word table where no scheme is told."""
    scheme = scheme_of(model)
    if scheme is not None:
        return scheme.bits
    return 8 * places["embeddings.word_embeddings.weight"].spec.dtype.itemsize


def _read(
    directory: Path,
    places: Mapping[str, Place],
    specs: Mapping[str, TensorSpec],
    regions: Mapping[str, tuple[slice, ...]],
    device: torch.device,
    model: Plug,
    room: Room | None,
    besides: int = 0,
) -> dict[str, Tensor]:
    """Read every tensor, or its region, once they and ``besides`` are found to fit.

    Args:
        directory: of the model, for messages.
        places: of the tensors in files.
        specs: what each tensor becomes in memory.
        regions: the slices of tensors of which not all is read.
        device: where they go.
        model: without memory; its config and scheme count.
        room: what writing needs besides the weights.
        besides: bytes of other weights that must fit too.
    """
    shapes = {
        name: tensor_parallel.shard_shape(regions.get(name, ()), x.shape)
        for name, x in specs.items()
    }
    own = {name: spec._replace(shape=shapes[name]) for name, spec in specs.items()}
    table = specs["embeddings.word_embeddings.weight"].dtype
    scheme = scheme_of(model)
    check_dtype(device, table)
    check_memory(
        device,
        model.config,
        sum(spec.num_bytes for spec in own.values()) + besides,
        bits=8 * table.itemsize if scheme is None else scheme.bits,
        room=room,
        bytes_per_value=table.itemsize,
        is_share=bool(regions),
    )
    weights = {
        name: torch.empty(spec.shape, dtype=spec.dtype, device=device) for name, spec in own.items()
    }
    with Transfer(device) as transfer:
        transfer.fill(
            Part(places[name], target, regions.get(name, ())) for name, target in weights.items()
        )
    check_finite(directory, weights.items())
    return weights

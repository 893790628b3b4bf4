"""Model directories: find one, load it, save it, and replace one without ever losing it.

A directory holds `config.json`, `generation_config.json`, `model*.safetensors` and tokenizer
files; `transformers` loads it too. The original's checkpoints are in `original.py`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from plug.checkpoints.hub import write_pretrained_configuration
from plug.checkpoints.transfer import Part, Transfer
from plug.checkpoints.weights import (
    DTYPES,
    MAX_SHARD_BYTES,
    Place,
    TensorSpec,
    WeightWriter,
    locate_weights,
    map_tensors,
    write_json,
)
from plug.distributed import tensor_parallel
from plug.distributed.device_map import (
    DeviceMap,
    choose,
    is_elsewhere,
    keep_elsewhere,
    layer_bytes,
)
from plug.distributed.processes import Processes
from plug.errors import PlugError, UsageError
from plug.memory import Room, check_dtype, check_memory
from plug.model.accounting import STREAMED_AT_ONCE
from plug.model.configuration import PlugConfig
from plug.model.plug import Plug
from plug.quantization.linear import quantize_modules, scheme_of
from plug.quantization.scheme import Scheme, read_scheme

if TYPE_CHECKING:
    from plug.tokenization import PlugTokenizer

logger = logging.getLogger(__name__)

SHIPPED_MODEL = "plug-mini-zh"
CONFIG_FILE = "config.json"
_ASSETS = Path(__file__).parent.parent / "assets"


def find_model_directory(name_or_path: str | Path | None = None) -> Path:
    """The directory of a model: None or "plug-mini-zh" is the one that ships with the package.

    Raises:
        UsageError: there is no such directory, it is empty, or it holds something else.
    """
    if name_or_path is None or str(name_or_path) == SHIPPED_MODEL:
        directory = _ASSETS / SHIPPED_MODEL
        if not directory.is_dir():
            raise UsageError(
                f"安装包里没有随附的模型 {SHIPPED_MODEL}。请重新安装 plug-zh，或用目录指定模型。"
            )
    else:
        directory = Path(name_or_path).expanduser()
    if not directory.exists():
        raise UsageError(
            f"找不到模型 {name_or_path}：它不是目录，也不是随附模型的名字 {SHIPPED_MODEL}。"
        )
    if not directory.is_dir():
        raise UsageError(f"模型 {directory} 应是目录，却是文件。请给出它所在的目录。")
    if not any(directory.iterdir()):
        raise UsageError(f"模型目录 {directory} 是空的。请检查路径，或重新取得模型。")
    if is_original(directory):
        raise UsageError(
            f"{directory} 是原版 PLUG 的权重。请先转换：plug convert --from {directory} --to 新目录"
        )
    if not (directory / CONFIG_FILE).is_file():
        raise UsageError(f"{directory} 里没有 {CONFIG_FILE}，不是 PLUG 模型目录。")
    PlugConfig.from_file(directory / CONFIG_FILE)
    return directory


def is_original(directory: Path) -> bool:
    """Whether it holds the original's shards."""
    return any(directory.glob("model/mp_rank_*_model_states.pt"))


def load(
    name_or_path: str | Path | None = None,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    room: Room | None = None,
    processes: Processes | None = None,
    device_map: DeviceMap | None = None,
) -> Plug:
    """A model in eval mode, its weights read straight onto ``device``.

    Host memory holds no second copy: on the CPU, weights of the wanted dtype stay views of the
    mapped file; elsewhere they pass through a few buffers (`transfer.py`).

    Args:
        name_or_path: as in `find_model_directory`.
        device: "cpu", "cuda", "cuda:1", …
        dtype: of all weights but those of quantised layers; None is float32 on the CPU and each
            tensor's saved dtype elsewhere.
        room: what must be free on ``device`` besides the weights; None is nothing.
        processes: of several, each reads and gets its shard of the model
            (`plug.distributed.tensor_parallel`), to write with; it cannot be trained or saved.
        device_map: where layers of the encoder are kept that ``device`` has no memory for, until
            they are needed: "auto", or from names ("encoder.layers.23") to "cpu" (the file itself,
            by way of the system's page cache) or another card. Not to be trained or saved either.

    Raises:
        UsageError: as in `find_model_directory`, ``dtype`` is none of `weights.DTYPES`, or the
            model cannot be shared out among so many.
        PlugError: weights are missing, damaged, do not fit `config.json` or the device's memory, or
            have a dtype that the device lacks.
    """
    directory = find_model_directory(name_or_path)
    device = torch.device(device)
    if dtype is not None and dtype not in DTYPES.values():
        raise UsageError(f"dtype={dtype} 不支持。可用：{'、'.join(DTYPES)}。")
    if dtype is None and device.type == "cpu":
        dtype = torch.float32
    model = _empty(directory)
    places = locate_weights(directory, weight_shapes(model))
    specs = _specs(directory, model, places, dtype)
    began = time.perf_counter()
    kept = choose(device_map, model, specs, device, room)
    is_mapped = False
    if processes is not None and processes.world_size > 1:
        if device_map is not None:
            raise UsageError("--device-map 和多个进程不能一起用。请只用其中一种。")
        tensor_parallel.check_divisible(model, processes.world_size)
        regions = {
            name: tensor_parallel.shard_slices(name, x.shape, processes)
            for name, x in specs.items()
        }
        weights = _read(places, specs, regions, device, model, room)
        tensor_parallel.shard_model(model, weights, processes)
    elif device.type == "cpu" and not kept:
        is_mapped = True
        weights = {name: x.to(specs[name].dtype) for name, x in map_tensors(places)}
        model.load_state_dict(weights, assign=True)
    else:
        here = {name: spec for name, spec in specs.items() if not is_elsewhere(name, kept)}
        besides = STREAMED_AT_ONCE * layer_bytes(specs) if kept else 0
        weights = _read(places, here, {}, device, model, room, besides)
        model.load_state_dict(weights, assign=True, strict=not kept)
        if kept:
            keep_elsewhere(model, kept, places, specs, device)
    size, seconds = sum(x.nbytes for x in weights.values()), time.perf_counter() - began
    logger.info(
        "权重 %.2f GB，%.2f 秒读到 %s（%.2f GB/s）%s。",
        *(size / 1e9, seconds, device, size / seconds / 1e9),
        "，精度不变的部分用到时才真正读入" if is_mapped else "",
    )
    return model.eval()


def _empty(directory: Path) -> Plug:
    """The model that the directory's `config.json` describes, without memory."""
    with torch.device("meta"), _NoInitialization():
        model = Plug(PlugConfig.from_file(directory / CONFIG_FILE))
        if (scheme := read_scheme(directory / CONFIG_FILE)) is not None:
            quantize_modules(model, scheme)
    return model


def _specs(
    directory: Path, model: Plug, places: Mapping[str, Place], dtype: torch.dtype | None
) -> dict[str, TensorSpec]:
    """What each tensor becomes in memory.

    Raises:
        PlugError: integers where floats should be, or the reverse.
    """
    specs = {}
    for name, wanted in model.state_dict().items():
        saved = places[name].spec
        if saved.dtype.is_floating_point != wanted.is_floating_point():
            raise PlugError(
                f"{directory} 的 {name} 是 {saved.dtype}，应为 {wanted.dtype}。"
                "请检查 config.json 的 quantization 与权重是否配套。"
            )
        keeps = dtype is None or _is_quantized(name, saved.dtype)
        specs[name] = saved if keeps or dtype is None else saved._replace(dtype=dtype)
    return specs


def _read(
    places: Mapping[str, Place],
    specs: Mapping[str, TensorSpec],
    regions: Mapping[str, tuple[slice, ...]],
    device: torch.device,
    model: Plug,
    room: Room | None,
    besides: int = 0,
) -> dict[str, Tensor]:
    """Every tensor, or its region if it has one, once they and ``besides`` are found to fit."""
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
    return weights


def _is_quantized(name: str, dtype: torch.dtype) -> bool:
    return not dtype.is_floating_point or name.endswith((".scale", ".center"))


def refuse_quantized(directory: Path) -> None:
    """Raise a `UsageError` where a directory's weights are integers, and floats are needed."""
    if read_scheme(directory / CONFIG_FILE) is not None:
        raise UsageError(f"{directory} 是量化过的，只能用来写作和评测。请改用量化之前的模型。")


def refuse_used(target: Path) -> None:
    """Raise a `UsageError` unless ``target`` is free to be written."""
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise UsageError(f"{target} 已经存在，不会覆盖。请换一个目录，或先删去它。")


def weight_shapes(model: Plug) -> dict[str, tuple[int, ...]]:
    """The name and shape of every tensor that a model directory must hold."""
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


class _NoInitialization(TorchFunctionMode):
    """Functions of `torch.nn.init` do nothing.

    On the meta device they would have nothing to do, and import the compiler for it: a second.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else (kwargs or {})["tensor"]
        return func(*args, **(kwargs or {}))


def save(
    model: Plug,
    directory: str | Path,
    *,
    tokenizer: PlugTokenizer | None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write a model directory; an older one is replaced only when the new one is whole.

    Args:
        model: on any device.
        directory: where; its parent is made if need be.
        tokenizer: saved beside the weights; None leaves it out.
        dtype: of all weights; None keeps each parameter's own.
        max_shard_bytes: the largest weight file.

    Raises:
        PlugError: the disk is full or cannot be written; what was there is untouched.
        UsageError: ``directory`` holds something that is not a model.
    """
    with replace_directory(directory) as temporary:
        write_model(
            model, temporary, tokenizer=tokenizer, dtype=dtype, max_shard_bytes=max_shard_bytes
        )


def write_model(
    model: Plug,
    directory: Path,
    *,
    tokenizer: PlugTokenizer | None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """What `save` writes, into a directory that is there (arguments as in `save`)."""
    state = model.state_dict()
    specs = {
        name: TensorSpec(
            tensor.dtype if dtype is None or _is_quantized(name, tensor.dtype) else dtype,
            tuple(tensor.shape),
        )
        for name, tensor in state.items()
    }
    with WeightWriter(directory, specs, max_shard_bytes) as writer:
        for name, tensor in state.items():
            writer.write(name, tensor.detach())
    write_configs(directory, model.config, specs, scheme_of(model))
    if tokenizer is not None:
        tokenizer.save(directory)


def write_configs(
    directory: Path,
    config: PlugConfig,
    specs: dict[str, TensorSpec],
    scheme: Scheme | None = None,
) -> None:
    """`config.json`, ModelScope's `configuration.json`; with a decoder `generation_config.json`."""
    sizes: Counter[torch.dtype] = Counter()
    for spec in specs.values():
        if spec.dtype.is_floating_point:
            sizes[spec.dtype] += spec.num_bytes
    bookkeeping: dict[str, Any] = {
        "model_type": "plug",
        "architectures": ["PlugForPreTraining"],
        "is_encoder_decoder": True,
        "tie_word_embeddings": True,
        "dtype": str(sizes.most_common(1)[0][0]).removeprefix("torch."),
    }
    if scheme is not None:
        bookkeeping["quantization"] = scheme.to_dict()
    write_json(directory / CONFIG_FILE, bookkeeping | config.to_dict())
    defaults = generation_defaults(config)
    if config.num_decoder_layers:
        write_json(directory / "generation_config.json", defaults)
    sampling = {name: defaults[name] for name in ("temperature", "top_k")}
    write_pretrained_configuration(directory, config, sampling)


def generation_defaults(config: PlugConfig) -> dict[str, Any]:
    """The sampling that models are saved with, in the names of transformers' GenerationConfig.

    Source: the original's `configuration.json` (temperature 0.9, top_k 20, no top_p).
    """
    return {
        "do_sample": True,
        "temperature": 0.9,
        "top_k": 20,
        "repetition_penalty": 1.1,
        "max_new_tokens": 256,
        "decoder_start_token_id": config.decoder_start_token_id,
        "eos_token_id": config.eos_token_id,
        "pad_token_id": config.pad_token_id,
    }


@contextlib.contextmanager
def replace_directory(directory: str | Path) -> Iterator[Path]:
    """A new directory beside ``directory`` to fill, which takes its place when the block ends well.

    If the block fails, the new one is removed and the old one is as it was. An old directory must
    be empty or hold a `config.json`: nothing but a model or a checkpoint is ever replaced.

    Raises:
        UsageError: ``directory`` is a file, or holds something else.
        PlugError: the disk is full, or cannot be written.
    """
    target = Path(directory).expanduser().resolve()
    if target.exists() and not target.is_dir():
        raise UsageError(f"{target} 是一个文件，不能写成目录。请换一个路径。")
    if target.is_dir() and any(target.iterdir()) and not (target / CONFIG_FILE).is_file():
        raise UsageError(f"目录 {target} 里有别的东西，不会覆盖。请换一个目录。")
    temporary, old = (
        target.with_name(f".{target.name}.{kind}-{os.getpid()}") for kind in ("partial", "old")
    )
    try:
        temporary.mkdir(parents=True)
        yield temporary
        _sync(temporary)
        if target.exists():
            target.rename(old)
        temporary.rename(target)
        _sync(target.parent)
    except OSError as error:
        raise PlugError(
            f"没能写入 {target}：{error.strerror or error}。原有内容没有改动；"
            "请检查磁盘空间和权限后重试。"
        ) from error
    finally:
        if old.exists() and not target.exists():  # stopped between the two renames
            old.rename(target)
        for leftover in (temporary, old):
            shutil.rmtree(leftover, ignore_errors=True)


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

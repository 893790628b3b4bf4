"""Whether a model fits into the memory of a device, and what to do if it does not."""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from dataclasses import dataclass, replace

import torch

from plug.errors import PlugError, UsageError
from plug.model.accounting import cache_bytes, layer, parts, total
from plug.model.configuration import PlugConfig
from plug.quantization.scheme import Scheme

TOKENS_AT_ONCE = 16384  # of sources, encoded together at most
STREAMED_AT_ONCE = 3  # layers that come when needed: the last one, the one at work, the next
OVERHEAD_BYTES = 512 * 2**20  # libraries' own memory, CUDA graphs, what no allocator can use


def weight_bytes(config: PlugConfig, bits: int, bytes_per_value: int = 2) -> int:
    """Return the bytes of a model's weights, as a directory and a device hold them.

    Args:
        config: its shape.
        bits: 32 or 16: of all weights; 8 or 4: of the linear layers of encoder and decoder, as
            `plug quantize` writes them. The rest, the word table included, stays as it was.
        bytes_per_value: of that rest.

    Raises:
        UsageError: 4 bits, and a layer cannot be parted into groups (`Scheme.tensors`).
    """
    parameters = total(config).parameters
    if bits >= 16:
        return parameters * bits // 8
    scheme, by_part = Scheme.of(bits), parts(config)
    matrices = Counter(by_part["encoder"].matrices + by_part["decoder"].matrices)
    quantized = sum(
        count * sum(math.prod(shape) * dtype.itemsize for dtype, shape in tensors)
        for (rows, columns), count in matrices.items()
        for tensors in [scheme.tensors(rows, columns).values()]
    )
    plain = parameters - sum(rows * columns * count for (rows, columns), count in matrices.items())
    return quantized + plain * bytes_per_value


@dataclass(frozen=True, slots=True)
class Need:
    """Bytes that writing needs on a device."""

    weights: int
    caches: int
    workspace: int

    @property
    def total(self) -> int:
        return self.weights + self.caches + self.workspace


def generation_need(
    config: PlugConfig,
    *,
    weights: int,
    batch_size: int,
    source_length: int,
    capacity: int,
    bytes_per_value: int = 2,
) -> Need:
    """What writing takes, an upper estimate of the peak.

    The workspace is the sum of: an encoder layer's inside, (6 h + 2 f) values a token of
    the `TOKENS_AT_ONCE` at most; cross-attention keys and values before the cache has them; one
    unpacked weight, h f; four copies of the logits in float32; `OVERHEAD_BYTES`.

    Args:
        config: the shape.
        weights: their bytes, as they are kept.
        batch_size: texts written together.
        source_length: tokens of a source.
        capacity: tokens of a window.
        bytes_per_value: of activations and caches.
    """
    hidden, intermediate = config.hidden_size, config.intermediate_size
    token = cache_bytes(config, bytes_per_value)
    tokens = min(batch_size * source_length, TOKENS_AT_ONCE)
    inside = (6 * hidden + 2 * intermediate) * tokens * bytes_per_value
    unpacked = hidden * intermediate * bytes_per_value
    logits = 4 * batch_size * config.vocab_size * 4
    return Need(
        weights=weights,
        caches=batch_size * (source_length + capacity) * token,
        workspace=inside + batch_size * source_length * token + unpacked + logits + OVERHEAD_BYTES,
    )


def resident_share(config: PlugConfig) -> float:
    """Part of the parameters that a device map keeps on the device at least.

    All but the encoder's layers, and `STREAMED_AT_ONCE` of those.
    """
    by_part = {name: part.parameters for name, part in parts(config).items()}
    streamed = layer(config, attentions=1).parameters * max(
        0, config.num_hidden_layers - STREAMED_AT_ONCE
    )
    return 1 - streamed / sum(by_part.values())


@dataclass(frozen=True, slots=True)
class Room:
    """What writing needs besides the weights, counted in texts and tokens.

    Args:
        batch_size: texts written together.
        source_length: tokens of a source, where the model can read so many.
        capacity: tokens of a window, likewise.
    """

    batch_size: int = 1
    source_length: int = 512
    capacity: int = 384

    def need(self, config: PlugConfig, weights: int, bytes_per_value: int) -> Need:
        """In bytes, with ``weights``."""
        longest = config.max_position_embeddings
        return generation_need(
            config,
            weights=weights,
            batch_size=self.batch_size,
            source_length=min(self.source_length, longest),
            capacity=min(self.capacity, longest),
            bytes_per_value=bytes_per_value,
        )


def free_memory(device: torch.device) -> int | None:
    """Bytes that can be had on ``device`` now; None where nobody says."""
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return free + kept


def check_dtype(device: torch.device, dtype: torch.dtype) -> None:
    """Raise a `PlugError` where the device has no arithmetic in ``dtype``."""
    if device.type != "cuda" or dtype != torch.bfloat16 or torch.version.hip:
        return
    if torch.cuda.get_device_capability(device) < (8, 0):
        raise PlugError(
            f"{device}（{torch.cuda.get_device_name(device)}）没有 bfloat16 的运算，"
            "而这个模型是 bfloat16 的。请用 --dtype float16（或 float32）。"
        )


def check_memory(
    device: torch.device,
    config: PlugConfig,
    weights: int,
    *,
    bits: int = 16,
    room: Room | None = None,
    bytes_per_value: int = 2,
    is_share: bool = False,
) -> None:
    """Raise a `PlugError` that says what would fit, unless the model does.

    Args:
        device: where it is to be.
        config: its shape.
        weights: bytes, as they will be kept there.
        bits: of its layers' weights.
        room: what writing needs besides; None is nothing.
        bytes_per_value: of activations and caches.
        is_share: other processes have the rest of the model.
    """
    free = free_memory(device)
    if free is None:
        return
    need = Need(weights, 0, 0) if room is None else room.need(config, weights, bytes_per_value)
    if need.total <= free:
        return
    parts = f"权重 {_gb(need.weights)}，缓存 {_gb(need.caches)}，运算 {_gb(need.workspace)}"
    if is_share:
        ways = ["更多的进程（torchrun --nproc-per-node）", "量化过的模型（plug quantize）"]
    else:
        ways = _ways_to_fit(config, need, free, bits, room, bytes_per_value)
    raise PlugError(
        f"{device} 的显存不够：约需 {_gb(need.total)} GB（{parts}），空闲 {_gb(free)} GB。"
        + ("可以：" + "；".join(ways) if ways else "请换显存更大的卡，或用 --device cpu")
        + "。"
    )


def _ways_to_fit(
    config: PlugConfig,
    need: Need,
    free: int,
    bits: int,
    room: Room | None,
    bytes_per_value: int,
) -> list[str]:
    ways = []
    besides = need.caches + need.workspace
    fewer = 1 if room is None else room.batch_size
    while room is not None and fewer > 1:
        fewer //= 2
        smaller = replace(room, batch_size=fewer).need(config, need.weights, bytes_per_value)
        if smaller.total <= free:
            ways.append(
                f"--batch-size {fewer}（现在 {room.batch_size}），约需 {_gb(smaller.total)} GB"
            )
            break
    for fewer_bits in (8, 4):
        with contextlib.suppress(UsageError):  # too narrow for groups of 4 bits
            size = weight_bytes(config, fewer_bits, bytes_per_value) + besides
            if fewer_bits < bits and size <= free:
                ways.append(f"plug quantize --bits {fewer_bits}，约需 {_gb(size)} GB")
    size = int(need.weights * resident_share(config)) + besides
    if size <= free:
        ways.append(f"--device-map auto，放不下的层用时再读，至少要 {_gb(size)} GB")
    count = torch.cuda.device_count()
    if count > 1 and not config.num_attention_heads % count:
        size = need.weights // count + besides
        if size <= free:
            ways.append(f"torchrun --nproc-per-node {count}，每张卡约需 {_gb(size)} GB")
    return ways


def _gb(count: int) -> str:
    return f"{count / 1e9:.1f}"

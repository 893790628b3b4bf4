"""Whether a model fits into the memory of a device, and what to do if it does not.

`plug.loading.estimate` has the formulae.
"""

from __future__ import annotations

import contextlib
from dataclasses import replace

import torch

from plug.errors import PlugError, UsageError
from plug.kernels.cpu.build import library
from plug.loading.estimate import Need, Room, cpu_weight_bytes, resident_share, weight_bytes
from plug.loading.host_memory import free_host_memory
from plug.model.configuration import PlugConfig


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
    need = Need(weights)
    if room is not None:
        need = room.need(config, weights, bytes_per_value, bits).with_overhead()
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


def check_host_memory(config: PlugConfig, bits: int, room: Room | None) -> None:
    """Raise a `PlugError` unless the host has the memory for a model on the CPU.

    Args:
        config: its shape.
        bits: of its layers' weights, as they were saved.
        room: what writing needs besides the weights; None is nothing.
    """
    free = free_host_memory()
    if free is None:
        return
    need = need_on_cpu(config, bits, room)
    if need.total <= free:
        return
    parts = f"权重 {_gb(need.weights)}，缓存 {_gb(need.caches)}，运算 {_gb(need.workspace)}"
    ways = _ways_to_fit_host(config, bits, room, free)
    raise PlugError(
        f"内存不够：约需 {_gb(need.total)} GB（{parts}），可用 {_gb(free)} GB。可以："
        + "；".join([*ways, "关掉占内存的程序，或换内存更大的机器"])
        + "。"
    )


def need_on_cpu(config: PlugConfig, bits: int, room: Room | None) -> Need:
    """Return what a model takes on this machine's CPU; arguments as in `check_host_memory`."""
    if room is None:
        return Need(cpu_weight_bytes(config, bits, writes=False))
    weights = cpu_weight_bytes(config, bits, writes=True, kernels=library() is not None)
    return room.need_on_cpu(config, weights).with_overhead()


def _ways_to_fit_host(config: PlugConfig, bits: int, room: Room | None, free: int) -> list[str]:
    ways = []
    fewer = 1 if room is None else room.batch_size
    while room is not None and fewer > 1:
        fewer //= 2
        size = need_on_cpu(config, bits, replace(room, batch_size=fewer)).total
        if size <= free:
            ways.append(f"--batch-size {fewer}（现在 {room.batch_size}），约需 {_gb(size)} GB")
            break
    for fewer_bits in (8, 4):
        with contextlib.suppress(UsageError):  # too narrow for groups of 4 bits
            size = need_on_cpu(config, fewer_bits, room).total
            if fewer_bits < bits and size <= free:
                ways.append(f"plug quantize --bits {fewer_bits}，约需 {_gb(size)} GB")
    if room is not None and library() is None:
        weights = cpu_weight_bytes(config, bits, writes=True)
        size = room.need_on_cpu(config, weights).with_overhead().total
        if size <= free:
            ways.append(f"装好 C++ 编译器（如 apt install g++），约需 {_gb(size)} GB")
    return ways


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
        smaller = replace(room, batch_size=fewer)
        size = smaller.need(config, need.weights, bytes_per_value, bits).with_overhead().total
        if size <= free:
            ways.append(f"--batch-size {fewer}（现在 {room.batch_size}），约需 {_gb(size)} GB")
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

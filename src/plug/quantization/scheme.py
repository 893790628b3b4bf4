"""`Scheme`: quantise a weight matrix to integers and scales, and dequantise it.

8 bits: one scale per output channel, symmetric: w = q * scale, q in -127 … 127.
4 bits: one scale and one centre per group of inputs: w = (q - 8) * scale + center, q in 0 … 15,
eight neighbours in four bytes. It is asymmetric because 16 levels are few: levels placed between a
group's least and largest weight are all used, at the cost of an eighth of a bit per weight.

Both formats are frozen: docs/quantization.md has them byte for byte, tests/golden/quantized a file
of each. A change needs a new `VERSION`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from plug.errors import PlugError, UsageError
from plug.jsonfiles import shown
from plug.model.configuration import read_config_file

VERSION = 1  # of both formats, in `config.json`; directories without one are of version 1
GROUP_SIZE = 128
# Which of eight neighbours stands in which 4 bits of a 32-bit word, from the lowest on: two next to
# each other are 16 bits apart, as a GPU's pair of 16-bit numbers wants them.
NIBBLES = (0, 2, 4, 6, 1, 3, 5, 7)
# What `config.json` says of that order: another one would be read as other weights.
PACKING = "".join(map(str, NIBBLES))
_ELEMENTS_AT_ONCE = 2**22
# 4 bits: the range of a group is tried at these sizes, and the least squared error wins.
_SHRINKS = (1.0, 0.95, 0.9, 0.85, 0.8)


@dataclass(frozen=True, slots=True)
class Scheme:
    """What `config.json` says under "quantization".

    Args:
        bits: 8 or 4.
        group_size: inputs that share a scale; None with 8 bits, where all do.

    Raises:
        UsageError: there is no such scheme.
    """

    bits: int
    group_size: int | None = None

    def __post_init__(self) -> None:
        if (self.bits, self.group_size) not in ((8, None), (4, GROUP_SIZE)):
            raise UsageError(
                f"不支持的量化：bits={self.bits!r}，group_size={self.group_size!r}。"
                f"可用：8 位（每个输出通道一个缩放），4 位（每 {GROUP_SIZE} 个输入一组）。"
            )

    @classmethod
    def of(cls, bits: int) -> Scheme:
        return cls(bits, GROUP_SIZE if bits == 4 else None)

    def to_dict(self) -> dict[str, int | str]:
        """Return the entry of `config.json`."""
        entry: dict[str, int | str] = {"version": VERSION, "bits": self.bits}
        if self.group_size is not None:
            entry |= {"group_size": self.group_size, "packing": PACKING}
        return entry

    def tensors(self, out: int, inputs: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Dtype and shape of what stands for a weight (out, in), by its name beside the bias.

        Raises:
            UsageError: the inputs cannot be parted into groups.
        """
        if self.group_size is None:
            return {"weight": (torch.int8, (out, inputs)), "scale": (torch.float32, (out,))}
        if inputs % self.group_size:
            raise UsageError(
                f"4 位量化每 {self.group_size} 个输入一组，而这个模型有宽度为 {inputs} 的层，分不成"
                "整组。请用 --bits 8。"
            )
        groups = (out, inputs // self.group_size)
        return {
            "weight": (torch.uint8, (out, inputs // 2)),
            "scale": (torch.bfloat16, groups),
            "center": (torch.bfloat16, groups),
        }

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        """`tensors` of a weight (out, in) of any float dtype; works on some rows at a time."""
        return self._in_parts(weight, lambda rows: self._quantize_rows(weight[rows].float()))

    def _in_parts(
        self, weight: Tensor, quantize: Callable[[slice], dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        """`tensors` of a weight, of whose rows ``quantize`` gives some."""
        count = max(1, _ELEMENTS_AT_ONCE // weight.shape[1])
        # Not parts to be joined at the end: what was used between those would stay taken.
        found = {
            name: torch.empty(shape, dtype=dtype, device=weight.device)
            for name, (dtype, shape) in self.tensors(*weight.shape).items()
        }
        for begin in range(0, len(weight), count):
            rows = slice(begin, begin + count)
            for name, part in quantize(rows).items():
                found[name][rows] = part
        return found

    def requantize(
        self, weight: Tensor, before: dict[str, Tensor], generator: torch.Generator
    ) -> dict[str, Tensor]:
        """`tensors` of a weight that has moved a little from what ``before`` stands for.

        Rounded to the nearest, weights that move by less than half a step would go back to where
        they were, and what moved them would be lost. Here scales stay, and a weight between two
        levels becomes one of them at random, the closer one more often, so that sums over many
        weights are right. Groups whose range is another one now are quantised anew.

        Args:
            weight: (out, in), on the CPU.
            before: `tensors` of the weight that it was.
            generator: of the random numbers.
        """
        return self._in_parts(
            weight,
            lambda rows: self._requantize_rows(
                weight[rows].float(),
                {name: tensor[rows] for name, tensor in before.items()},
                generator,
            ),
        )

    def _requantize_rows(
        self, weight: Tensor, before: dict[str, Tensor], generator: torch.Generator
    ) -> dict[str, Tensor]:
        anew = self._quantize_rows(weight)
        groups = weight.unflatten(1, (-1, self.group_size or weight.shape[1]))
        scale = before["scale"].float().view(*groups.shape[:2], 1)
        place = groups / scale.where(scale > 0, 1)
        least, most = -127, 127
        if self.group_size is not None:
            place = (groups - before["center"].float()[..., None]) / scale.where(scale > 0, 1) + 8
            least, most = 0, 15
        stays = (place.amin(2) >= least - 0.5) & (place.amax(2) <= most + 0.5)
        stays &= anew["scale"].float().view_as(stays) > scale[..., 0] / 2  # else steps are coarse
        drawn = torch.rand(place.shape, generator=generator).add_(place).floor_()
        drawn.clamp_(least, most)
        if self.group_size is None:
            weights = torch.where(stays, drawn.flatten(1).to(torch.int8), anew["weight"])
            return {"weight": weights, "scale": before["scale"].where(stays[:, 0], anew["scale"])}
        codes = drawn.where(stays[..., None], unpack_nibbles(anew["weight"]).view_as(drawn).float())
        kept = {name: before[name].where(stays, anew[name]) for name in ("scale", "center")}
        return {"weight": pack_nibbles(codes.flatten(1).to(torch.uint8)), **kept}

    def _quantize_rows(self, weight: Tensor) -> dict[str, Tensor]:
        if self.group_size is None:
            scale = weight.abs().amax(1) / 127
            scale = scale.where(scale > 0, 1)
            return {"weight": (weight / scale[:, None]).round_().to(torch.int8), "scale": scale}
        groups = weight.unflatten(1, (-1, self.group_size))
        least, most = groups.amin(2, keepdim=True), groups.amax(2, keepdim=True)
        scale = center = q = torch.empty(0)
        least_error = torch.full_like(least, float("inf"))
        for shrink in _SHRINKS:
            # Rounded first, so that the integers fit the scales that are saved.
            try_scale = ((most - least) * shrink / 15).bfloat16().float()
            try_center = ((least + most + try_scale) / 2).bfloat16().float()
            try_q = (groups - try_center) / try_scale.where(try_scale > 0, 1) + 8
            try_q.round_().clamp_(0, 15)
            error = ((try_q - 8) * try_scale + try_center).sub_(groups).square_()
            error = error.sum(2, keepdim=True)
            better = error < least_error
            if shrink == 1:
                scale, center, q = try_scale, try_center, try_q
            else:
                scale = torch.where(better, try_scale, scale)
                center = torch.where(better, try_center, center)
                q = torch.where(better, try_q, q)
            least_error = torch.minimum(error, least_error)
        return {
            "weight": pack_nibbles(q.flatten(1).to(torch.uint8)),
            "scale": scale[..., 0].bfloat16(),
            "center": center[..., 0].bfloat16(),
        }

    def dequantize(self, tensors: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
        """The weight (out, in) that `tensors` stand for."""
        weight, scale = tensors["weight"], tensors["scale"]
        if self.group_size is None:
            return (weight.to(scale.dtype) * scale[:, None]).to(dtype)
        groups = unpack_nibbles(weight).unflatten(1, (-1, self.group_size)).float() - 8
        restored = groups * scale.float()[..., None] + tensors["center"].float()[..., None]
        return restored.flatten(1).to(dtype)


def pack_nibbles(q: Tensor) -> Tensor:
    """Integers 0 … 15, uint8 (out, in), to (out, in / 2) bytes."""
    halves = q.unflatten(1, (-1, 8))[..., NIBBLES].unflatten(2, (4, 2))
    return (halves[..., 0] | (halves[..., 1] << 4)).flatten(1)


def unpack_nibbles(packed: Tensor) -> Tensor:
    """What `pack_nibbles` was given."""
    halves = torch.stack([packed & 15, packed >> 4], dim=2).flatten(1)
    places = [NIBBLES.index(column) for column in range(8)]
    return halves.unflatten(1, (-1, 8))[..., places].flatten(1)


def is_quantized(name: str, dtype: torch.dtype) -> bool:
    """Whether a tensor of this name and dtype is a part of a quantised weight."""
    return not dtype.is_floating_point or name.endswith((".scale", ".center"))


def check_saved(source: object, name: str, saved: torch.dtype, wanted: torch.dtype) -> None:
    """Refuse integers where floats should be or the reverse, and parts of another format.

    Args:
        source: where the tensor is saved.
        name: of the tensor.
        saved: what it is there.
        wanted: what it stands for; floats may be of another precision.

    Raises:
        PlugError: the two do not go together.
    """
    is_exact = is_quantized(name, wanted)
    if saved.is_floating_point != wanted.is_floating_point or (is_exact and saved != wanted):
        raise PlugError(
            f"{source} 的 {name} 是 {saved}，应为 {wanted}。"
            "请检查 config.json 的 quantization 与权重是否配套。"
        )


def read_scheme(config_file: Path) -> Scheme | None:
    """Return the scheme that a `config.json` names; None where weights are plain.

    Raises:
        UsageError: as `scheme_of_entry`.
    """
    return scheme_of_entry(read_config_file(config_file).get("quantization"), config_file)


def scheme_of_entry(entry: Any, source: object) -> Scheme | None:
    """Return the scheme that an entry "quantization" names; ``source`` is where it stands.

    Raises:
        UsageError: it names a format that is not exactly one of ours.
    """
    if entry is None:
        return None
    if not isinstance(entry, dict) or entry.get("bits") not in (8, 4):
        raise UsageError(f"{source} 里的 quantization={shown(entry)} 不认识。请升级 plug-zh。")
    scheme = Scheme.of(int(entry["bits"]))
    known = scheme.to_dict()
    if repr(entry.get("version", VERSION)) != repr(VERSION):
        raise UsageError(
            f"{source} 里量化格式的 version={shown(entry['version'])}，只认识 {VERSION}。"
            "请升级 plug-zh，或用 plug quantize 重新量化。"
        )
    if entry.get("packing") != known.get("packing"):
        raise UsageError(
            f"{source} 的 {scheme.bits} 位权重按另一种次序排列"
            f"（packing={shown(entry.get('packing'))}，应为 {known.get('packing')!r}），"
            "读出来会是错的。请用 plug quantize 重新量化。"
        )
    # By their text, since 8.0 and True equal numbers that they are not.
    values = {name: repr(value) for name, value in ({"version": VERSION} | entry).items()}
    if values != {name: repr(value) for name, value in known.items()}:
        raise UsageError(
            f"不支持的量化：{source} 里的 quantization={shown(entry)}，应为 {known}。"
            "请用 plug quantize 重新量化。"
        )
    return scheme

"""`PackedLinear`: a linear layer on a CUDA device, computed by the fastest kernel for its rows.

With few rows the time is that of reading the weight: `skinny_gemm.cu`. With many rows it is that of
the arithmetic: cuBLAS in half precision, or FP8 where the weight is quantised and the card has it.
`docs/performance.md` has the measurements.
"""

from __future__ import annotations

from functools import cache
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plug.kernels.launch import compile_kernel, launch
from plug.kernels.rows import FP8, FP8_MAX, Fp8Rows, gelu_, quantize_rows
from plug.kernels.tiles import tile_4bit, unpack_4bit
from plug.quantization.linear import QuantizedLinear

# cuBLAS is as fast from here on, with half precision.
_FEW_ROWS_OF_HALF = 8
# Rows of one launch, and those up to which several launches are better than an unpacked weight.
ROWS_AT_ONCE = 32
_FEW_ROWS_OF_INTEGERS = 64
# The shape of a block of `skinny_gemm.cu`, by bits and by whether there are more than 8 rows.
_SHAPES = {
    (16, False): {"PIECES": 1, "ACROSS": 1, "ALONG": 16, "UNROLL": 2, "BLOCKS": 2},
    (8, False): {"PIECES": 1, "ACROSS": 1, "ALONG": 8, "UNROLL": 2, "BLOCKS": 4},
    (4, False): {"PIECES": 1, "ACROSS": 1, "ALONG": 8, "UNROLL": 1, "BLOCKS": 4},
    (8, True): {"PIECES": 2, "ACROSS": 1, "ALONG": 8, "UNROLL": 1, "BLOCKS": 1},
    (4, True): {"PIECES": 2, "ACROSS": 2, "ALONG": 4, "UNROLL": 1, "BLOCKS": 1},
}
# Bytes of its weights that a block fetches into the second cache before its inputs are there, and
# as many where attention comes before it, which leaves the memory idle for longer.
_PREFETCH = {16: (2**15, 2**16), 8: (2**15, 2**15), 4: (2**13, 2**15)}


class Added(Protocol):
    """What is added to a product, for each row something else; `plug.generation.adapter_stack`."""

    @property
    def is_used(self) -> bool:
        """Whether anything is added in this pass, to this product or to others."""
        ...

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """Return ``y`` (rows, out), the product with ``x`` (rows, in), with all added."""
        ...


class PackedLinear:
    """Computes x W^T + b for one linear layer, or for several with the same input, stacked.

    Stacking moves the layers' tensors into one, of which they keep views: no weight is held twice.

    Args:
        layers: all `nn.Linear` in half precision, or all `QuantizedLinear`.
        for_sources: it will multiply many rows. 8-bit weights become FP8 for good, where the card
            has that.
        follows_attention: in a decoding step, attention comes right before it.
        added: what is added to each product.
    """

    def __init__(
        self,
        *layers: nn.Linear | QuantizedLinear,
        for_sources: bool = False,
        follows_attention: bool = False,
        added: Added | None = None,
    ) -> None:
        self._added = added
        self._bits = 16
        if isinstance(layers[0], QuantizedLinear):
            self._bits = layers[0].scheme.bits
        self._has_fp8 = has_fp8(cast(Tensor, layers[0].bias).device)
        if for_sources and self._bits == 8 and self._has_fp8:
            for layer in layers:
                layer.weight = layer.weight.to(FP8)
        tensors = _stacked(layers)
        self._weight, self._bias = tensors["weight"], tensors["bias"]
        self._scale = tensors.get("scale", self._bias)
        self._row_scale: Tensor | None = None  # of FP8 made of 4 bits
        self._kept_fp8: Tensor | None = None  # beside the integers
        if self._bits == 4:
            scale, center = tensors["scale"], tensors["center"]
            if self._in_fp8:
                largest = center.float().abs() + 8 * scale.float().abs()
                self._row_scale = largest.amax(1).clamp_min(1e-12) / FP8_MAX
            self._weight, self._scale = tile_4bit(self._weight, scale, center)
            _keep_tiles(cast(tuple[QuantizedLinear, ...], layers), self._weight, self._scale)
        if self._in_fp8:
            row_scale = self._scale if self._row_scale is None else self._row_scale
            self._fp8_scale, self._fp8_bias = row_scale[None, :], self._bias.bfloat16()
        self.out_features = len(self._bias)
        self._in_features = self._weight.shape[1] * (128 if self._bits == 4 else 1)  # of tiles
        self._fits = _fits(self._weight, self._bits, self.out_features)
        self._prefetch = _PREFETCH[self._bits][follows_attention]

    @property
    def fp8_bytes(self) -> int:
        """Bytes that `keep_fp8` takes; 0 where it does nothing."""
        is_needed = self._in_fp8 and self._weight.dtype != FP8 and self._kept_fp8 is None
        return self.out_features * self._in_features if is_needed else 0

    def keep_fp8(self) -> None:
        """Keep the weight in FP8 too. More rows than one launch takes then read that, once.

        Without it they read the integers once for each 32 rows, or make FP8 of them each time.
        """
        if self.fp8_bytes:
            self._kept_fp8 = self._as_fp8()

    def __call__(self, x: Tensor | Fp8Rows, *, wide: bool = False) -> Tensor:
        """Multiply rows (rows, in) to (rows, out), in x's dtype, or in float32 where ``wide``."""
        if isinstance(x, Fp8Rows):
            return self._multiply_fp8(x)
        out = self._skinny(x, wide=wide) if self._takes(x) else self._many_rows(x)
        if self._has_added:
            assert self._added is not None
            out = self._added(x, out)
        return out.float() if wide else out

    @property
    def _has_added(self) -> bool:
        return self._added is not None and self._added.is_used

    def wants_fp8(self, x: Tensor) -> bool:
        """Return whether rows of the shape of ``x`` will be multiplied in FP8."""
        return self._in_fp8 and not self._takes(x) and not self._has_added

    def after(self, first: PackedLinear, x: Tensor | Fp8Rows) -> Tensor:
        """Compute a feed-forward layer: ``first``, the exact GELU, then this."""
        if self._has_added:
            return self(gelu_(first(x)))
        if isinstance(x, Tensor):
            if first._takes(x):
                return self(first._skinny(x, gelu=True))
            inside = first._many_rows(x)
        else:
            inside = first._multiply_fp8(x)
        if self._in_fp8:
            return self._multiply_fp8(quantize_rows(inside, gelu=True))
        return self(gelu_(inside))

    def _takes(self, x: Tensor) -> bool:
        few = _FEW_ROWS_OF_HALF if self._bits == 16 else _FEW_ROWS_OF_INTEGERS
        if self._kept_fp8 is not None:
            few = ROWS_AT_ONCE
        return self._fits and len(x) <= few

    def _skinny(self, x: Tensor, *, gelu: bool = False, wide: bool = False) -> Tensor:
        dtype = torch.float32 if wide else x.dtype
        out = torch.empty(len(x), self.out_features, dtype=dtype, device=x.device)
        for rows, result in zip(x.split(ROWS_AT_ONCE), out.split(ROWS_AT_ONCE), strict=True):
            tiles = 1 if len(rows) <= 8 else 2 if len(rows) <= 16 else 4
            kernel, outputs, threads = _kernel(self._bits, x.dtype, tiles, x.device.index)
            arguments = [
                *(rows, self._weight, self._scale, self._bias, result),
                *(len(rows), self.out_features, x.shape[1], int(gelu), int(wide), self._prefetch),
            ]
            launch(kernel, self.out_features // outputs, threads, arguments)
        return out

    @property
    def _in_fp8(self) -> bool:
        return self._bits < 16 and self._has_fp8

    def _many_rows(self, x: Tensor) -> Tensor:
        if self._bits == 16:
            return F.linear(x, self._weight, self._bias)
        if self._in_fp8:
            return self._multiply_fp8(quantize_rows(x))
        if self._bits == 8:
            weight = self._weight.to(x.dtype) * self._scale[:, None].to(x.dtype)
        else:
            weight = unpack_4bit(self._weight, self._scale, None)
        return F.linear(x, weight.to(x.dtype), self._bias)

    def _multiply_fp8(self, x: Fp8Rows) -> Tensor:
        weight = self._as_fp8() if self._kept_fp8 is None else self._kept_fp8
        result = torch._scaled_mm(
            x.values,
            weight.t(),
            scale_a=x.scale,
            scale_b=self._fp8_scale,
            bias=self._fp8_bias,
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
        )
        return result.to(x.dtype)

    def _as_fp8(self) -> Tensor:
        if self._bits == 4:
            return unpack_4bit(self._weight, self._scale, self._row_scale)
        return self._weight.to(FP8)


def has_fp8(device: torch.device) -> bool:
    """Return whether the card multiplies FP8 rows with a scale each."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def _stacked(layers: tuple[nn.Linear | QuantizedLinear, ...]) -> dict[str, Tensor]:
    """Stack the tensors of all layers, by name; the layers' own become views of them."""
    stacked = {}
    for name in [*dict(layers[0].named_parameters()), *dict(layers[0].named_buffers())]:
        parts: list[Tensor] = [getattr(layer, name).detach() for layer in layers]
        # Views of tiles, where another `PackedLinear` has been made of the layers.
        parts = [part.flatten(0, 1).flatten(1) if part.ndim > 2 else part for part in parts]
        if len(parts) == 1:
            stacked[name] = parts[0]
            continue
        stacked[name] = torch.cat(parts)
        views = stacked[name].split([len(part) for part in parts])
        for layer, view in zip(layers, views, strict=True):
            getattr(layer, name).data = view
    return stacked


def _keep_tiles(layers: tuple[QuantizedLinear, ...], tiles: Tensor, pairs: Tensor) -> None:
    """Make the layers' tensors views of the tiles, (out / 16, 16, …) each."""
    first = 0
    for layer in layers:
        own = slice(first, first + len(layer.get_buffer("bias")) // 16)
        first = own.stop
        layer.weight = tiles[own].transpose(1, 2)
        layer.scale, layer.center = pairs[own].transpose(1, 2).unbind(-1)


def _fits(weight: Tensor, bits: int, out_features: int) -> bool:
    """Return whether `skinny_gemm.cu` takes the weight: its blocks and steps must be whole."""
    whole = out_features % 64 == 0 and (bits == 4 or weight.shape[1] % (512 // bits) == 0)
    return weight.is_cuda and whole and weight.dtype not in (FP8, torch.float32)


@cache
def _kernel(bits: int, dtype: torch.dtype, tiles: int, _device: int) -> tuple[Any, int, int]:
    """Return the kernel for the current device, and the outputs and threads of a block."""
    shape = _SHAPES[bits, tiles > 1]
    settings = shape | {"BITS": bits, "HALF": int(dtype == torch.float16), "TILES": tiles}
    kernel = compile_kernel("skinny_gemm.cu", "skinny_gemm", settings)
    return kernel, 16 * shape["PIECES"] * shape["ACROSS"], 32 * shape["ACROSS"] * shape["ALONG"]

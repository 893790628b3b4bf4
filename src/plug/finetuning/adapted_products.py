"""Linear layers that read the same input, and their adapters: outputs and gradients, by hand.

y = x W^T + b + s dropout(x) A^T B^T, with W frozen: of the gradients those of x, A and B are
computed, and of all this nothing is kept between the passes but x and the thin dropout(x) A^T.

A quantised W is dequantised at each use. On cards that multiply FP8 it becomes FP8, and the rows of
x and of the gradients are rounded to FP8 as well, in units of their largest value. In the backward
pass W is transposed on the way, since FP8 products sum along the rows of both operands, and its
units go into the gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from plug.quantization.linear import QuantizedLinear
from plug.quantization.scheme import GROUP_SIZE

FP8 = torch.float8_e4m3fn
MOST_RANKS = 256  # of adapters that share an input: what the kernels take
_ELEMENTS_AT_ONCE = 2**27  # of a weight in FP8: a copy of the largest weights would be 268 MB


def functions(x: Tensor) -> ModuleType:
    """Return the kernels for the device of ``x``, or the same functions in plain PyTorch."""
    if x.is_cuda:
        from plug.kernels import training

        return training
    from plug.finetuning import plain_training

    return plain_training


class Products:
    """Linear layers with the same input.

    Args:
        layers: of peft, for `nn.Linear` or `QuantizedLinear`, all of one kind.
        in_fp8: multiply quantised weights in FP8.
    """

    def __init__(self, layers: Sequence[Any], *, in_fp8: bool) -> None:
        self.bases = [layer.get_base_layer() for layer in layers]
        self.in_fp8 = in_fp8 and isinstance(self.bases[0], QuantizedLinear)
        (name,) = layers[0].active_adapters
        dropout = layers[0].lora_dropout[name]
        self.rate = dropout.p if isinstance(dropout, nn.Dropout) else 0.0
        self.scale = layers[0].scaling[name]
        self._thin_layers = [
            part[name] for layer in layers for part in (layer.lora_A, layer.lora_B)
        ]
        self._ranks = [layer.r[name] for layer in layers]

    @property
    def parameters(self) -> list[nn.Parameter]:
        """A and B of each layer in turn."""
        return [each.weight for each in self._thin_layers]

    def forward(self, x: Tensor, seed: int) -> tuple[Sequence[Tensor], Tensor]:
        """Compute the outputs of all layers.

        Args:
            x: (rows, in), contiguous.
            seed: of the adapters' dropout; one mask for all layers.

        Returns:
            (rows, out) of each layer, and `thin`.
        """
        run = functions(x)
        thin = self.thin(x, seed)
        outputs = self.base(x)
        for y, part, b in zip(outputs, self._split(thin), self._bs(), strict=True):
            run.expand_(y, part, b, alpha=self.scale)
        return outputs, thin

    def finish(
        self, y: Tensor, thin: Tensor, residual: Tensor, *, rate: float, seed: int
    ) -> Tensor:
        """Add the adapter's part to what `base` of one layer gave, drop, and add ``residual``."""
        options = {"alpha": self.scale, "rate": rate, "seed": seed}
        return functions(y).expand_(y, thin, self.b, residual=residual, **options)

    def base(self, x: Tensor, *, gelu: bool = False) -> Sequence[Tensor]:
        """Compute the outputs without the adapters.

        Args:
            x: (rows, in), contiguous.
            gelu: read the GELU of ``x``; in FP8 alone.
        """
        if self.in_fp8:
            return self._base_fp8(x, gelu=gelu)
        return [torch.addmm(_bias(layer), x, _weight(layer, x.dtype).t()) for layer in self.bases]

    def thin(self, x: Tensor, seed: int) -> Tensor:
        """Compute dropout(x) A^T of all layers, (rows, sum of ranks)."""
        return functions(x).project(x, self.stacked_a(), rate=self.rate, seed=seed)

    def backward(
        self,
        gradients: Sequence[Tensor],
        x: Tensor,
        thin: Tensor,
        seed: int,
        *,
        of_b: list[Tensor] | None = None,
        wants_input: bool = True,
    ) -> tuple[Tensor | None, list[Tensor]]:
        """Compute the gradients of the input and of `parameters`.

        Args:
            gradients: of the outputs, (rows, out) each.
            x: as in `forward`, as ``seed``.
            thin: that `forward` returned.
            seed: as in `forward`.
            of_b: the gradients of each B, where they are known.
            wants_input: whether the input's gradient is needed.

        Returns:
            (rows, in) or None, and a list like `parameters`, in float32.
        """
        run = functions(x)
        u = self.thin_backward(gradients)
        of_b = self.of_b(gradients, thin) if of_b is None else of_b
        of_a = run.outer(u, x, rate=self.rate, seed=seed).split(self._ranks)
        found = [each for pair in zip(of_a, of_b, strict=True) for each in pair]
        if not wants_input:
            return None, found
        of_x = self.base_backward(gradients)
        return run.expand_(of_x, u, self.stacked_a(), rate=self.rate, seed=seed), found

    def thin_backward(self, gradients: Sequence[Tensor]) -> Tensor:
        """Compute the gradient of `thin`."""
        run = functions(gradients[0])
        found = [
            run.project(gradient, b, alpha=self.scale)
            for gradient, b in zip(gradients, self._bs(), strict=True)
        ]
        return found[0] if len(found) == 1 else torch.cat(found, 1)

    def of_b(self, gradients: Sequence[Tensor], thin: Tensor) -> list[Tensor]:
        """Compute the gradients of each B, (out, rank)."""
        run = functions(thin)
        return [
            run.outer(part, gradient, alpha=self.scale, transposed=True)
            for gradient, part in zip(gradients, self._split(thin), strict=True)
        ]

    def base_backward(self, gradients: Sequence[Tensor]) -> Tensor:
        """Compute the gradient of the input by the frozen weights alone."""
        dtype = gradients[0].dtype
        if self.in_fp8:
            return self._base_backward_fp8(gradients)
        first, *others = zip(gradients, self.bases, strict=True)
        found = first[0] @ _weight(first[1], dtype)
        for gradient, layer in others:
            found.addmm_(gradient, _weight(layer, dtype))
        return found

    def stacked_a(self) -> Tensor:
        """Each A, (sum of ranks, in)."""
        matrices = [each.weight.detach() for each in self._thin_layers[0::2]]
        return matrices[0] if len(matrices) == 1 else torch.cat(matrices)

    @property
    def b(self) -> Tensor:
        """The B of a single layer, (rank, out)."""
        (found,) = self._bs()
        return found

    def _bs(self) -> list[Tensor]:
        """Each B, (rank, out)."""
        return [each.weight.detach().t() for each in self._thin_layers[1::2]]

    def _split(self, thin: Tensor) -> Sequence[Tensor]:
        return thin.split(self._ranks, dim=1)

    def _base_fp8(self, x: Tensor, *, gelu: bool) -> Sequence[Tensor]:
        run = functions(x)
        rows = run.quantize(x, gelu=gelu)
        outs = [layer.out_features for layer in self.bases]
        product = torch.empty(len(x), sum(outs), dtype=x.dtype, device=x.device)
        found = product.split(outs, dim=1)
        for layer, whole in zip(self.bases, found, strict=True):
            weight, scale, center = _parts(layer)
            units, inputs = _units(layer), layer.in_features
            piece = torch.empty(_at_once(inputs), inputs, dtype=FP8, device=x.device)
            for first in range(0, layer.out_features, len(piece)):
                own = slice(first, min(first + len(piece), layer.out_features))
                part = piece[: own.stop - first]
                own_center = None if center is None else center[own]
                own_units = None if center is None else units[own]
                run.unpack(weight[own], scale[own], own_center, part, units=own_units)
                run.multiply_fp8(rows, part, units[own], layer.bias[own], whole[:, own])
        return found

    def _base_backward_fp8(self, gradients: Sequence[Tensor]) -> Tensor:
        run, device = functions(gradients[0]), gradients[0].device
        bases = self.bases
        units = [_units(layer) for layer in bases]
        joined = gradients[0] if len(gradients) == 1 else torch.cat(list(gradients), 1)
        rows = run.quantize(joined, units[0] if len(units) == 1 else torch.cat(units))
        del joined
        outs, inputs = [layer.out_features for layer in bases], bases[0].in_features
        found = torch.empty(len(rows[0]), inputs, dtype=gradients[0].dtype, device=device)
        piece = torch.empty(_at_once(sum(outs)), sum(outs), dtype=FP8, device=device)
        for first in range(0, inputs, len(piece)):
            last = min(first + len(piece), inputs)
            part = piece[: last - first]
            for layer, of_units, place in zip(bases, units, part.split(outs, dim=1), strict=True):
                weight, scale, center = _parts(layer)
                if center is None:
                    run.unpack(weight[:, first:last], scale, None, place, transposed=True)
                else:
                    group = slice(first // GROUP_SIZE, last // GROUP_SIZE)
                    packed = weight[:, first // 2 : last // 2]
                    groups = scale[:, group], center[:, group]
                    run.unpack(packed, *groups, place, units=of_units, transposed=True)
            ones = _ones(len(part), device)
            run.multiply_fp8(rows, part, ones, None, found[:, first:last])
        return found


def _bias(layer: Any) -> Tensor:
    return layer.bias.detach()


def _weight(layer: Any, dtype: torch.dtype) -> Tensor:
    """The frozen weight (out, in)."""
    if isinstance(layer, QuantizedLinear):
        return layer.dequantized(dtype)
    return layer.weight.detach()


def _parts(layer: QuantizedLinear) -> tuple[Tensor, Tensor, Tensor | None]:
    """Weight, scale and center, in the order of the format (`PackedLinear` leaves views)."""
    buffers: Any = layer._buffers
    weight, scale, center = buffers["weight"], buffers["scale"], buffers.get("center")
    if center is not None and weight.dim() > 2:
        rows = layer.out_features
        return weight.reshape(rows, -1), scale.reshape(rows, -1), center.reshape(rows, -1)
    return weight, scale, center


def _units(layer: QuantizedLinear) -> Tensor:
    """The units of FP8 in which rows of a weight are multiplied, float32 (out,).

    They are the scales of 8 bits, whose integers become FP8; of 4 bits those in which a row fits.
    """
    _, scale, center = _parts(layer)
    if center is None:
        return scale
    found: Tensor | None = getattr(layer, "_fp8_units", None)
    if found is None or found.device != scale.device:
        largest = (center.float().abs() + 8 * scale.float().abs()).amax(1)
        found = largest.clamp_min(1e-12) / torch.finfo(FP8).max
        layer._fp8_units = found
    return found


def _at_once(size: int) -> int:
    """Rows of a weight of ``size`` columns that are unpacked together, whole groups of them."""
    return max(GROUP_SIZE, _ELEMENTS_AT_ONCE // size // GROUP_SIZE * GROUP_SIZE)


_kept_ones: dict[tuple[int, torch.device], Tensor] = {}


def _ones(size: int, device: torch.device) -> Tensor:
    key = (size, device)
    if key not in _kept_ones:
        _kept_ones[key] = torch.ones(size, device=device)
    return _kept_ones[key]

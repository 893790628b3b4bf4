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
        self.layers = list(layers)
        self.in_fp8 = in_fp8 and isinstance(layers[0].get_base_layer(), QuantizedLinear)
        (self.name,) = layers[0].active_adapters
        dropout = layers[0].lora_dropout[self.name]
        self.rate = dropout.p if isinstance(dropout, nn.Dropout) else 0.0
        self.scale = layers[0].scaling[self.name]

    @property
    def parameters(self) -> list[nn.Parameter]:
        """A and B of each layer in turn."""
        return [
            part[self.name].weight for layer in self.layers for part in (layer.lora_A, layer.lora_B)
        ]

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
            run = functions(x)
            rows = run.quantize(x, gelu=gelu)
            weight, units, bias = self._fp8_weight(run)
            product = run.multiply_fp8(rows, weight, units, bias)
            return product.split([layer.out_features for layer in self.bases], dim=1)
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
        of_a = run.outer(u, x, rate=self.rate, seed=seed).split([len(b) for b in self._bs()])
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
        dtype, device = gradients[0].dtype, gradients[0].device
        if self.in_fp8:
            run = functions(gradients[0])
            joined = gradients[0] if len(gradients) == 1 else torch.cat(list(gradients), 1)
            rows = run.quantize(joined, self._units())
            del joined
            weight = self._fp8_transposed(run)
            return run.multiply_fp8(rows, weight, _ones(len(weight), device), None)
        first, *others = zip(gradients, self.bases, strict=True)
        found = first[0] @ _weight(first[1], dtype)
        for gradient, layer in others:
            found.addmm_(gradient, _weight(layer, dtype))
        return found

    def stacked_a(self) -> Tensor:
        """Each A, (sum of ranks, in)."""
        matrices = [each.detach() for each in self.parameters[0::2]]
        return matrices[0] if len(matrices) == 1 else torch.cat(matrices)

    @property
    def b(self) -> Tensor:
        """The B of a single layer, (rank, out)."""
        (found,) = self._bs()
        return found

    def _bs(self) -> list[Tensor]:
        """Each B, (rank, out)."""
        return [each.detach().t() for each in self.parameters[1::2]]

    @property
    def bases(self) -> list[Any]:
        """The layers without their adapters."""
        return [layer.get_base_layer() for layer in self.layers]

    def _split(self, thin: Tensor) -> Sequence[Tensor]:
        return thin.split([len(b) for b in self._bs()], dim=1)

    def _fp8_weight(self, run: ModuleType) -> tuple[Tensor, Tensor, Tensor]:
        """FP8 (sum of out, in), the units of its rows, and the biases."""
        bases = self.bases
        outs = [layer.out_features for layer in bases]
        shape = (sum(outs), bases[0].in_features)
        stacked = torch.empty(shape, dtype=torch.float8_e4m3fn, device=bases[0].bias.device)
        for layer, place in zip(bases, stacked.split(outs), strict=True):
            run.unpack(*_parts(layer), place, units=_row_units(layer))
        biases = [layer.bias for layer in bases]
        return stacked, self._units(), biases[0] if len(biases) == 1 else torch.cat(biases)

    def _fp8_transposed(self, run: ModuleType) -> Tensor:
        """FP8 (in, sum of out), its columns in `_units`."""
        bases = self.bases
        outs = [layer.out_features for layer in bases]
        shape = (bases[0].in_features, sum(outs))
        beside = torch.empty(shape, dtype=torch.float8_e4m3fn, device=bases[0].bias.device)
        for layer, place in zip(bases, beside.split(outs, dim=1), strict=True):
            run.unpack(*_parts(layer), place, units=_row_units(layer), transposed=True)
        return beside

    def _units(self) -> Tensor:
        units = [_row_units(layer) for layer in self.bases]
        if units[0] is None:
            units = [layer.scale for layer in self.bases]
        found = [each for each in units if each is not None]
        return found[0] if len(found) == 1 else torch.cat(found)


def _bias(layer: Any) -> Tensor:
    return layer.bias.detach()


def _weight(layer: Any, dtype: torch.dtype) -> Tensor:
    """The frozen weight (out, in)."""
    if isinstance(layer, QuantizedLinear):
        return layer.dequantized(dtype)
    return layer.weight.detach()


def _parts(layer: QuantizedLinear) -> tuple[Tensor, Tensor, Tensor | None]:
    """Weight, scale and center, in the order of the format (`PackedLinear` leaves views)."""
    names = ("weight", "scale", "center") if layer.scheme.bits == 4 else ("weight", "scale")
    found = [layer.get_buffer(name) for name in names]
    if layer.scheme.bits == 4:
        found = [each.reshape(layer.out_features, -1) for each in found]
        return found[0], found[1], found[2]
    return found[0], found[1], None


def _row_units(layer: QuantizedLinear) -> Tensor | None:
    """Units of FP8 in which a row of 4-bit weights just fits; None: 8 bits have their own."""
    if layer.scheme.bits == 8:
        return None
    found: Tensor | None = getattr(layer, "_fp8_units", None)
    if found is None or found.device != layer.bias.device:
        _, scale, center = _parts(layer)
        assert center is not None
        largest = (center.float().abs() + 8 * scale.float().abs()).amax(1)
        found = largest.clamp_min(1e-12) / torch.finfo(torch.float8_e4m3fn).max
        layer._fp8_units = found
    return found


_kept_ones: dict[tuple[int, torch.device], Tensor] = {}


def _ones(size: int, device: torch.device) -> Tensor:
    key = (size, device)
    if key not in _kept_ones:
        _kept_ones[key] = torch.ones(size, device=device)
    return _kept_ones[key]

"""`QuantizedLinear`, and putting it into a model in the place of `nn.Linear`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from plug.errors import UsageError
from plug.kernels.cpu.build import library
from plug.kernels.cpu.products import CpuProduct
from plug.quantization.products import Product, product, product_4bit, product_8bit
from plug.quantization.scheme import Scheme

# Embeddings, norms and heads stay as they are.
_PARTS = ("encoder.layers.", "decoder.layers.")


class QuantizedLinear(nn.Module):
    """Stands in for `nn.Linear`. Made empty: `load_state_dict` fills it.

    Weight and bias are buffers and stay as they are; the gradient of the inputs passes through, so
    that adapters can be trained (`plug.hf.adapters`).

    Args:
        in_features: of the layer.
        out_features: of the layer.
        scheme: how the weight is kept.

    Raises:
        UsageError: as `Scheme.tensors`.
    """

    def __init__(self, in_features: int, out_features: int, scheme: Scheme) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.scheme = scheme
        for name, (dtype, shape) in scheme.tensors(out_features, in_features).items():
            self.register_buffer(name, torch.empty(shape, dtype=dtype))
        self.register_buffer("bias", torch.empty(out_features))
        self._product: Product | None = None

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """The weight (out, in)."""
        tensors = dict(self.named_buffers())
        rows = len(tensors.pop("bias"))
        if self.scheme.bits == 4:  # views of tiles, where `plug.kernels` uses the weight
            tensors = {name: each.reshape(rows, -1) for name, each in tensors.items()}
        weight, scale = tensors["weight"], tensors["scale"]
        if weight.is_cuda and not weight.is_floating_point():
            from plug.kernels.training import unpack

            out = torch.empty(rows, self.in_features, dtype=dtype, device=weight.device)
            unpack(weight, scale, tensors.get("center"), out)
            return out
        return self.scheme.dequantize(tensors, dtype)

    def _save_to_state_dict(
        self, destination: dict[str, Tensor], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if destination[f"{prefix}weight"].is_floating_point():
            raise UsageError(
                "这个 8 位模型的权重已在显卡上换成 FP8，不能再保存。请从原来的目录重新载入。"
            )
        if self.scheme.bits == 4:
            for name in ("weight", "scale", "center"):
                tensor = destination[prefix + name]
                destination[prefix + name] = tensor.reshape(len(self._bias), -1)

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return _frozen_product(x, self)
        if x.device.type == "cpu" and x.dtype == torch.float32:
            if self._product is None:
                self._product = self.cpu_product() or product(
                    self.dequantized(x.dtype), self._bias, lossless=False
                )
            return self._product(x)
        return nn.functional.linear(x, self.dequantized(x.dtype), self._bias)

    def cpu_product(self) -> CpuProduct | None:
        """The product by `kernels/cpu`, which reads the weight as it is; None where it cannot."""
        weight = self.get_buffer("weight")
        if weight.device.type != "cpu" or self._bias.dtype != torch.float32 or library() is None:
            return None
        return CpuProduct(weight, self._bias, self.get_buffer("scale"), self._buffers.get("center"))

    def step_product(self) -> Product:
        """The fastest product of the few rows of a decoding step; nearly `forward`."""
        fast: Product | None = self.cpu_product()
        if fast is None and self._bias.dtype == torch.float32:
            weight, scale = self.get_buffer("weight"), self.get_buffer("scale")
            if self.scheme.bits == 8:
                fast = product_8bit(weight, scale, self._bias)
            else:
                fast = product_4bit(weight, scale, self.get_buffer("center"), self._bias)
        return fast or self.forward

    def source_product(self) -> Product:
        """The fastest product of the many rows of one source, for all of them together."""
        fast: Product | None = self.cpu_product()
        if fast is None and self._bias.dtype == torch.float32 and self.scheme.bits == 8:
            weight, scale = self.get_buffer("weight"), self.get_buffer("scale")
            fast = product_8bit(weight, scale, self._bias, row_by_row=False)
        return fast or self.forward

    @property
    def _bias(self) -> Tensor:
        return self.get_buffer("bias")


class _FrozenProduct(torch.autograd.Function):
    """``x @ weight.T + bias``, with the gradient of ``x`` alone.

    The weight is dequantised once forward and once backward. Kept in between, as `F.linear` keeps
    it, the weights of all layers would be in memory at once, in floats.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantizedLinear) -> Tensor:
        ctx.layer = layer
        return nn.functional.linear(x, layer.dequantized(x.dtype), layer._bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None]:
        if not ctx.needs_input_grad[0]:
            return None, None
        return gradient @ ctx.layer.dequantized(gradient.dtype), None


def _frozen_product(x: Tensor, layer: QuantizedLinear) -> Tensor:
    """`_FrozenProduct`, in the dtype of autocast where that is on, as `F.linear` would be."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        x = x.to(torch.get_autocast_dtype(kind))
    return _FrozenProduct.apply(x, layer)


def quantized_names(model: nn.Module) -> list[str]:
    """The linear layers of ``model`` that `plug quantize` quantises, all of encoder and decoder."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.startswith(_PARTS)
    ]


def quantize_modules(model: nn.Module, scheme: Scheme) -> None:
    """Put an empty `QuantizedLinear` in the place of each of `quantized_names`."""
    for name in quantized_names(model):
        parent, _, own = name.rpartition(".")
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        quantized = QuantizedLinear(linear.in_features, linear.out_features, scheme)
        setattr(model.get_submodule(parent), own, quantized)


def scheme_of(model: nn.Module) -> Scheme | None:
    """How the weights of ``model`` are kept; None where they are plain."""
    found = (each.scheme for each in model.modules() if isinstance(each, QuantizedLinear))
    return next(found, None)

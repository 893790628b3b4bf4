"""`CpuModel`: a step of the decoder in one call of `kernels/cpu`, for float32 on a CPU.

A step of a small model is a few milliseconds, of which PyTorch's functions, one by one, would take
more than the arithmetic does. Sources are read by the modules of the encoder, with products of
`kernels/cpu`: they are long enough for that.
"""

from __future__ import annotations

import ctypes
from ctypes import byref
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from plug.distributed.tensor_parallel import is_sharded
from plug.generation.cpu_choice import KERNELS, fastest_step, plain_product, source_product
from plug.generation.kv_cache import DecoderCache
from plug.generation.plain_model import PlainModel, with_products
from plug.kernels.cpu import build
from plug.kernels.cpu.build import Adapters, Layer, LowRank, Norm, Shape, library
from plug.kernels.cpu.products import CpuProduct, in_blocks
from plug.loading import adapters, huge_pages
from plug.loading.adapters import AdaptedLinear
from plug.model.attention import Attention
from plug.model.layers import DecoderLayer, LayerNorm
from plug.model.plug import Decoder, Plug
from plug.quantization.linear import QuantizedLinear, scheme_of
from plug.quantization.products import Product
from plug.quantization.scheme import Scheme

# The products of a layer, in the order in which `step.cpp` has them.
_PRODUCTS = (
    *(f"self_attention.{name}" for name in ("q_proj", "k_proj", "v_proj", "out_proj")),
    "cross_attention.q_proj",
    "cross_attention.out_proj",
    "feed_forward.fc1",
    "feed_forward.fc2",
)


class CpuModel(PlainModel):
    """Encoding and decoding for a `ModelRunner`; in place of `PlainModel` where `can_run`.

    Args:
        model: with a decoder, in float32 (and integers), on a CPU, whole.
    """

    @staticmethod
    def can_run(model: Plug) -> bool:
        """Whether this class serves ``model`` here, and faster than `PlainModel`."""
        words = model.embeddings.word_embeddings.weight
        if words.device.type != "cpu" or words.dtype != torch.float32 or is_sharded(model):
            return False
        if library() is None or any(
            isinstance(each, AdaptedLinear) and each.added is None for each in model.modules()
        ):
            return False
        # PyTorch has no products in which a text of a quantised model does not depend on its batch.
        return scheme_of(model) is not None or fastest_step(CpuModel) == KERNELS

    def _prepare_encoder(self, model: Plug) -> None:
        assert model.decoder is not None, "an encoder alone cannot decode"
        self._products: dict[nn.Module, CpuProduct] = {}
        around = None if self._adapters is None else self._with_adapter
        self._encoder = with_products(
            model.encoder,
            lambda layer: layer if layer.get_buffer("weight").is_meta else self._product_of(layer),
            source_product(self._product_of),
            around,
            "encoder.",
        )
        self._project_encoder = with_products(
            model.decoder, self._product_of, self._product_of, around, "decoder."
        ).project_encoder

    def _with_adapter(self, name: str, product: Product) -> Product:
        """``product`` of a layer that reads sources, with the adapter that is used, in one call."""
        stack = self._adapters
        assert stack is not None
        if not isinstance(product, CpuProduct):
            return stack.around(name, product)
        of_numbers: dict[int, LowRank] = {}
        kept: list[Any] = []
        version = 0

        def adapted(x: Tensor) -> Tensor:
            nonlocal version
            if version != stack.version:
                of_numbers.clear()
                kept.clear()
                for number, adapter in stack.adapters.items():
                    if (found := adapter.layers.get(name)) is not None:
                        of_numbers[number] = self._low_rank(found, kept)
                version = stack.version
            assert isinstance(stack.choice, int), "sources are read one by one"
            return product(x, of_numbers.get(stack.choice))

        return adapted

    def _prepare_decoder(self, model: Plug) -> None:
        assert model.decoder is not None, "an encoder alone cannot decode"
        found = library()
        assert found is not None, "ask `can_run` first"
        self._step = found.plug_step
        config = model.config
        self._sizes = (config.hidden_size, config.num_attention_heads, config.head_dim)
        self._eps = config.layer_norm_eps
        self._kept: list[Any] = []  # what the structures below point to
        self._layers = [self._layer(layer) for layer in model.decoder.layers]
        self._own_parts = self._parts_of_layers(model.decoder)
        self._parts: ctypes.Array[LowRank] | None = None
        self._parts_version = 0
        self._matrices: list[Tensor] = []  # what `_parts` points to
        self._final_norm = self._norm(model.decoder.final_norm)
        self._head_product = self._head(model)
        self._layers_of: WeakKeyDictionary[DecoderCache, ctypes.Array[Layer]] = WeakKeyDictionary()

    def decode(
        self, token_ids: Tensor, positions: Tensor, length: int, cache: DecoderCache
    ) -> Tensor:
        """As `PlainModel.decode`."""
        assert length <= cache.capacity, "the window is longer than the cache"
        if cache not in self._layers_of:
            self._layers_of[cache] = self._layers_with(cache)
        hidden = self._embeddings(token_ids, position_ids=positions).contiguous()
        rows, tokens = token_ids.shape
        which = torch.arange(rows)[:, None].expand(rows, tokens).contiguous()
        where = positions.contiguous()
        logits = torch.empty(rows, tokens, self._head_product.out)
        shape = Shape(
            *self._sizes, cache.capacity, cache.sources[0][0].shape[2], len(self._layers), self._eps
        )
        self._step(
            torch.get_num_threads(),
            byref(shape),
            self._layers_of[cache],
            byref(self._final_norm),
            byref(self._head_product),
            hidden.data_ptr(),
            rows * tokens,
            which.data_ptr(),
            where.data_ptr(),
            cache.source_lengths.data_ptr(),
            self._adapters_of(rows),
            logits.data_ptr(),
        )
        return logits

    def _adapters_of(self, rows: int) -> Any:
        """What the rows of this step use besides the weights; None is nothing."""
        stack = self._adapters
        if self._own_parts is not None:
            assert stack is None, "adapters are stacked beside a model without any"
            self._numbers = torch.zeros(rows, dtype=torch.long)
            return byref(Adapters(self._own_parts, self._numbers.data_ptr(), 1))
        if stack is None:
            return None
        if self._parts_version != stack.version:  # the memory of an adapter that is gone is free
            self._parts, self._matrices = None, []
            self._parts_version = stack.version
        if not stack.is_used:
            return None
        count = stack.count
        if self._parts is None:
            self._parts = (LowRank * (len(self._layers) * len(_PRODUCTS) * count))()
            for index in range(len(self._layers)):
                for product, name in enumerate(_PRODUCTS):
                    for number, adapter in stack.adapters.items():
                        found = adapter.layers.get(f"decoder.layers.{index}.{name}")
                        if found is not None:
                            place = (index * len(_PRODUCTS) + product) * count + number
                            self._parts[place] = self._low_rank(found, self._matrices)
        choice = stack.choice
        numbers = torch.full((rows,), choice) if isinstance(choice, int) else choice.contiguous()
        self._numbers = numbers  # kept while the step runs
        return byref(Adapters(self._parts, numbers.data_ptr(), count))

    def _parts_of_layers(self, decoder: Decoder) -> ctypes.Array[LowRank] | None:
        """The adapter that `plug.load` put beside the weights; None where there is none."""
        layers = [
            cast(DecoderLayer, layer).get_submodule(name)
            for layer in decoder.layers
            for name in _PRODUCTS
        ]
        if not any(isinstance(each, AdaptedLinear) for each in layers):
            return None
        parts = (LowRank * len(layers))()
        for place, layer in enumerate(layers):
            if isinstance(layer, AdaptedLinear) and layer.added is not None:
                parts[place] = self._low_rank(layer.added, self._kept)
        return parts

    def _low_rank(self, found: adapters.LowRank, kept: list[Any]) -> LowRank:
        """``found`` as `adapters.h` has it; ``kept`` gets the tensors that it points to."""
        a, b = found.a.contiguous(), in_blocks(found.b)
        kept += [a, b]
        return LowRank(a.data_ptr(), b.data_ptr(), len(a))

    def _layers_with(self, cache: DecoderCache) -> ctypes.Array[Layer]:
        """The layers, with the addresses of the cache's buffers."""
        found = (Layer * len(self._layers))(*self._layers)
        for layer, own, source in zip(found, cache.own, cache.sources, strict=True):
            layer.keys, layer.values = (buffer.data_ptr() for buffer in own)
            layer.source_keys, layer.source_values = (buffer.data_ptr() for buffer in source)
        return found

    def _layer(self, module: nn.Module) -> Layer:
        assert isinstance(module, DecoderLayer)
        own, cross = module.self_attention, module.cross_attention
        assert isinstance(own, Attention)
        return Layer(
            self._norm(module.self_attention_norm),
            self._norm(module.cross_attention_norm),
            self._norm(module.feed_forward_norm),
            tuple(map(self._product, (own.q_proj, own.k_proj, own.v_proj))),
            self._product(own.out_proj),
            self._product(cross.q_proj),
            self._product(cross.out_proj),
            self._product(module.feed_forward.fc1),
            self._product(module.feed_forward.fc2),
        )

    def _norm(self, norm: LayerNorm) -> Norm:
        tensors = [each.detach().float().contiguous() for each in (norm.weight, norm.bias)]
        self._kept.append(tensors)
        return Norm(*(each.data_ptr() for each in tensors))

    def _product(self, linear: nn.Module) -> build.Product:
        return self._product_of(
            linear.base if isinstance(linear, AdaptedLinear) else linear
        ).product

    def _product_of(self, linear: nn.Module) -> CpuProduct:
        """The product of a linear layer; one copy of its weight serves reading and steps."""
        if linear not in self._products:
            if isinstance(linear, QuantizedLinear):
                found = linear.cpu_product()
                assert found is not None, "ask `can_run` first"
            else:
                assert isinstance(linear, nn.Linear)
                found = plain_product(linear.weight, linear.bias)
            self._products[linear] = found
        return self._products[linear]

    def _head(self, model: Plug) -> build.Product:
        """The product with the word table; in a quantised model with its copy in 8 bits."""
        table = model.embeddings.word_embeddings.weight.detach()
        if scheme_of(model) is None:
            found = plain_product(table, None)
        else:
            parts = Scheme.of(8).quantize(table)
            parts["weight"] = huge_pages.copy(parts["weight"])
            found = CpuProduct(bias=None, **parts)
        self._kept.append(found)
        return found.product

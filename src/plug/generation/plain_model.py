"""`PlainModel`: the modules of `plug.model`, with the fastest product for each weight.

For every device and dtype. `fused_model.py` has the same for half precision on CUDA.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import TypeVar, cast

import torch
from torch import Tensor, nn

from plug.distributed.tensor_parallel import gather_logits, vocabulary_shard
from plug.distributed.zero import whole
from plug.generation.adapter_stack import AdapterStack
from plug.generation.kv_cache import DecoderCache
from plug.loading.adapters import AdaptedLinear
from plug.model import accounting
from plug.model.layers import FeedForward, KeyValue, LayerNorm
from plug.model.plug import Plug
from plug.quantization.linear import QuantizedLinear, scheme_of
from plug.quantization.products import Product, product, product_8bit
from plug.quantization.scheme import Scheme

# Sources are encoded together when their lengths round up to the same multiple of this.
ENCODING_GRANULARITY = 64
# A step on a CPU that reads fewer weights than this runs in one thread: dividing the work among
# threads takes longer than the work, and far longer where other programs use the processor.
ONE_THREAD_WEIGHTS = 100_000_000

Module = TypeVar("Module", bound=nn.Module)


class PlainModel:
    """Encoding and decoding for a `ModelRunner`.

    Args:
        model: with a decoder.
        granularity: a step computes over lengths rounded up to a multiple of this, so that few
            graphs are needed.
        adapters: what rows may use besides the weights.
    """

    def __init__(
        self, model: Plug, granularity: int = 1, adapters: AdapterStack | None = None
    ) -> None:
        assert model.decoder is not None, "an encoder alone cannot decode"
        self._embeddings = model.embeddings
        device = model.embeddings.word_embeddings.weight.device
        self._device = device
        self._pad = model.config.pad_token_id
        self._adapters = adapters
        self._around = None if adapters is None else adapters.around
        self._prepare_encoder(model)
        # A CPU is as fast with one source at a time, and its 8-bit products want it so.
        self._reads_together = device.type != "cpu"
        self.granularity = granularity
        self._prepare_decoder(model)

    def _prepare_encoder(self, model: Plug) -> None:
        assert model.decoder is not None, "an encoder alone cannot decode"
        self._encoder = with_products(
            model.encoder,
            QuantizedLinear.source_product,
            lambda linear: linear,
            self._around,
            "encoder.",
        )
        self._project_encoder = with_products(
            model.decoder, lambda linear: linear, lambda linear: linear, self._around, "decoder."
        ).project_encoder

    def _prepare_decoder(self, model: Plug) -> None:
        assert model.decoder is not None, "an encoder alone cannot decode"
        self._decoder = with_products(
            model.decoder,
            QuantizedLinear.step_product,
            lambda linear: product(linear.weight, linear.bias),
            self._around,
            "decoder.",
        )
        self._logits: Product = _head(model)
        step_weights = accounting.step_weights(model.config)
        self._uses_one_thread = self._device.type == "cpu" and step_weights < ONE_THREAD_WEIGHTS

    def expect(self, rows: int) -> None:
        """Make ready for steps of so many rows; `FusedModel` has something to do."""

    def encode(
        self, sources: Sequence[Sequence[int]], numbers: Sequence[int] = ()
    ) -> list[list[KeyValue]]:
        """Return what decoding needs of each source, token ids with [CLS] and [SEP].

        On a GPU, sources of like length are encoded together.

        Args:
            sources: of the texts.
            numbers: of each one's adapter; none where nobody uses any.

        Returns:
            Cross-attention keys and values, a pair a layer, each (heads, attended, head_dim):
            padding ids inside a source are not attended to, as in the reference.
        """
        numbers = numbers or [0] * len(sources)
        found: list[list[KeyValue]] = [[] for _ in sources]

        def kind(index: int) -> tuple[int, ...]:
            if not self._reads_together:
                return (index,)
            return numbers[index], -(-len(sources[index]) // ENCODING_GRANULARITY)

        order = sorted(range(len(sources)), key=lambda index: (kind(index), len(sources[index])))
        for _, group in groupby(order, kind):
            indices = list(group)
            if self._adapters is not None:
                self._adapters.use(numbers[indices[0]])
            together = self._encode_together([sources[index] for index in indices])
            for index, pairs in zip(indices, together, strict=True):
                found[index] = pairs
        return found

    def _encode_together(self, sources: Sequence[Sequence[int]]) -> list[list[KeyValue]]:
        longest = max(map(len, sources))
        padded = [[*source, *[self._pad] * (longest - len(source))] for source in sources]
        input_ids = torch.tensor(padded, device=self._device)
        hides = any(self._pad in source for source in padded)
        mask = input_ids != self._pad if hides else None
        hidden_states = self._encoder(self._embeddings(input_ids), mask)
        key_values = self._project_encoder(hidden_states)
        return [
            [(key[row][:, where], value[row][:, where]) for key, value in key_values]
            for row, where in enumerate(attended(source, self._pad) for source in sources)
        ]

    def decode(
        self, token_ids: Tensor, positions: Tensor, length: int, cache: DecoderCache
    ) -> Tensor:
        """Feed tokens to the first rows; float32 logits after each, (rows, tokens, vocab).

        Args:
            token_ids: (rows, tokens) on the device.
            positions: (rows, tokens), where each stands in its window, from 0. A token attends to
                those of its row at no later positions, also to what an earlier step left there. A
                row with fewer tokens than others repeats its last one, at the same position.
            length: known to the host: not less than the largest position, plus 1.
            cache: the past of each row; the new tokens join it.
        """
        threads = torch.get_num_threads() if self._uses_one_thread else 1
        if threads > 1:
            torch.set_num_threads(1)
        try:
            mask = cache.place(positions, length, self.granularity)
            key_values, encoder_mask = cache.encoder_view(len(token_ids), self.granularity)
            embedded = self._embeddings(token_ids, position_ids=positions)
            hidden_states = self._decoder(embedded, key_values, encoder_mask, mask, cache)
            return self._logits(hidden_states).float()
        finally:
            if threads > 1:
                torch.set_num_threads(threads)


class ShardedModel(PlainModel):
    """The modules as they are, of a model that is sharded: calling a layer gathers its weights.

    All processes take the same steps together, inside of `with_own_parameters`.
    """

    def _prepare_encoder(self, model: Plug) -> None:
        assert model.decoder is not None, "an encoder alone cannot decode"
        self._encoder = model.encoder
        self._project_encoder = model.decoder.project_encoder

    def _prepare_decoder(self, model: Plug) -> None:
        assert model.decoder is not None, "an encoder alone cannot decode"
        self._decoder = model.decoder
        self._uses_one_thread = False
        table = model.embeddings.word_embeddings

        def logits(hidden_states: Tensor) -> Tensor:
            with whole(table.parameters()):
                return model.lm_logits(hidden_states)

        self._logits = logits


def attended(source: Sequence[int], pad_token_id: int) -> slice | list[int]:
    """Return the positions of a source that are attended to: all but padding."""
    if pad_token_id not in source:
        return slice(0, len(source))
    return [position for position, token_id in enumerate(source) if token_id != pad_token_id]


def _head(model: Plug) -> Product:
    """The product with the word table; in a quantised model on a CPU with its copy in 8 bits."""
    return gather_logits(model, _own_head(model))


def _own_head(model: Plug) -> Product:
    table = vocabulary_shard(model, model.embeddings.word_embeddings.weight.detach())
    scheme = scheme_of(model)
    if scheme is not None and table.dtype == torch.float32:
        in_8_bits = Scheme.of(8).quantize(table)
        no_bias = table.new_zeros(len(table))
        fast = product_8bit(in_8_bits["weight"], in_8_bits["scale"], no_bias)
        if fast is not None:
            return fast
    return product(table, None)


def with_products(
    module: Module,
    for_quantized: Callable[[QuantizedLinear], Product],
    for_plain: Callable[[nn.Linear], Product],
    around: Callable[[str, Product], Product] | None,
    name: str,
) -> Module:
    """The same modules and weights, for inference alone, with other linear layers.

    Modules that are only called become plain functions: calling those costs half as much, which is
    7% of a step at batch 1 on a CPU.

    Args:
        module: not changed.
        for_quantized: the product of a layer in integers.
        for_plain: that of another one.
        around: makes of a layer's name and its product the product with what adapters add.
        name: of ``module`` in the whole model, with a dot at its end.
    """

    def faster(layer: nn.Module, name: str) -> Product:
        if isinstance(layer, QuantizedLinear):
            found = for_quantized(layer)
        else:
            found = for_plain(cast(nn.Linear, layer))
        return found if around is None else around(name, found)

    def replaced(original: nn.Module, path: str) -> nn.Module:
        copy = original.__new__(type(original))
        copy.__dict__.update(original.__dict__)
        copy._modules = {
            name: child if child is None else replaced(child, f"{path}{name}.")
            for name, child in original._modules.items()
        }
        for name, child in original.named_children():
            if isinstance(child, AdaptedLinear):
                copy.__dict__[name] = child.with_product(faster(child.base, path + name))
            elif isinstance(child, (QuantizedLinear, nn.Linear)):
                copy.__dict__[name] = faster(child, path + name)
            elif isinstance(child, nn.Dropout):
                copy.__dict__[name] = _identity
            elif isinstance(child, (LayerNorm, FeedForward)):
                copy.__dict__[name] = copy._modules[name].forward  # type: ignore[union-attr]
        return copy

    return cast(Module, replaced(module, name))


def _identity(x: Tensor) -> Tensor:
    return x

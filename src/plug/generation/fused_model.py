"""`FusedModel`: encoding and decoding by the kernels of `plug.kernels`, in half precision on CUDA.

The mathematics is that of `plug.model.layers`, with fewer passes over memory. At batch 1 a decoding
step takes as long as reading the weights, so each kernel between two products counts. One product
computes queries, keys and values. One kernel computes a residual sum and the norm after it.
Attention reads each row's own length. Sources of any lengths are encoded as one run of tokens,
without padding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plug.device import send
from plug.distributed.tensor_parallel import (
    RowParallelLinear,
    all_gather,
    all_reduce,
    gather_logits,
    is_sharded,
    vocabulary_shard,
)
from plug.generation.adapter_stack import AdapterStack
from plug.generation.kv_cache import DecoderCache
from plug.generation.plain_model import attended
from plug.kernels.attention import append_and_attend, attend
from plug.kernels.one_shot import OneShot
from plug.kernels.packed_linear import ROWS_AT_ONCE, Added, PackedLinear
from plug.kernels.rows import Fp8Rows, add_norm, add_norm_fp8, embed
from plug.loading.estimate import TOKENS_AT_ONCE
from plug.loading.offload import StreamedLayers
from plug.model.attention import Attention
from plug.model.layers import DecoderLayer, EncoderLayer, KeyValue
from plug.model.plug import Plug
from plug.quantization.linear import QuantizedLinear, scheme_of
from plug.quantization.scheme import Scheme

_KEPT_FREE = 0.15  # of a device's memory, for what encoding and sampling need


class FusedModel:
    """Encoding and decoding for a `ModelRunner`; in place of `PlainModel`.

    Args:
        model: with a decoder, in float16 or bfloat16 (and integers), on CUDA. Its weights are
            stacked and, with 8 bits, the encoder's become FP8.
        adapters: what rows may use besides the weights; not with layers that are kept elsewhere,
            nor with a shard of a model.
    """

    def __init__(self, model: Plug, adapters: AdapterStack | None = None) -> None:
        assert model.decoder is not None, "an encoder alone cannot decode"
        self._adapters = adapters
        config = model.config
        self._device = model.embeddings.word_embeddings.weight.device
        self._pad = config.pad_token_id
        self._head_dim = config.head_dim
        keys = cast(DecoderLayer, model.decoder.layers[0]).self_attention.k_proj.bias
        self._heads = len(keys) // self._head_dim  # of this process
        self._embeddings = model.embeddings
        one_shot = OneShot.make(self._device) if is_sharded(model) else None
        layers = model.encoder.layers
        self._encoder_layers: Iterable[_EncoderLayer] = (
            layers.each(_EncoderLayer)
            if isinstance(layers, StreamedLayers)
            else [
                _EncoderLayer(layer, _names(adapters, f"encoder.layers.{index}."))
                for index, layer in enumerate(layers)
            ]
        )
        self._encoder_norms = [model.encoder.final_norm] * model.encoder.final_norm_passes
        self._decoder_layers = [
            _DecoderLayer(
                cast(DecoderLayer, layer), one_shot, _names(adapters, f"decoder.layers.{index}.")
            )
            for index, layer in enumerate(model.decoder.layers)
        ]
        self._decoder_norm = model.decoder.final_norm
        self._head = _head(model)
        self._logits = gather_logits(model, self._head, _gather(one_shot))
        self.granularity = None

    def expect(self, rows: int) -> None:
        """Make ready for steps of so many rows, where the device has memory left.

        Called when the caches are there. Steps of more than 32 rows read a copy of the decoder's
        integers in FP8, so that the weights are read once; 15% of the device stay free.
        """
        products = [each for layer in self._decoder_layers for each in layer.products]
        needed = sum(each.fp8_bytes for each in products)
        if rows <= ROWS_AT_ONCE or not needed:
            return
        unused, total = torch.cuda.mem_get_info(self._device)
        unused += torch.cuda.memory_reserved(self._device)
        unused -= torch.cuda.memory_allocated(self._device)
        if unused - needed >= total * _KEPT_FREE:
            for each in products:
                each.keep_fp8()

    # --- sources ----------------------------------------------------------------------------------

    def encode(
        self, sources: Sequence[Sequence[int]], numbers: Sequence[int] = ()
    ) -> list[list[KeyValue]]:
        """As `PlainModel.encode`."""
        found: list[list[KeyValue]] = []
        group: list[Sequence[int]] = []
        for source in [*sources, None]:
            if group and (source is None or sum(map(len, group)) + len(source) > TOKENS_AT_ONCE):
                self._use_adapters(numbers[len(found) : len(found) + len(group)], group)
                found += self._encode_together(group)
                group = []
            if source is not None:
                group.append(source)
        return found

    def _use_adapters(self, numbers: Sequence[int], sources: Sequence[Sequence[int]]) -> None:
        """Have each token of ``sources`` use the adapter of its source."""
        if self._adapters is None:
            return
        if len(set(numbers)) < 2:
            self._adapters.use(numbers[0] if numbers else 0)
        else:
            each = [number for number, source in zip(numbers, sources, strict=True) for _ in source]
            self._adapters.use(send(each, self._device, torch.long))

    def read(self, sources: Sequence[Sequence[int]]) -> Tensor:
        """The encoder's output for one source after the other, (tokens, hidden)."""
        lengths = map(len, sources)
        token_ids = send([i for source in sources for i in source], self._device, torch.long)
        positions = send(torch.cat([torch.arange(n) for n in lengths]), self._device, torch.long)
        hidden = embed(token_ids, positions, self._embeddings)
        delta = None
        for layer in self._encoder_layers:
            in_fp8 = layer.query_key_value.wants_fp8(hidden)
            normalize = add_norm_fp8 if in_fp8 else add_norm
            hidden, normalized = normalize(hidden, delta, layer.attention_norm)
            context = self._attend_sources(layer.query_key_value(normalized), sources)
            hidden, normalized = normalize(hidden, layer.out(context), layer.feed_forward_norm)
            delta = layer.fc2.after(layer.fc1, normalized)
        for norm in self._encoder_norms:
            _, hidden = add_norm(hidden, delta, norm)
            delta = None
        return hidden

    def _encode_together(self, sources: list[Sequence[int]]) -> list[list[KeyValue]]:
        hidden = self.read(sources)
        lengths = [len(source) for source in sources]
        found: list[list[KeyValue]] = [[] for _ in sources]
        kept = [attended(source, self._pad) for source in sources]
        for decoder_layer in self._decoder_layers:
            projected = decoder_layer.source_key_value(hidden)
            shaped = projected.view(-1, 2, self._heads, self._head_dim).permute(1, 2, 0, 3)
            keys, values = (part.split(lengths, 1) for part in shaped.unbind(0))
            for pairs, key, value, where in zip(found, keys, values, kept, strict=True):
                is_whole = isinstance(where, slice)
                pairs.append((key, value) if is_whole else (key[:, where], value[:, where]))
        return found

    def _attend_sources(self, query_key_value: Tensor, sources: Sequence[Sequence[int]]) -> Tensor:
        """Each source attends to itself: (tokens, 3 * hidden) to (tokens, hidden)."""
        shaped = query_key_value.view(-1, 3, self._heads, self._head_dim)
        contexts, first = [], 0
        # Neighbours of one length and without padding ids share a call.
        for (length, hides), run in groupby(sources, lambda s: (len(s), self._pad in s)):
            same = list(run)
            tokens = shaped[first : first + length * len(same)]
            first += length * len(same)
            query, key, value = tokens.view(-1, length, *shaped.shape[1:]).permute(2, 0, 3, 1, 4)
            mask = None
            if hides:
                ids = send(same, self._device, torch.long)
                mask = (ids != self._pad)[:, None, None, :]
            context = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
            contexts.append(context.transpose(1, 2).reshape(-1, self._heads * self._head_dim))
        return _joined(contexts)

    # --- a step -----------------------------------------------------------------------------------

    def decode(
        self,
        token_ids: Tensor,
        positions: Tensor,
        length: int,  # noqa: ARG002  # each row's own counts
        cache: DecoderCache,
    ) -> Tensor:
        """As `PlainModel.decode`.

        All tokens share each product. Attention takes the rows' first tokens, then their second
        ones, …: each joins the caches before the next attends.
        """
        rows = len(token_ids)
        columns = positions.t().contiguous()
        if self._adapters is not None:
            self._adapters.repeat(len(columns))
        # No kernel of this step has made the positions, or will put a token where others look.
        early = len(columns) == 1 and columns.data_ptr() == positions.data_ptr()
        hidden = embed(token_ids.t().contiguous().view(-1), columns.view(-1), self._embeddings)
        delta = None
        for index, layer in enumerate(self._decoder_layers):
            in_fp8 = layer.query_key_value.wants_fp8(hidden)
            normalize = add_norm_fp8 if in_fp8 else add_norm
            hidden, normalized = normalize(hidden, delta, layer.self_attention_norm)
            query_key_value = layer.query_key_value(normalized)
            keys, values = cache.own[index]
            context = _joined(
                append_and_attend(new, keys, values, where, early=early)
                for new, where in zip(query_key_value.split(rows), columns, strict=True)
            )
            hidden, normalized = normalize(hidden, layer.out(context), layer.cross_attention_norm)
            query = layer.source_query(normalized)
            keys, values = cache.sources[index]
            context = _joined(
                attend(part, keys, values, cache.source_lengths) for part in query.split(rows)
            )
            hidden, normalized = normalize(
                hidden, layer.source_out(context), layer.feed_forward_norm
            )
            delta = layer.fc2.after(layer.fc1, normalized)
        _, hidden = add_norm(hidden, delta, self._decoder_norm)
        logits = self._logits(hidden, wide=True)
        return logits.view(-1, rows, logits.shape[1]).transpose(0, 1)


def _gather(one_shot: OneShot | None) -> Callable[[Tensor], Tensor]:
    def gather(x: Tensor) -> Tensor:
        if one_shot is not None and one_shot.takes(x):
            return one_shot.all_gather(x)
        return all_gather(x)

    return gather


def _joined(parts: Iterable[Tensor]) -> Tensor:
    contexts = list(parts)
    return contexts[0] if len(contexts) == 1 else torch.cat(contexts)


At = Callable[..., Added | None]  # names of linear layers -> what is added to their product


def _names(adapters: AdapterStack | None, prefix: str) -> At:
    if adapters is None:
        return lambda *_: None
    return lambda *names: adapters.at(*(prefix + name for name in names))


class _EncoderLayer:
    def __init__(self, module: nn.Module, at: At = lambda *_: None) -> None:
        layer = cast(EncoderLayer, module)
        attention, feed_forward = layer.attention, layer.feed_forward
        self.attention_norm = layer.attention_norm
        self.query_key_value = _query_key_value(attention, "attention", at, for_sources=True)
        self.out = _row_parallel(
            attention.out_proj, None, at("attention.out_proj"), for_sources=True
        )
        self.feed_forward_norm = layer.feed_forward_norm
        self.fc1 = PackedLinear(feed_forward.fc1, for_sources=True, added=at("feed_forward.fc1"))
        self.fc2 = _row_parallel(feed_forward.fc2, None, at("feed_forward.fc2"), for_sources=True)


class _DecoderLayer:
    def __init__(self, layer: DecoderLayer, one_shot: OneShot | None, at: At) -> None:
        own, cross, feed_forward = layer.self_attention, layer.cross_attention, layer.feed_forward
        self.self_attention_norm = layer.self_attention_norm
        self.query_key_value = _query_key_value(own, "self_attention", at)
        self.out = _row_parallel(
            own.out_proj, one_shot, at("self_attention.out_proj"), follows_attention=True
        )
        self.cross_attention_norm = layer.cross_attention_norm
        self.source_query = PackedLinear(cross.q_proj, added=at("cross_attention.q_proj"))
        self.source_key_value = PackedLinear(
            cross.k_proj,
            cross.v_proj,
            for_sources=True,
            added=at("cross_attention.k_proj", "cross_attention.v_proj"),
        )
        self.source_out = _row_parallel(
            cross.out_proj, one_shot, at("cross_attention.out_proj"), follows_attention=True
        )
        self.feed_forward_norm = layer.feed_forward_norm
        self.fc1 = PackedLinear(feed_forward.fc1, added=at("feed_forward.fc1"))
        self.fc2 = _row_parallel(feed_forward.fc2, one_shot, at("feed_forward.fc2"))
        # Of a step; what projects the sources is none of them.
        self.products = (
            *(self.query_key_value, self.out, self.source_query),
            *(self.source_out, self.fc1, self.fc2),
        )


def _query_key_value(
    attention: Attention, name: str, at: At, *, for_sources: bool = False
) -> PackedLinear:
    layers = attention.q_proj, attention.k_proj, attention.v_proj
    added = at(*(f"{name}.{each}_proj" for each in "qkv"))
    return PackedLinear(*layers, for_sources=for_sources, added=added)


class _RowParallelLinear(PackedLinear):
    """The shard of a row-parallel layer; an all-reduce adds up the processes' results."""

    one_shot: OneShot | None = None  # what reduces few rows; None is NCCL

    def _skinny(self, x: Tensor, *, gelu: bool = False, wide: bool = False) -> Tensor:
        return self._all_reduce(super()._skinny(x, gelu=gelu, wide=wide))

    def _many_rows(self, x: Tensor) -> Tensor:
        result = super()._many_rows(x)
        return result if self._in_fp8 else self._all_reduce(result)

    def _multiply_fp8(self, x: Fp8Rows) -> Tensor:
        return self._all_reduce(super()._multiply_fp8(x))

    def _all_reduce(self, x: Tensor) -> Tensor:
        if self.one_shot is not None and self.one_shot.takes(x):
            return self.one_shot.all_reduce(x)
        return all_reduce(x)


def _row_parallel(
    layer: nn.Module,
    one_shot: OneShot | None,
    added: Added | None,
    *,
    for_sources: bool = False,
    follows_attention: bool = False,
) -> PackedLinear:
    if not isinstance(layer, RowParallelLinear):
        return PackedLinear(
            cast(nn.Linear, layer),
            for_sources=for_sources,
            follows_attention=follows_attention,
            added=added,
        )
    made = _RowParallelLinear(
        cast(nn.Linear, layer.shard), for_sources=for_sources, follows_attention=follows_attention
    )
    made.one_shot = one_shot
    return made


def _head(model: Plug) -> PackedLinear:
    """Return the product with the word table; in a quantised model, with its copy in 8 bits."""
    table = vocabulary_shard(model, model.embeddings.word_embeddings.weight.detach())
    out_features, in_features = table.shape
    no_bias = table.new_zeros(out_features)
    layer: nn.Linear | QuantizedLinear
    if scheme_of(model) is None:
        layer = nn.Linear(in_features, out_features, device="meta")
        layer.weight = nn.Parameter(table, requires_grad=False)
        layer.bias = nn.Parameter(no_bias, requires_grad=False)
    else:
        layer = QuantizedLinear(in_features, out_features, Scheme.of(8))
        tensors = Scheme.of(8).quantize(table) | {"bias": no_bias}
        layer.load_state_dict(tensors, assign=True)
    return PackedLinear(layer)

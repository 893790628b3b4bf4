"""`Engine`: encode, prepare the caches, then token by token. The one seam of decoding.

The loops (`writer.py`, `beam.py`) know the methods of `Engine` and nothing of the model, so a
scripted engine in a test can take its place. Everything a step reads and writes is a fixed buffer;
on CUDA `replay` captures a step once and replays it as a graph.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from itertools import groupby
from typing import TypeVar, cast

import torch
from torch import Tensor, nn

from plug.errors import UsageError
from plug.generation.cache import DecoderCache
from plug.model import accounting
from plug.model.layers import FeedForward, LayerNorm
from plug.model.plug import Plug
from plug.quantization.linear import QuantizedLinear, scheme_of
from plug.quantization.products import Product, product, product_8bit
from plug.quantization.scheme import Scheme

# Sources are encoded together when their lengths round up to the same multiple of this.
ENCODING_GRANULARITY = 64
# A step on a CPU that reads fewer weights than this runs in one thread: handing out work takes
# longer than the work, and far longer where other programs want the processor too.
ONE_THREAD_WEIGHTS = 100_000_000
# Lengths of the caches that a CUDA graph is made for are multiples of this.
GRAPH_GRANULARITY = 64


Part = TypeVar("Part", bound=nn.Module)


class Engine:
    """Decoding with a `Plug`; rows are numbered from 0, and a step decodes the first ones.

    The model's weights are read when the engine is made: later changes need another engine.

    Args:
        model: what decodes.
        graphs: on CUDA, make a graph of each step that comes again; not worth it for many texts
            of different length at once, where rows leave at nearly every step.

    Raises:
        UsageError: the model is an encoder alone.
    """

    def __init__(self, model: Plug, *, graphs: bool = True) -> None:
        if model.decoder is None:
            raise UsageError(
                "这个模型只有编码器（num_decoder_layers=0，预训练第一阶段的产物），不能写作。"
                "请用第二阶段（plug pretrain stage2）得到的模型。"
            )
        self.config = model.config
        self.device = model.embeddings.word_embeddings.weight.device
        self._model = model
        self._project_encoder = model.decoder.project_encoder
        self._encoder = _with_products(
            model.encoder, QuantizedLinear.source_product, lambda linear: linear
        )
        self._decoder = _with_products(
            model.decoder,
            QuantizedLinear.step_product,
            lambda linear: product(linear.weight, linear.bias),
        )
        self._head = _head(model)
        self._uses_graphs = graphs and self.device.type == "cuda"
        step_weights = accounting.step_weights(model.config)
        self._uses_one_thread = self.device.type == "cpu" and step_weights < ONE_THREAD_WEIGHTS
        # A CPU is as fast with one source at a time, and its 8-bit products want it so.
        self._reads_together = self.device.type != "cpu"
        self._granularity = GRAPH_GRANULARITY if self._uses_graphs else 1
        self._graphs: dict[Hashable, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._room = (0, 0, 0)
        self._cache: DecoderCache | None = None
        self._length = 0

    # --- the rows, one by one ---------------------------------------------------------------------

    def open(self, rows: int, source_length: int, capacity: int) -> None:
        """Make room; what was kept is dropped, and the graphs with it.

        Args:
            rows: texts at most.
            source_length: tokens of a source at most.
            capacity: tokens that will be fed at most to a row, [CLS] included.
        """
        self._graphs.clear()
        room = (rows, source_length, capacity)
        if self._cache is None or any(new > old for new, old in zip(room, self._room, strict=True)):
            self._room = room
            self._cache = None

    def read(self, rows: Sequence[int], sources: Sequence[Sequence[int]]) -> None:
        """Encode sources, token ids with [CLS] and [SEP], for these rows, which begin anew.

        Padding ids inside a source are not attended to, as in the reference. On a GPU, sources of
        like length are encoded together.
        """
        if not self._reads_together:
            for pair in zip(rows, sources, strict=True):
                self._read_together([pair])
            return
        order = sorted(zip(rows, sources, strict=True), key=lambda pair: len(pair[1]))
        for _, group in groupby(order, lambda pair: -(-len(pair[1]) // ENCODING_GRANULARITY)):
            self._read_together(list(group))

    def _read_together(self, pairs: list[tuple[int, Sequence[int]]]) -> None:
        pad = self.config.pad_token_id
        longest = len(pairs[-1][1])
        padded = [[*source, *[pad] * (longest - len(source))] for _, source in pairs]
        input_ids = torch.tensor(padded, device=self.device)
        mask = input_ids != pad
        hides = any(pad in source for source in padded)
        embedded = self._model.embeddings(input_ids)
        hidden_states = self._encoder(embedded, mask if hides else None)
        key_values = self._project_encoder(hidden_states)
        if self._cache is None:
            rows, source_length, capacity = self._room
            self._cache = DecoderCache(
                key_values[0][0],
                layers=len(key_values),
                rows=rows,
                source_length=source_length,
                capacity=capacity,
            )
        for index, (row, source) in enumerate(pairs):
            length = len(source)
            own = [(k[index, :, :length], v[index, :, :length]) for k, v in key_values]
            self._cache.put_source(row, own, mask[index, :length], pad in source)

    def decode(self, token_ids: Tensor, positions: Tensor, length: int) -> Tensor:
        """Feed one token to each of the first rows; logits of the next, (rows, vocab) in float32.

        Feeding the same token at the same position again changes nothing and gives the same.

        Args:
            token_ids: (rows,) on the device.
            positions: (rows,), where each stands in its window, from 0.
            length: known to the host: not less than the largest position, plus 1.
        """
        if not self._uses_one_thread:
            return self._decode(token_ids, positions, length)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return self._decode(token_ids, positions, length)
        finally:
            torch.set_num_threads(threads)

    def _decode(self, token_ids: Tensor, positions: Tensor, length: int) -> Tensor:
        assert self._cache is not None, "call read first"
        mask = self._cache.place(positions, length, self._granularity)
        key_values, encoder_mask = self._cache.encoder_view(len(token_ids), self._granularity)
        embedded = self._model.embeddings(token_ids[:, None], position_ids=positions[:, None])
        hidden_states = self._decoder(embedded, key_values, encoder_mask, mask, self._cache)
        return self._head(hidden_states[:, 0]).float()

    def move(self, source: int, target: int, length: int) -> None:
        """Row ``target`` becomes what ``source`` is, with ``length`` positions of its past."""
        assert self._cache is not None, "call read first"
        self._cache.move(source, target, length)

    def replay(self, key: Hashable, step: Callable[[], Tensor], length: int, rows: int) -> Tensor:
        """Run ``step``, a function of fixed buffers alone; on CUDA as a graph from the second time.

        Args:
            key: of all that the function's shapes depend on besides ``length`` and ``rows``.
            step: calls `decode` with ``length`` and ``rows``; its result is overwritten next time.
            length: as in `decode`.
            rows: how many are decoded.
        """
        if not self._uses_graphs:
            return step()
        assert self._cache is not None, "call read first"
        source_length = self._cache.encoder_view(rows, self._granularity)[0][0][0].shape[2]
        key = (key, rows, -(-length // self._granularity), source_length)
        if key not in self._graphs:
            result = step().clone()  # this step, and the warm-up of the capture
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                output = step()
            self._graphs[key] = graph, output
            return result
        graph, output = self._graphs[key]
        graph.replay()
        return output

    # --- all rows in step, for beams --------------------------------------------------------------

    def start(self, sources: Sequence[Sequence[int]], capacity: int, copies: int = 1) -> None:
        """Read the sources and make room for a window; what an earlier window kept is dropped.

        Args:
            sources: as in `read`.
            capacity: as in `open`.
            copies: rows for each source (beams).
        """
        self.open(len(sources) * copies, max(map(len, sources)), capacity)
        self.read(range(len(sources)), sources)
        self._length = 0
        if copies > 1:
            self.select([row for row in range(len(sources)) for _ in range(copies)])

    def step(self, token_ids: Sequence[int], positions: Sequence[int]) -> Tensor:
        """As `decode`, of host values."""
        self._length = max(self._length, max(positions) + 1)
        tokens, where = (torch.tensor(x, device=self.device) for x in (token_ids, positions))
        return self.decode(tokens, where, max(positions) + 1)

    def reorder(self, rows: Sequence[int]) -> None:
        """Row i goes on from where row ``rows[i]`` was; its source stays as it is (for beams)."""
        assert self._cache is not None, "call start first"
        self._cache.take(rows, self._length, sources=False)

    def select(self, rows: Sequence[int]) -> None:
        """Keep these rows, sources included, in this order."""
        assert self._cache is not None, "call start first"
        self._cache.take(rows, self._length, sources=True)


def _head(model: Plug) -> Product:
    """The product with the word table; in a quantised model on a CPU with its copy in 8 bits."""
    table = model.embeddings.word_embeddings.weight.detach()
    scheme = scheme_of(model)
    if scheme is not None and table.dtype == torch.float32:
        in_8_bits = Scheme.of(8).quantize(table)
        no_bias = table.new_zeros(len(table))
        fast = product_8bit(in_8_bits["weight"], in_8_bits["scale"], no_bias)
        if fast is not None:
            return fast
    return product(table, None)


def _with_products(
    part: Part,
    for_quantized: Callable[[QuantizedLinear], Product],
    for_plain: Callable[[nn.Linear], Product],
) -> Part:
    """The same modules and weights, for inference alone, with other linear layers.

    What is only ever called becomes a plain function, which costs half of what calling a module
    does: at batch 1 on a CPU that is 7% of a step.
    """

    def replaced(module: nn.Module) -> nn.Module:
        copy = module.__new__(type(module))
        copy.__dict__.update(module.__dict__)
        copy._modules = {
            name: child if child is None else replaced(child)
            for name, child in module._modules.items()
        }
        for name, child in module.named_children():
            if isinstance(child, QuantizedLinear):
                copy.__dict__[name] = for_quantized(child)
            elif isinstance(child, nn.Linear):
                copy.__dict__[name] = for_plain(child)
            elif isinstance(child, nn.Dropout):
                copy.__dict__[name] = _identity
            elif isinstance(child, (LayerNorm, FeedForward)):
                copy.__dict__[name] = copy._modules[name].forward  # type: ignore[union-attr]
        return copy

    return cast(Part, replaced(part))


def _identity(x: Tensor) -> Tensor:
    return x

"""`Engine`: encode, prepare the caches, then token by token. The one seam of decoding.

The loops (`scheduler.py`, `beam.py`) know the methods of `Engine` and nothing of the model, so a
scripted engine in a test can take its place. Everything a step reads and writes is a fixed buffer;
on CUDA `replay` captures a step once and replays it as a graph.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from plug.device import has_kernels
from plug.errors import UsageError
from plug.generation.encoder_cache import EncoderCache
from plug.generation.kv_cache import DecoderCache
from plug.generation.plain_model import PlainModel
from plug.model.plug import Plug

if TYPE_CHECKING:
    from plug.generation.fused_model import FusedModel


# Above this many rows, a graph decodes a multiple of it.
ROWS_GRANULARITY = 4
# A graph of the plain model computes over lengths that are rounded up to a multiple of this.
GRAPH_GRANULARITY = 64


class Engine:
    """Decoding with a `Plug`; rows are numbered from 0, and a step decodes the first ones.

    The model's weights are read when the engine is made: later changes need another engine.

    Args:
        model: what decodes.
        graphs: on CUDA, make a graph of each step that comes again; not worth it for many texts
            of different length at once, where rows leave at nearly every step.
        reuse_bytes: kept at most of what the encoder made of earlier sources (`EncoderCache`).

    Raises:
        UsageError: the model is an encoder alone.
    """

    def __init__(self, model: Plug, *, graphs: bool = True, reuse_bytes: int = 0) -> None:
        if model.decoder is None:
            raise UsageError(
                "这个模型只有编码器（num_decoder_layers=0，预训练第一阶段的产物），不能写作。"
                "请用第二阶段（plug pretrain stage2）得到的模型。"
            )
        self.config = model.config
        self.device = model.embeddings.word_embeddings.weight.device
        self._uses_graphs = graphs and self.device.type == "cuda"
        self._model = _model(model, GRAPH_GRANULARITY if self._uses_graphs else 1)
        self._kept_sources = EncoderCache(reuse_bytes)
        self._graphs: dict[Hashable, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self.openings = 0
        self._room = (0, 0, 0)
        self._cache: DecoderCache | None = None
        self._length = 0

    # --- the rows, one by one ---------------------------------------------------------------------

    def open(self, rows: int, source_length: int, capacity: int) -> int:
        """Make room; what was kept is dropped, and the graphs with it.

        Args:
            rows: texts at most.
            source_length: tokens of a source at most.
            capacity: tokens that will be fed at most to a row, [CLS] included.

        Returns:
            `openings`, by which who opened can see whether somebody else has since.
        """
        self._graphs.clear()
        # The graphs share their memory; a pool goes with its last graph.
        self._pool = torch.cuda.graph_pool_handle() if self._uses_graphs else None
        room = (rows, source_length, capacity)
        if self._cache is None or any(new > old for new, old in zip(room, self._room, strict=True)):
            self._room = room
            self._cache = None
        self.openings += 1
        return self.openings

    def rounded(self, rows: int) -> int:
        """How many rows to decode for ``rows``: on CUDA few numbers, since each has its graphs."""
        if not self._uses_graphs or rows <= ROWS_GRANULARITY:
            return rows
        return -(-rows // ROWS_GRANULARITY) * ROWS_GRANULARITY

    def read(self, rows: Sequence[int], sources: Sequence[Sequence[int]]) -> None:
        """Encode sources, token ids with [CLS] and [SEP], for these rows, which begin anew.

        Padding ids inside a source are not attended to, as in the reference.
        """
        encoded = self._kept_sources.encode(sources, self._model.encode)
        for row, key_values in zip(rows, encoded, strict=True):
            if self._cache is None:
                room, source_length, capacity = self._room
                self._cache = DecoderCache(
                    key_values[0][0],
                    layers=len(key_values),
                    rows=room,
                    source_length=source_length,
                    capacity=capacity,
                )
            self._cache.put_source(row, key_values)

    def decode(self, token_ids: Tensor, positions: Tensor, length: int) -> Tensor:
        """Feed one token to each of the first rows; logits of the next, (rows, vocab) in float32.

        Feeding the same token at the same position again changes nothing and gives the same.

        Args:
            token_ids: (rows,) on the device.
            positions: (rows,), where each stands in its window, from 0.
            length: known to the host: not less than the largest position, plus 1.
        """
        assert self._cache is not None, "call read first"
        return self._model.decode(token_ids, positions, length, self._cache)

    def decode_several(self, token_ids: Tensor, positions: Tensor, length: int) -> Tensor:
        """As `decode`, several tokens of each row at once; logits (rows, tokens, vocab).

        Args:
            token_ids: (rows, tokens) on the device.
            positions: (rows, tokens); a token attends to those of its row at no later positions,
                also to what an earlier step left there. A row with fewer tokens than others
                repeats its last one, at the same position.
            length: as in `decode`.
        """
        assert self._cache is not None, "call read first"
        return self._model.decode_several(token_ids, positions, length, self._cache)

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
        granularity = self._model.granularity
        if granularity is not None:  # else lengths are read on the device
            source_length = self._cache.encoder_view(rows, granularity)[0][0][0].shape[2]
            key = (key, -(-length // granularity), source_length)
        if key not in self._graphs:
            result = step().clone()  # this step, and the warm-up of the capture
            graph = torch.cuda.CUDAGraph()
            # Other threads, such as one that watches over NCCL, may use the device meanwhile.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
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


def _model(model: Plug, granularity: int) -> PlainModel | FusedModel:
    words = model.embeddings.word_embeddings.weight
    if has_kernels(words.device) and words.dtype in (torch.float16, torch.bfloat16):
        from plug.generation.fused_model import FusedModel  # imports Triton

        return FusedModel(model)
    return PlainModel(model, granularity)

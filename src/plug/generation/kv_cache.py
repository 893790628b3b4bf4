"""`DecoderCache`: the keys and values of earlier positions, so that a step computes one position.

It has two halves, as `transformers`' EncoderDecoderCache: self-attention keys and values, filled
one position at a time, and cross-attention keys and values, projected from the encoder's output
once a window. Both are fixed buffers that are allocated once. A step writes into them in place, so
its shapes and addresses stay the same, and a CUDA graph can replay it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from plug.device import send
from plug.model.layers import KeyValue


class DecoderCache:
    """Keys and values of up to ``rows`` texts; a `plug.model.layers.KeyValueCache`.

    Args:
        like: keys of a layer (heads, …, head_dim); they give the number and the size of heads, the
            dtype and the device.
        layers: number of decoder layers.
        rows: texts at most.
        source_length: tokens of a source at most.
        capacity: positions of self-attention that a row has room for.
    """

    def __init__(
        self, like: Tensor, *, layers: int, rows: int, source_length: int, capacity: int
    ) -> None:
        self._heads, self._head_dim = like.shape[0], like.shape[2]
        self.capacity = capacity
        # Not uninitialised: hidden positions are multiplied by 0, and NaN would survive that.
        self.own, self.sources = (
            [
                tuple(like.new_zeros(rows, self._heads, length, self._head_dim) for _ in range(2))
                for _ in range(layers)
            ]
            for length in (capacity, source_length)
        )
        self._lengths = [0] * rows  # tokens of each
        self._encoder_slots = torch.arange(source_length, device=like.device)
        self.source_lengths = torch.zeros(rows, dtype=torch.int32, device=like.device)
        self._slots = torch.arange(capacity, device=like.device)
        heads = torch.arange(rows * self._heads, device=like.device)
        self._first_slots = heads.view(rows, self._heads) * capacity
        self._opened, self._shut = like.new_zeros(()), like.new_full((), float("-inf"))

    @property
    def num_bytes(self) -> int:
        """Bytes of the buffers."""
        return sum(buffer.nbytes for pair in (*self.own, *self.sources) for buffer in pair)

    def put_sources(self, rows: Sequence[int], sources: Sequence[Sequence[KeyValue]]) -> None:
        """Store each row's source: a pair a layer, each (heads, positions, head_dim)."""
        for row, key_values in zip(rows, sources, strict=True):
            length = key_values[0][0].shape[1]
            for kept, new in zip(self.sources, key_values, strict=True):
                for buffer, states in zip(kept, new, strict=True):
                    buffer[row, :, :length] = states
            self._lengths[row] = length
        device = self._slots.device
        lengths = send([self._lengths[row] for row in rows], device, torch.int32)
        self.source_lengths.index_copy_(0, send(rows, device, torch.long), lengths)

    def encoder_view(self, rows: int, granularity: int = 1) -> tuple[list[KeyValue], Tensor | None]:
        """Return cross-attention keys and values of the first ``rows``, and their mask (rows, src).

        Args:
            rows: how many are decoded.
            granularity: the length is rounded up to a multiple of it, at most to the whole buffer.
                Above 1 there is always a mask.

        Returns:
            The pairs, each (rows, heads, src, head_dim); the mask is None where it hides nothing.
        """
        lengths = self._lengths[:rows]
        longest = _round_up(max(lengths), granularity, len(self._encoder_slots))
        pairs = [
            (key[:rows, :, :longest], value[:rows, :, :longest]) for key, value in self.sources
        ]
        if granularity == 1 and min(lengths) == longest:
            return pairs, None
        return pairs, self._encoder_slots[:longest] < self.source_lengths[:rows, None]

    def place(self, positions: Tensor, length: int, granularity: int = 1) -> Tensor:
        """Set where `update` writes the next tokens of each row, and return their mask.

        A position that was written before is overwritten, so a step may be repeated.

        Args:
            positions: (rows, tokens), from 0, below ``capacity``.
            length: not less than the largest of them, plus 1.
            granularity: as in `encoder_view`.

        Returns:
            The self-attention mask to add, 0 or -inf, (rows, 1, tokens, positions so far).
        """
        self._rows = len(positions)
        self._length = _round_up(length, granularity, self.capacity)
        slots = self._first_slots[: self._rows, :, None] + positions[:, None]
        self._target = slots.view(-1)  # for each row, head and token, in the flattened buffer
        seen = self._slots[: self._length] <= positions[:, None, :, None]
        return torch.where(seen, self._opened, self._shut)

    def update(self, key: Tensor, value: Tensor, layer_index: int) -> KeyValue:
        """Add (rows, heads, tokens, head_dim) each; return all positions of the layer so far."""
        keys, values = self.own[layer_index]
        for buffer, new in ((keys, key), (values, value)):
            states = new.reshape(-1, self._head_dim)
            buffer.view(-1, self._head_dim).index_copy_(0, self._target, states)
        rows, length = self._rows, self._length
        return keys[:rows, :, :length], values[:rows, :, :length]

    def take(self, rows: Sequence[int], length: int, *, sources: bool) -> None:
        """Make row i what row ``rows[i]`` was, in the first ``length`` positions.

        Args:
            rows: numbers of rows; may repeat.
            length: positions that hold something.
            sources: copy the sources too. Beams of one text share a source and need no copy.
        """
        index = send(rows, self._slots.device, torch.long)
        for keys, values in self.own:
            for buffer in (keys, values):
                buffer[: len(rows), :, :length] = buffer[index, :, :length]
        if sources:
            self._take_sources(slice(len(rows)), index)
            self._lengths[: len(rows)] = [self._lengths[row] for row in rows]

    def move(self, source: int, target: int, length: int) -> None:
        """Make row ``target`` what row ``source`` is."""
        for keys, values in self.own:
            for buffer in (keys, values):
                buffer[target, :, :length] = buffer[source, :, :length]
        self._take_sources(target, source)
        self._lengths[target] = self._lengths[source]

    def _take_sources(self, target: slice | int, source: Tensor | int) -> None:
        longest = max(self._lengths)
        for keys, values in self.sources:
            for buffer in (keys, values):
                buffer[target, :, :longest] = buffer[source, :, :longest]
        self.source_lengths[target] = self.source_lengths[source]


def _round_up(length: int, granularity: int, limit: int) -> int:
    return min(-(-length // granularity) * granularity, limit)

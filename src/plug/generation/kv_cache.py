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
        """Store each row's source: a pair a layer, each (heads, positions, head_dim).

        The host's work hardly grows with the rows: while it is at it, a GPU waits.
        """
        device, lengths = self._slots.device, [each[0][0].shape[1] for each in sources]
        counts = torch.tensor(lengths)
        row_of = torch.tensor(rows).repeat_interleave(counts)
        firsts = (counts.cumsum(0) - counts).repeat_interleave(counts)
        place_of = torch.arange(len(row_of)) - firsts
        where = tuple(send(torch.stack([row_of, place_of]), device, torch.long))
        for layer, pair in enumerate(self.sources):
            for part, buffer in enumerate(pair):
                if len(rows) == 1:  # a third faster on a CPU
                    buffer[rows[0], :, : lengths[0]] = sources[0][layer][part]
                else:
                    states = torch.cat([source[layer][part] for source in sources], 1)
                    buffer.transpose(1, 2)[where] = states.transpose(0, 1)
        for row, length in zip(rows, lengths, strict=True):
            self._lengths[row] = length
        index = send(rows, device, torch.long)
        self.source_lengths.index_copy_(0, index, send(lengths, device, torch.int32))

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

    def take(
        self, rows: Sequence[int], length: int, *, sources: bool, into: Sequence[int] | None = None
    ) -> None:
        """Make row i what row ``rows[i]`` was, in the first ``length`` positions.

        Args:
            rows: numbers of rows; may repeat.
            length: positions that hold something.
            sources: copy the sources too. Beams of one text share a source and need no copy.
            into: the rows that become so, in place of the first ones.
        """
        into = range(len(rows)) if into is None else into
        changes = [(row, target) for row, target in zip(rows, into, strict=True) if row != target]
        if not changes:
            return
        index, targets = send(list(zip(*changes, strict=True)), self._slots.device, torch.long)
        for keys, values in self.own:
            for buffer in (keys, values):
                buffer[targets, :, :length] = buffer[index, :, :length]
        if not sources:
            return
        longest = max(self._lengths)
        for keys, values in self.sources:
            for buffer in (keys, values):
                buffer[targets, :, :longest] = buffer[index, :, :longest]
        self.source_lengths[targets] = self.source_lengths[index]
        lengths = [self._lengths[row] for row, _ in changes]
        for (_, target), known in zip(changes, lengths, strict=True):
            self._lengths[target] = known


def _round_up(length: int, granularity: int, limit: int) -> int:
    return min(-(-length // granularity) * granularity, limit)

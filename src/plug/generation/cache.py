"""`DecoderCache`: what decoding keeps, so that a step costs one position and no more.

Two halves, as in `transformers`' EncoderDecoderCache: self-attention keys and values, allocated
once for a whole window and filled a position at a time; cross-attention keys and values,
projected from the encoder's output once a window. Rows may stand at different positions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from plug.model.layers import KeyValue


class DecoderCache:
    """Keys and values of one window; a `plug.model.layers.KeyValueCache`.

    Args:
        encoder_key_values: a layer's cross-attention keys and values, each
            (rows, heads, src, head_dim), from `Decoder.project_encoder`.
        encoder_attention_mask: (rows, src) bool, True on real tokens; None where all are.
        capacity: positions of self-attention to make room for.
    """

    def __init__(
        self,
        encoder_key_values: Sequence[KeyValue],
        encoder_attention_mask: Tensor | None,
        capacity: int,
    ) -> None:
        self.encoder_key_values = list(encoder_key_values)
        self.encoder_attention_mask = encoder_attention_mask
        key = encoder_key_values[0][0]
        self.capacity = capacity
        self.self_key_values: list[KeyValue] = [
            (self._allocate(key, len(key)), self._allocate(key, len(key)))
            for _ in encoder_key_values
        ]
        self.length = 0  # positions that any row has written
        self._rows = torch.arange(len(key), device=key.device)
        self._slots = torch.arange(capacity, device=key.device)
        self._positions = self._rows.new_zeros(len(key))

    def _allocate(self, like: Tensor, rows: int) -> Tensor:
        # Zeros, not empty: what the mask hides must still be a number.
        return like.new_zeros(rows, like.shape[1], self.capacity, like.shape[3])

    def place(self, positions: Tensor, length: int) -> Tensor:
        """Say where the next token of each row goes.

        A position written before is overwritten, which is what repeating a step needs.

        Args:
            positions: (rows,), from 0, below ``capacity``.
            length: the largest of them, plus 1.

        Returns:
            Bool (rows, 1, 1, positions so far): the self-attention mask of this step.
        """
        self._positions = positions
        self.length = max(self.length, length)
        return (self._slots[: self.length] <= positions[:, None])[:, None, None, :]

    def update(self, key: Tensor, value: Tensor, layer_index: int) -> KeyValue:
        """Add one position, each (rows, heads, 1, head_dim); all positions of the layer so far."""
        keys, values = self.self_key_values[layer_index]
        keys[self._rows, :, self._positions] = key[:, :, 0]
        values[self._rows, :, self._positions] = value[:, :, 0]
        return keys[:, :, : self.length], values[:, :, : self.length]

    def reorder(self, rows: Tensor) -> None:
        """Row i becomes what row ``rows[i]`` was, in self-attention alone.

        For beams: all beams of one text read the same encoding.
        """
        self.self_key_values = [
            (self._take(key, rows), self._take(value, rows)) for key, value in self.self_key_values
        ]
        self._rows = self._rows[: len(rows)]

    def select(self, rows: Tensor) -> None:
        """As `reorder`, cross-attention included: for texts that are done and leave the batch."""
        self.reorder(rows)
        self.encoder_key_values = [
            (key[rows], value[rows]) for key, value in self.encoder_key_values
        ]
        if self.encoder_attention_mask is not None:
            self.encoder_attention_mask = self.encoder_attention_mask[rows]

    def _take(self, states: Tensor, rows: Tensor) -> Tensor:
        taken = self._allocate(states, len(rows))
        taken[:, :, : self.length] = states[rows, :, : self.length]
        return taken

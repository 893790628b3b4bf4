"""`Engine`: encode, prepare the caches, then token by token. The one seam of decoding.

The loops (`window.py`, `beam.py`) know the four methods of `Engine` and nothing of the model, so
a compiled engine, or a scripted one in a test, can take its place.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from plug.errors import UsageError
from plug.generation.cache import DecoderCache
from plug.model.plug import Plug


class Engine:
    """Eager decoding of one window after another with a `Plug`.

    Raises:
        UsageError: the model is an encoder alone.
    """

    def __init__(self, model: Plug) -> None:
        if model.decoder is None:
            raise UsageError(
                "这个模型只有编码器（num_decoder_layers=0，预训练第一阶段的产物），不能写作。"
                "请用第二阶段（plug pretrain stage2）得到的模型。"
            )
        self.config = model.config
        self._model = model
        self._decoder = model.decoder
        self._cache: DecoderCache | None = None

    @property
    def device(self) -> torch.device:
        return self._model.embeddings.word_embeddings.weight.device

    def start(self, sources: Sequence[Sequence[int]], capacity: int, copies: int = 1) -> None:
        """Read the sources and make room for a window; what an earlier window kept is dropped.

        Args:
            sources: token ids of each text, [CLS] and [SEP] included. Padding ids inside a source
                are not attended to, as in the reference.
            capacity: tokens that will be fed at most, [CLS] included.
            copies: rows for each source (beams).
        """
        pad = self.config.pad_token_id
        longest = max(map(len, sources))
        padded = [[*source, *[pad] * (longest - len(source))] for source in sources]
        input_ids = torch.tensor(padded, device=self.device)
        attention_mask: Tensor | None = input_ids != pad
        if any(pad in source for source in padded):
            hidden_states = self._model.encode(input_ids, attention_mask)
        else:
            attention_mask = None
            hidden_states = self._model.encode(input_ids)
        key_values = self._decoder.project_encoder(hidden_states)
        if copies > 1:
            key_values = [
                (key.repeat_interleave(copies, 0), value.repeat_interleave(copies, 0))
                for key, value in key_values
            ]
            if attention_mask is not None:
                attention_mask = attention_mask.repeat_interleave(copies, 0)
        self._cache = DecoderCache(key_values, attention_mask, capacity)

    def step(self, token_ids: Sequence[int], positions: Sequence[int]) -> Tensor:
        """Feed one token a row; logits of the next one, (rows, vocab) in float32.

        Feeding the same token at the same position again changes nothing and gives the same.

        Args:
            token_ids: the last token of each row.
            positions: where it stands in the window, from 0.
        """
        assert self._cache is not None, "call start first"
        cache = self._cache
        where = torch.tensor(positions, device=self.device)
        mask = cache.place(where, max(positions) + 1)
        fed = torch.tensor(token_ids, device=self.device)[:, None]
        hidden_states = self._decoder(
            self._model.embeddings(fed, position_ids=where[:, None]),
            cache.encoder_key_values,
            cache.encoder_attention_mask,
            mask,
            cache,
        )
        return self._model.lm_logits(hidden_states[:, 0]).float()

    def reorder(self, rows: Sequence[int]) -> None:
        """Row i goes on from where row ``rows[i]`` was; its source stays as it is (for beams)."""
        assert self._cache is not None, "call start first"
        self._cache.reorder(torch.tensor(rows, device=self.device))

    def select(self, rows: Sequence[int]) -> None:
        """Keep these rows, sources included, in this order."""
        assert self._cache is not None, "call start first"
        self._cache.select(torch.tensor(rows, device=self.device))

"""`TextEncoder`: a loaded model with its tokenizer, for what needs no fine-tuning."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from plug.checkpoints.directory import find_model_directory, load_tokenizer
from plug.device import find_device
from plug.errors import UsageError
from plug.loading.load import load
from plug.model.plug import Plug
from plug.tokenization import PlugTokenizer

MAX_SOURCE = 512  # tokens read at most, as in pre-training


class TextEncoder:
    """Encodes texts; `classify`, `fill_mask` and `embed` make one, or are given one.

    Args:
        model: a name or directory as `plug.load` takes it, or a `Plug`.
        tokenizer: needed with a `Plug`; otherwise the model directory's own if None.
        device: "cpu", "cuda", …; None is CUDA where there is one. A `Plug` stays where it is.
    """

    def __init__(
        self,
        model: str | Path | Plug | None = None,
        tokenizer: PlugTokenizer | None = None,
        device: str | None = None,
    ) -> None:
        if isinstance(model, Plug):
            if tokenizer is None:
                raise UsageError("model 是 Plug 对象时，还要给 tokenizer（PlugTokenizer）。")
        else:
            directory = find_model_directory(model)
            tokenizer = tokenizer or load_tokenizer(directory)
            model = load(directory, device=find_device(device))
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.longest = min(MAX_SOURCE, model.config.max_position_embeddings)

    @property
    def device(self) -> torch.device:
        return self.model.embeddings.word_embeddings.weight.device

    def frame(self, ids: Sequence[int]) -> list[int]:
        """[CLS], the last ids that there is room for, [SEP]."""
        kept = ids[max(0, len(ids) - self.longest + 2) :]
        return [self.tokenizer.cls_token_id, *kept, self.tokenizer.sep_token_id]

    def encode(self, sources: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """The encoder's output (batch, src, hidden) and the mask (batch, src), 1 on real tokens."""
        input_ids = pad(sources, self.tokenizer.pad_token_id).to(self.device)
        mask = pad([[1] * len(source) for source in sources], 0).to(self.device)
        return self.model.encode(input_ids, mask), mask


def pad(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    """Rows of ids as one tensor, the shorter ones filled up with ``value``."""
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[value] * (longest - len(row))] for row in rows])


def check_text(text: str) -> str:
    """The text, unless it is empty.

    Raises:
        UsageError: it is, or holds nothing but blanks.
    """
    if not text.strip():
        raise UsageError("文字是空的，或只有空白。请给出至少一个字。")
    return text

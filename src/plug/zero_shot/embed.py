"""Texts as vectors: the mean of the encoder's output over a text's tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from plug.errors import UsageError
from plug.model.heads import numbers
from plug.model.plug import Plug
from plug.traditional import as_read
from plug.zero_shot.encoder import TextEncoder, check_text


@torch.inference_mode()
def embed(
    texts: Sequence[str],
    *,
    batch_size: int = 32,
    model: str | Path | Plug | TextEncoder | None = None,
    device: str | None = None,
    simplify: bool = False,
) -> Tensor:
    """(texts, hidden) float32 on the CPU, of length 1: products are cosine similarities.

    Args:
        texts: the last 510 tokens of each are read.
        batch_size: texts encoded together.
        model: as in `plug.load`, or a `TextEncoder`.
        device: "cpu", "cuda", …; None is CUDA where there is one.
        simplify: convert traditional characters to simplified ones first (`plug.traditional`).

    Raises:
        UsageError: no text, or an empty one.
        PlugError: the model's outputs are no numbers.
    """
    if not texts:
        raise UsageError("没有文字。请给出至少一段。")
    read = [as_read(check_text(text), simplify) for text in texts]
    encoder = model if isinstance(model, TextEncoder) else TextEncoder(model, device=device)
    sources = list(map(encoder.frame, encoder.tokenizer.encode_batch(read)))
    vectors = []
    for first in range(0, len(sources), batch_size):
        encoded, mask = encoder.encode(sources[first : first + batch_size])
        weights = mask[..., None].float()
        vectors.append((encoded.float() * weights).sum(1) / weights.sum(1))
    return numbers(F.normalize(torch.cat(vectors), dim=-1)).cpu()

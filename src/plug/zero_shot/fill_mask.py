"""What may stand at the [MASK]s of a text, by the masked-LM head."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch

from plug.errors import UsageError
from plug.model.heads import numbers
from plug.model.plug import Plug
from plug.traditional import as_read
from plug.zero_shot.encoder import TextEncoder

MASK = "[MASK]"


class Filling(NamedTuple):
    """A piece of the vocabulary and its probability at one mask."""

    text: str
    probability: float


@torch.inference_mode()
def fill_mask(
    text: str,
    *,
    top_k: int = 5,
    model: str | Path | Plug | TextEncoder | None = None,
    device: str | None = None,
    simplify: bool = False,
) -> list[list[Filling]]:
    """For each [MASK] of ``text``, in order, the ``top_k`` likeliest pieces.

    A piece may be a character or a word; special tokens and bytes are left out.

    Args:
        text: with one "[MASK]" or more.
        top_k: pieces a mask.
        model: as in `plug.load`, or a `TextEncoder`.
        device: "cpu", "cuda", …; None is CUDA where there is one.
        simplify: convert traditional characters to simplified ones first (`plug.traditional`).

    Raises:
        UsageError: there is no mask, or the text is too long to be read whole.
        PlugError: the model's outputs are no numbers.
    """
    if MASK not in text:
        raise UsageError(f"文字里没有 {MASK}。请在要填的地方写上它，如“今天{MASK}气很好”。")
    if top_k < 1:
        raise UsageError(f"top_k={top_k} 应不小于 1。")
    encoder = model if isinstance(model, TextEncoder) else TextEncoder(model, device=device)
    tokenizer = encoder.tokenizer
    parts = tokenizer.encode_batch(as_read(text, simplify).split(MASK))
    ids = parts[0]
    for part in parts[1:]:
        ids = [*ids, tokenizer.mask_token_id, *part]
    if len(ids) > encoder.longest - 2:
        raise UsageError(f"文字有 {len(ids)} 个词元，最多读 {encoder.longest - 2} 个。请截短。")
    source = encoder.frame(ids)
    encoded, _ = encoder.encode([source])
    where = [index for index, token in enumerate(source) if token == tokenizer.mask_token_id]
    logits = numbers(encoder.model.mlm_logits(encoded[0, where]).float())
    logits = logits[:, : encoder.model.config.num_emitted_tokens]
    probabilities = logits.softmax(-1)
    hidden = [
        index
        for index in range(logits.shape[-1])
        if index in tokenizer.special_ids
        or (tokenizer.backend.id_to_token(index) or "<0x").startswith("<0x")
    ]
    probabilities[:, hidden] = 0
    best = probabilities.topk(min(top_k, logits.shape[-1] - len(hidden)))
    return [
        [Filling(tokenizer.decode([index]), value) for index, value in zip(*row, strict=True)]
        for row in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]

"""Labels for a text without fine-tuning: how likely the model finds each label in a prompt.

The prompt puts a text into words ("…这段话说的是"), a label completes it. Examples, if there are
any, stand before it, each with its label: what the original calls a demonstration. Labels that are
likely anyway would win every time, so from each score that of the same prompt without the text is
taken (Zhao et al. 2021, arXiv:2102.09690; Holtzman et al. 2021, arXiv:2104.08315).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F

from plug.errors import UsageError
from plug.model.heads import numbers
from plug.model.plug import Plug
from plug.traditional import as_read
from plug.zero_shot.encoder import TextEncoder, check_text, pad

Method = Literal["decoder", "mlm"]

SLOT = "{text}"
PROMPT = "{text}这段话说的是"
MAX_LABELS = 200


class LabelScore(NamedTuple):
    """A label and its probability among the labels."""

    label: str
    probability: float


def classify(
    text: str,
    labels: Sequence[str],
    *,
    examples: Sequence[tuple[str, str]] = (),
    prompt: str = PROMPT,
    method: Method = "decoder",
    model: str | Path | Plug | TextEncoder | None = None,
    device: str | None = None,
    simplify: bool = False,
) -> list[LabelScore]:
    """Labels for ``text``, the likeliest first.

    Args:
        text: what to classify.
        labels: in words that complete the prompt, two or more.
        examples: (text, label) pairs to learn from (few-shot).
        prompt: has "{text}" where the text goes; the label comes at its end.
        method: "decoder", by its likelihood of writing the label after the prompt; or "mlm", by
            the masked-LM head's of the label's characters at masks.
        model: as in `plug.load`, or a `TextEncoder`.
        device: "cpu", "cuda", …; None is CUDA where there is one.
        simplify: convert traditional characters to simplified ones first (`plug.traditional`).

    Raises:
        UsageError: fewer than two labels, labels twice, no "{text}", or a model without decoder.
        PlugError: the model's outputs are no numbers.
    """
    check_text(text)
    if not 2 <= len(labels) <= MAX_LABELS or not all(label.strip() for label in labels):
        raise UsageError(f"应给出 2 到 {MAX_LABELS} 个不为空的标签，却有 {len(labels)} 个。")
    if len(set(labels)) < len(labels):
        raise UsageError(f"标签有重复：{'、'.join(labels)}。")
    if SLOT not in prompt:
        raise UsageError(f"提示 {prompt!r} 里没有 {SLOT}，不知道文字放在哪里。")
    if method not in ("decoder", "mlm"):
        raise UsageError(f"method={method!r} 只能是 'decoder' 或 'mlm'。")
    encoder = model if isinstance(model, TextEncoder) else TextEncoder(model, device=device)
    score = _decoder_scores if method == "decoder" else _mlm_scores
    text, prompt, *words = (as_read(each, simplify) for each in (text, prompt, *labels))
    shown = "".join(
        as_read(f"{prompt.replace(SLOT, each)}{label}。\n", simplify) for each, label in examples
    )
    with_text, without = (
        score(encoder, shown + prompt.replace(SLOT, content), words) for content in (text, "")
    )
    probabilities = (with_text - without).softmax(0).tolist()
    scored = map(LabelScore, labels, probabilities)
    return sorted(scored, key=lambda each: -each.probability)


@torch.inference_mode()
def _decoder_scores(encoder: TextEncoder, prompt: str, labels: Sequence[str]) -> torch.Tensor:
    """(labels,) log-probability of each label as the continuation, a mean over its tokens."""
    if encoder.model.decoder is None:
        raise UsageError("这个模型只有编码器，不能用解码器给标签评分。请用 --method mlm。")
    encoded, mask = encoder.encode([encoder.frame(encoder.tokenizer.encode(prompt))])
    targets = encoder.tokenizer.encode_batch(labels)
    start = encoder.model.config.decoder_start_token_id
    fed = pad([[start, *target[:-1]] for target in targets], encoder.tokenizer.pad_token_id)
    rows = len(labels)
    hidden = encoder.model.decode(
        fed.to(encoder.device), encoded.expand(rows, -1, -1), mask.expand(rows, -1)
    )
    logits = encoder.model.lm_logits(hidden).float()
    return -_mean_loss(logits, targets)


@torch.inference_mode()
def _mlm_scores(encoder: TextEncoder, prompt: str, labels: Sequence[str]) -> torch.Tensor:
    """(labels,) log-probability of each label's characters at masks after the prompt, a mean."""
    before = encoder.tokenizer.encode_characters(prompt)
    targets = [encoder.tokenizer.encode_characters(label) for label in labels]
    after = encoder.tokenizer.encode("。")
    mask_id = encoder.tokenizer.mask_token_id
    sources = [encoder.frame([*before, *[mask_id] * len(ids), *after]) for ids in targets]
    encoded, _ = encoder.encode(sources)
    at_masks = [
        hidden[[index for index, token in enumerate(source) if token == mask_id][-len(ids) :]]
        for hidden, source, ids in zip(encoded, sources, targets, strict=True)
    ]
    hidden = torch.nn.utils.rnn.pad_sequence(at_masks, batch_first=True)
    return -_mean_loss(encoder.model.mlm_logits(hidden).float(), targets)


def _mean_loss(logits: torch.Tensor, targets: Sequence[Sequence[int]]) -> torch.Tensor:
    """(rows,) cross-entropy of logits (rows, length, vocab), a mean over each row's targets."""
    wanted = pad(targets, -100).to(logits.device)
    losses = F.cross_entropy(numbers(logits).mT, wanted, ignore_index=-100, reduction="none")
    return losses.sum(1) / (wanted != -100).sum(1)

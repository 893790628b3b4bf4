"""The losses of both stages by name. They are sums, so the parts of a batch add up to the batch."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from plug.model.plug import Plug
from plug.pretraining.batches import Batch
from plug.pretraining.masking import IGNORE_INDEX

LABELS = {  # loss -> the batch's labels it is computed on
    "lm": "labels",
    "mlm": "mlm_labels",
    "word": "word_labels",
    "sentence": "sentence_label",
}

HeadLoss = Callable[[Plug, Tensor, Tensor], Tensor]
MOST_LOGITS = 2**30  # of one piece


def prediction_counts(batch: Batch) -> dict[str, Tensor]:
    """Return the number of predictions of each loss that this batch has."""
    return {
        name: (batch[key] != IGNORE_INDEX).sum()
        for name, key in LABELS.items()
        if key in batch and batch[key].numel()
    }


def structbert_losses(model: Plug, batch: Batch) -> dict[str, Tensor]:
    """Return the losses of stage 1, summed, in nats.

    `mlm` at masked positions, `word` at shuffled ones, `sentence` for each example.
    """
    hidden_states = model.encode(batch["input_ids"], token_type_ids=batch["token_type_ids"])
    losses = {"mlm": _token_loss(model, hidden_states, batch["mlm_positions"], batch["mlm_labels"])}
    if batch["word_labels"].numel():
        losses["word"] = _token_loss(
            model, hidden_states, batch["word_positions"], batch["word_labels"]
        )
    if batch["sentence_label"].numel():
        logits = model.sentence_logits(hidden_states)
        losses["sentence"] = cross_entropy_sum(logits, batch["sentence_label"])
    return losses


def palm_losses(model: Plug, batch: Batch) -> dict[str, Tensor]:
    """Return the losses of stage 2, summed, in nats.

    `lm` on the target, `mlm` on the source where it is corrupted.
    """
    hidden_states = model.encode(batch["input_ids"])
    decoded = model.decode(batch["decoder_input_ids"], hidden_states)
    losses = {"lm": _in_pieces(lm_loss, model, decoded.flatten(0, 1), batch["labels"].flatten())}
    if batch["mlm_labels"].numel():
        losses["mlm"] = _token_loss(
            model, hidden_states, batch["mlm_positions"], batch["mlm_labels"]
        )
    return losses


def _token_loss(model: Plug, hidden_states: Tensor, positions: Tensor, labels: Tensor) -> Tensor:
    """Return the loss of the masked-LM head at ``positions``, (batch, n).

    Args:
        model: has the head.
        hidden_states: (batch, length, hidden).
        positions: in each sequence.
        labels: (batch, n), IGNORE_INDEX where a position does not count.
    """
    batch, length, hidden = hidden_states.shape
    rows = torch.arange(batch, device=positions.device)[:, None] * length
    selected = hidden_states.reshape(-1, hidden).index_select(0, (positions + rows).flatten())
    return _in_pieces(mlm_loss, model, selected, labels.flatten())


def _in_pieces(loss: HeadLoss, model: Plug, hidden_states: Tensor, labels: Tensor) -> Tensor:
    """Add up a head's loss over pieces of (n, hidden) whose logits fit 32-bit indices."""
    rows = max(1, MOST_LOGITS // model.config.vocab_size)
    pieces = zip(hidden_states.split(rows), labels.split(rows), strict=True)
    return torch.stack([loss(model, *piece) for piece in pieces]).sum()


def lm_loss(model: Plug, hidden_states: Tensor, labels: Tensor) -> Tensor:
    """Return the decoder's summed loss on (n, hidden) states and (n,) labels."""
    return cross_entropy_sum(model.lm_logits(hidden_states), labels)


def mlm_loss(model: Plug, hidden_states: Tensor, labels: Tensor) -> Tensor:
    """Return the masked-LM head's summed loss on (n, hidden) states and (n,) labels."""
    return cross_entropy_sum(model.mlm_logits(hidden_states), labels)


def cross_entropy_sum(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the cross-entropy in float32, summed over the labels that are not ignored."""
    return F.cross_entropy(
        logits.reshape(-1, logits.shape[-1]).float(),
        labels.flatten(),
        ignore_index=IGNORE_INDEX,
        reduction="sum",
    )

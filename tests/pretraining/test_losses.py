"""Losses against a loop over positions, one log-softmax at a time."""

from __future__ import annotations

import pytest
import torch

from plug.model.plug import Plug
from plug.pretraining.batches import Batch
from plug.pretraining.losses import (
    cross_entropy_sum,
    palm_losses,
    prediction_counts,
    structbert_losses,
)
from plug.pretraining.masking import IGNORE_INDEX


@pytest.fixture
def stage1_batch() -> Batch:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 90, (3, 14), generator=generator)
    return {
        "input_ids": ids,
        "token_type_ids": (torch.arange(14) > 6).long().expand(3, -1),
        "mlm_positions": torch.tensor([[1, 5], [2, 12], [3, 4]]),
        "mlm_labels": torch.randint(5, 90, (3, 2), generator=generator),
        "word_positions": torch.tensor([[7, 8, 9], [0, 0, 0], [8, 9, 10]]),
        "word_labels": torch.tensor([[11, 12, 13], [IGNORE_INDEX] * 3, [21, 22, 23]]),
        "sentence_label": torch.tensor([0, 2, 1]),
    }


@pytest.fixture
def stage2_batch() -> Batch:
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(5, 90, (3, 6), generator=generator)
    labels[1, 4:] = IGNORE_INDEX
    return {
        "input_ids": torch.randint(5, 90, (3, 14), generator=generator),
        "mlm_positions": torch.tensor([[1, 5], [2, 12], [3, 4]]),
        "mlm_labels": torch.randint(5, 90, (3, 2), generator=generator),
        "decoder_input_ids": torch.randint(5, 90, (3, 6), generator=generator),
        "labels": labels,
    }


def nats(logits: torch.Tensor, label: int) -> float:
    """-log p(label), in float64, nothing but a sum of exponentials."""
    values = logits.double()
    return float(values.exp().sum().log() - values[label])


def test_structbert_losses_by_a_loop(tiny_model: Plug, stage1_batch: Batch) -> None:
    expected = {"mlm": 0.0, "word": 0.0, "sentence": 0.0}
    counts = dict.fromkeys(expected, 0)
    with torch.no_grad():
        losses = structbert_losses(tiny_model, stage1_batch)
        for row in range(3):
            one = {name: tensor[row : row + 1] for name, tensor in stage1_batch.items()}
            hidden = tiny_model.encode(one["input_ids"], token_type_ids=one["token_type_ids"])
            for name in ("mlm", "word"):
                pairs = zip(one[f"{name}_positions"][0], one[f"{name}_labels"][0], strict=True)
                for position, label in pairs:
                    if label != IGNORE_INDEX:
                        logits = tiny_model.mlm_logits(hidden[0, position])
                        expected[name] += nats(logits, int(label))
                        counts[name] += 1
            logits = tiny_model.sentence_head(hidden[0, 0])
            expected["sentence"] += nats(logits, int(one["sentence_label"]))
            counts["sentence"] += 1
    assert counts == {"mlm": 6, "word": 6, "sentence": 3}
    assert {name: int(n) for name, n in prediction_counts(stage1_batch).items()} == counts
    assert losses.keys() == expected.keys()
    for name, value in expected.items():
        assert float(losses[name]) == pytest.approx(value, rel=1e-5), name


def test_palm_losses_by_a_loop(tiny_model: Plug, stage2_batch: Batch) -> None:
    expected = {"lm": 0.0, "mlm": 0.0}
    with torch.no_grad():
        losses = palm_losses(tiny_model, stage2_batch)
        for row in range(3):
            one = {name: tensor[row : row + 1] for name, tensor in stage2_batch.items()}
            hidden = tiny_model.encode(one["input_ids"])
            for position, label in zip(one["mlm_positions"][0], one["mlm_labels"][0], strict=True):
                expected["mlm"] += nats(tiny_model.mlm_logits(hidden[0, position]), int(label))
            for step, label in enumerate(one["labels"][0]):
                if label != IGNORE_INDEX:  # each step from what came before it, and no more
                    decoded = tiny_model.decode(one["decoder_input_ids"][:, : step + 1], hidden)
                    expected["lm"] += nats(tiny_model.lm_logits(decoded[0, -1]), int(label))
    counts = {name: int(n) for name, n in prediction_counts(stage2_batch).items()}
    assert counts == {"lm": 16, "mlm": 6}
    for name, value in expected.items():
        assert float(losses[name]) == pytest.approx(value, rel=1e-5), name


def test_losses_without_labels_are_left_out(
    tiny_model: Plug, stage1_batch: Batch, stage2_batch: Batch
) -> None:
    none = torch.empty(3, 0, dtype=torch.long)
    clean = stage2_batch | {"mlm_positions": none, "mlm_labels": none}
    assert palm_losses(tiny_model, clean).keys() == {"lm"} == prediction_counts(clean).keys()
    bare = stage1_batch | {"word_positions": none, "word_labels": none, "sentence_label": none}
    assert structbert_losses(tiny_model, bare).keys() == {"mlm"} == prediction_counts(bare).keys()


def test_half_precision_logits_are_summed_in_fp32() -> None:
    logits = torch.randn(500, 90, generator=torch.Generator().manual_seed(0)).bfloat16()
    labels = torch.arange(500) % 90
    expected = sum(nats(row.float(), int(label)) for row, label in zip(logits, labels, strict=True))
    total = cross_entropy_sum(logits, labels)
    assert total.dtype == torch.float32
    assert float(total) == pytest.approx(expected, rel=1e-6)

from __future__ import annotations

import pytest
import torch

from plug.errors import UsageError
from plug.zero_shot.encoder import TextEncoder
from plug.zero_shot.fill_mask import fill_mask


@torch.inference_mode()
def test_fillings_are_the_likeliest_pieces_at_each_mask(encoder: TextEncoder) -> None:
    tokenizer = encoder.tokenizer
    source = tokenizer.encode("[CLS]山[MASK]有[MASK]花[SEP]", allow_special_tokens=True)
    logits = encoder.model.mlm_logits(encoder.model.encode(torch.tensor([source])))[0, [2, 4]]
    pieces = range(5 + 256, tokenizer.vocab_size)  # after the special tokens and the bytes
    found = fill_mask("山[MASK]有[MASK]花", top_k=3, model=encoder)
    for fillings, probabilities in zip(found, logits.softmax(-1), strict=True):
        best = sorted(pieces, key=lambda index: -float(probabilities[index]))[:3]
        assert [each.text for each in fillings] == [tokenizer.decode([index]) for index in best]
        expected = [float(probabilities[index]) for index in best]
        assert [each.probability for each in fillings] == pytest.approx(expected, abs=1e-6)


def test_what_makes_no_sense_is_refused(encoder: TextEncoder) -> None:
    for text, top_k, complaint in (
        ("山", 1, r"没有 \[MASK\]"),
        ("[MASK]" + "山" * 94, 1, "有 95 个词元，最多读 94 个"),
        ("[MASK]", 0, "top_k=0"),
    ):
        with pytest.raises(UsageError, match=complaint):
            fill_mask(text, top_k=top_k, model=encoder)

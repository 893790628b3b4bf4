from __future__ import annotations

import pytest
import torch

from plug.errors import UsageError
from plug.zero_shot.embed import embed
from plug.zero_shot.encoder import TextEncoder

TEXTS = ["今天天气", "山上有座庙，我们去看花。", "花"]


@torch.inference_mode()
def test_vectors_are_means_of_the_encoder_s_output(encoder: TextEncoder) -> None:
    found = embed(TEXTS, batch_size=2, model=encoder)
    for text, vector in zip(TEXTS, found, strict=True):
        ids = encoder.frame(encoder.tokenizer.encode(text))
        mean = encoder.model.encode(torch.tensor([ids]))[0].mean(0)
        torch.testing.assert_close(vector, mean / mean.norm())


def test_empty_texts_are_refused(encoder: TextEncoder) -> None:
    for texts in ([], ["花", " "]):
        with pytest.raises(UsageError):
            embed(texts, model=encoder)

from __future__ import annotations

import pytest
import torch

from plug.errors import UsageError
from plug.understanding.embed import embed
from plug.understanding.reader import TextReader

TEXTS = ["今天天气", "山上有座庙，我们去看花。", "花"]


@torch.inference_mode()
def test_vectors_are_means_of_the_encoder_s_output(reader: TextReader) -> None:
    found = embed(TEXTS, batch_size=2, model=reader)
    for text, vector in zip(TEXTS, found, strict=True):
        ids = reader.frame(reader.tokenizer.encode(text))
        mean = reader.model.encode(torch.tensor([ids]))[0].mean(0)
        torch.testing.assert_close(vector, mean / mean.norm())


def test_empty_texts_are_refused(reader: TextReader) -> None:
    for texts in ([], ["花", " "]):
        with pytest.raises(UsageError):
            embed(texts, model=reader)

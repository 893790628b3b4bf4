"""`TextEncoder`: frames of ids, and encodings that do not depend on padding."""

from __future__ import annotations

import pytest
import torch

from plug.errors import UsageError
from plug.model.plug import Plug
from plug.zero_shot.encoder import TextEncoder, check_text, pad


def test_of_a_long_text_the_last_ids_are_framed(encoder: TextEncoder) -> None:
    room = encoder.longest - 2
    cls, sep = encoder.tokenizer.cls_token_id, encoder.tokenizer.sep_token_id
    assert encoder.frame([5, 6]) == [cls, 5, 6, sep]
    assert encoder.frame(list(range(room + 3))) == [cls, *range(3, room + 3), sep]


@torch.inference_mode()
def test_padding_changes_no_encoding(encoder: TextEncoder) -> None:
    short, long = [1, 7, 2], [1, 8, 9, 10, 11, 2]
    together, mask = encoder.encode([short, long])
    (alone, _) = encoder.encode([short])
    torch.testing.assert_close(together[0, :3], alone[0])
    assert mask.sum(1).tolist() == [3, 6]


def test_what_makes_no_encoder(tiny_model: Plug) -> None:
    with pytest.raises(UsageError, match="还要给 tokenizer"):
        TextEncoder(tiny_model)
    with pytest.raises(UsageError, match="文字是空的"):
        check_text(" \n")
    assert pad([[1], [2, 3]], 0).tolist() == [[1, 0], [2, 3]]

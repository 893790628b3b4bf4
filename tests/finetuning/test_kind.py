"""What the four kinds share: how two texts are framed, and how labels are found."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("transformers")

from plug.errors import PlugError
from plug.finetuning.kind import Collator, frame, run_batches
from plug.tokenization import PlugTokenizer


@pytest.mark.parametrize(
    ("first", "second", "length", "expected"),
    [
        ([1, 2, 3], None, 4, [[1, 2]]),
        ([1, 2, 3, 4], [5], 7, [[1, 2, 3], [5]]),
        ([1], [5, 6, 7, 8], 7, [[1], [5, 6, 7]]),
        ([1, 2, 3, 4], [5, 6, 7, 8], 7, [[1, 2], [5, 6]]),
        ([1, 2], [5, 6], 7, [[1, 2], [5, 6]]),
    ],
)
def test_the_longer_part_is_cut_first(
    first: list[int],
    second: list[int] | None,
    length: int,
    expected: list[list[int]],
    tiny_tokenizer: PlugTokenizer,
) -> None:
    cls, sep = tiny_tokenizer.cls_token_id, tiny_tokenizer.sep_token_id
    framed = frame(tiny_tokenizer, first, second, length)
    assert framed["input_ids"] == [cls, *expected[0], sep, *(
        [*expected[1], sep] if second else []
    )]  # fmt: skip
    assert framed["token_type_ids"].count(1) == (len(expected[1]) + 1 if second else 0)


def test_a_batch_is_padded_to_its_longest(tiny_tokenizer: PlugTokenizer) -> None:
    pad = tiny_tokenizer.pad_token_id
    batch = Collator(pad)(
        [{"input_ids": [5, 6, 7], "labels": [1, 2, 3]}, {"input_ids": [8], "labels": [4]}]
    )
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, pad, pad]]
    assert batch["labels"].tolist() == [[1, 2, 3], [4, -100, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]


@pytest.mark.parametrize("name", ["logits", "start_logits"])
def test_outputs_that_are_no_numbers_are_no_answer(name: str) -> None:
    """Where a training diverged, argmax would call each example by the first label."""

    class Overflowing(torch.nn.Module):
        device = torch.device("cpu")

        def forward(self, **_: torch.Tensor) -> SimpleNamespace:
            return SimpleNamespace(**{name: torch.full((1, 2), float("nan"))})

    with pytest.raises(PlugError, match="NaN"):
        list(run_batches(Overflowing(), [{"input_ids": [2, 3]}], Collator(0), 1, None))

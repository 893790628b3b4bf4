"""Generation: what is read, and what is written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from plug import PlugForConditionalGeneration
from plug.finetuning.generation import Generation
from plug.finetuning.readers import GenerationExample
from plug.tokenization import PlugTokenizer


@pytest.mark.parametrize("num_beams", [1, 3])
def test_generation_reads_parts_and_writes_what_transformers_would(
    num_beams: int, model_directory: Path, tiny_tokenizer: PlugTokenizer
) -> None:
    kind = Generation(tiny_tokenizer, source_length=12, target_length=7, num_beams=num_beams)
    model = kind.load_model(model_directory)
    assert isinstance(model, PlugForConditionalGeneration)
    examples = [
        GenerationExample(source=("花", "山上有座庙，我们去公园看花。")),
        GenerationExample(source=("今天[SEP]",)),
    ]
    found = kind.predict(model, examples, batch_size=2)
    sep, cls = tiny_tokenizer.sep_token_id, tiny_tokenizer.cls_token_id
    first = [cls, *tiny_tokenizer.encode("花"), sep, *tiny_tokenizer.encode("山上有座庙，我们")]
    (features, other) = kind.features(
        [GenerationExample(source=example.source, target="花") for example in examples]
    )
    assert features["input_ids"] == [*first[:11], sep]
    assert sep not in other["input_ids"][1:-1]  # typed by a user, it stays text
    assert features["labels"] == [*tiny_tokenizer.encode("花"), sep]
    if num_beams == 1:
        banned = sorted(tiny_tokenizer.special_ids - {sep})
        for ids, source in zip(found, (features, other), strict=True):
            written = model.generate(
                torch.tensor([source["input_ids"]]),
                do_sample=False,
                max_new_tokens=7,
                suppress_tokens=banned,
            )[0, 1:].tolist()
            assert list(ids) == (written[: written.index(sep)] if sep in written else written)
    assert all(1 <= len(ids) <= 7 for ids in found)


def test_a_model_that_is_trained_keeps_its_weights_where_they_are(
    model_directory: Path, tiny_tokenizer: PlugTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU, decoding stacks weights; saved afterwards, each would be copied on the card."""
    monkeypatch.setattr("plug.generation.model_runner.has_kernels", lambda _: True)
    kind = Generation(tiny_tokenizer, source_length=12, target_length=3)
    model = kind.load_model(model_directory, dtype=torch.bfloat16)
    before = {name: each.untyped_storage().data_ptr() for name, each in model.named_parameters()}
    kind.predict(model, [GenerationExample(source=("花",))], batch_size=1)
    after = {name: each.untyped_storage().data_ptr() for name, each in model.named_parameters()}
    assert after == before

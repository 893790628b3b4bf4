"""Reading comprehension: windows of a long context, and the best span."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from plug.finetuning.question_answering import QuestionAnswering, best_span
from plug.finetuning.readers import QuestionExample
from plug.tokenization import PlugTokenizer


def test_reading_windows_hold_the_answer_where_it_is(tiny_tokenizer: PlugTokenizer) -> None:
    kind = QuestionAnswering(tiny_tokenizer, source_length=24)
    context = "山上有座庙，庙里没有霾，今天天气很好，我们去公园看花。"
    start = context.index("公园")
    example = QuestionExample(context=context, question="去？", answers=("公园",), start=start)
    features = kind.features([example])
    covered = set()
    held = 0
    for inputs in features:
        ids, begin, end = inputs["input_ids"], inputs["start_positions"], inputs["end_positions"]
        assert len(ids) <= 24
        covered |= set(tiny_tokenizer.decode(ids[4:]))
        if end:
            held += 1
            assert tiny_tokenizer.decode(ids[begin : end + 1]) == "公园"
    assert len(features) > held >= 1
    assert covered >= set(context)


def test_the_best_span_is_that_of_brute_force() -> None:
    torch.manual_seed(0)
    for _ in range(20):
        starts, ends = torch.randn(2, 9)
        pairs = [(i, j) for i in range(9) for j in range(i, min(9, i + 3))]
        best = max(pairs, key=lambda pair: float(starts[pair[0]] + ends[pair[1]]))
        assert best_span(starts, ends, 3)[1:] == best


def test_a_question_model_answers_only_what_it_reads(
    base_model: Path, tiny_tokenizer: PlugTokenizer
) -> None:
    kind = QuestionAnswering(tiny_tokenizer, source_length=24, target_length=3)
    model = kind.load_model(base_model)
    context = "山上有座庙，庙里没有霾，今天天气很好，我们去公园看花。"
    example = kind.example(["去？", context])
    (answer,) = kind.predict(model, [example], batch_size=3)
    assert context[answer.start : answer.start + len(answer.text)] == answer.text != ""
    assert len(answer.text) <= 3

"""Inputs and predictions of each kind, where a whole run would not show a mistake."""

from __future__ import annotations

from itertools import pairwise, product
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from plug import PlugForConditionalGeneration, PlugForTokenClassification
from plug.finetuning.generation import Generation
from plug.finetuning.kind import frame
from plug.finetuning.labelling import Labelling, best_paths
from plug.finetuning.question_answering import QuestionAnswering, best_span
from plug.finetuning.readers import GenerationExample, LabellingExample, QuestionExample
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


@pytest.mark.parametrize(
    "labels", [["O", "B-X", "I-X", "B-Y", "I-Y"], ["I-X", "O", "B-Y", "I-Y"], ["O"]]
)
def test_best_paths_are_the_best_of_all_that_spell_entities(labels: list[str]) -> None:
    generator = torch.Generator().manual_seed(0)
    texts = [
        torch.randn(length, len(labels), generator=generator).log_softmax(-1)
        for length in (5, 1, 0, 4, 3)
    ]

    def spells(path: tuple[int, ...]) -> bool:
        names = ["O", *(labels[tag] for tag in path)]
        return all(
            now[0] != "I" or f"B-{now[2:]}" not in labels or before[2:] == now[2:]
            for before, now in pairwise(names)
        )

    for scores, found in zip(texts, best_paths(texts, labels), strict=True):
        paths = product(range(len(labels)), repeat=len(scores))
        best = max(
            filter(spells, paths),
            key=lambda path: sum(scores[i, tag].item() for i, tag in enumerate(path)),
        )
        assert found[: len(scores)] == list(best)


def test_an_entity_goes_on_from_one_window_to_the_next(
    base_model: Path, tiny_tokenizer: PlugTokenizer
) -> None:
    kind = Labelling(tiny_tokenizer, ["O", "B-X", "I-X"], source_length=18)
    model = kind.load_model(base_model)
    with torch.no_grad():
        model.classifier.bias.copy_(torch.tensor([-50.0, 0.0, 50.0]))  # I-X is each token's best
    examples = [LabellingExample(tokens=tuple("今天" * length)) for length in (13, 1, 0)]

    found = kind.predict(model, examples, batch_size=2)

    assert found == [("B-X", *["I-X"] * 25), ("B-X", "I-X"), ()]


def test_long_sentences_are_labelled_in_windows(
    base_model: Path, tiny_tokenizer: PlugTokenizer
) -> None:
    """Each window is the sentence of a document of its own; 霾 is three bytes, one tag."""
    kind = Labelling(tiny_tokenizer, ["O", "B-X", "B-Y"], source_length=18)
    model = kind.load_model(base_model)
    tokens = tuple("今天霾气很好，我们去公园看花。山上有座庙今天霾气很好，我们去")
    (whole,) = kind.predict(model, [LabellingExample(tokens=tokens)], batch_size=4)
    room, parts, used = 16, [[]], 0
    for token in tokens:
        size = 3 if token == "霾" else 1
        if used + size > room:
            parts, used = [*parts, []], 0
        parts[-1].append(token)
        used += size
    assert len(parts) == 3
    expected = []
    for part in parts:
        expected += kind.predict(model, [LabellingExample(tokens=tuple(part))], batch_size=1)[0]
    assert list(whole) == expected
    assert isinstance(model, PlugForTokenClassification)


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

"""Labelling: windows, paths of tags, entities."""

from __future__ import annotations

from itertools import pairwise, product
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from plug import PlugForTokenClassification
from plug.errors import UsageError
from plug.finetuning.labelling import Labelling, _with_bare_entities, best_paths
from plug.finetuning.readers import LabellingExample
from plug.tokenization import PlugTokenizer


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


def test_blanks_at_the_ends_are_outside_and_shift_nothing(
    base_model: Path, tiny_tokenizer: PlugTokenizer
) -> None:
    kind = Labelling(tiny_tokenizer, ["O", "B-X", "I-X"], source_length=18)
    model = kind.load_model(base_model)
    with torch.no_grad():
        model.classifier.bias.copy_(torch.tensor([-50.0, 0.0, 50.0]))
    (bare, within, blank) = (kind.example([text]) for text in ("今天", "\u3000 今天\u200b", "今"))
    found = kind.predict(model, [bare, within, blank], batch_size=2)
    assert found == [("B-X", "I-X"), ("O", "O", "B-X", "I-X", "O"), ("B-X",)]
    (entity,) = kind.record(within, found[1])["entities"]
    assert entity == {"text": "今天", "type": "X", "start": 2, "end": 4}


def test_entities_neither_begin_nor_end_with_a_blank(
    base_model: Path, tiny_tokenizer: PlugTokenizer
) -> None:
    """The model says B-X for every token, or I-X behind one B-X."""
    kind = Labelling(tiny_tokenizer, ["O", "B-X", "I-X"], source_length=18)
    model = kind.load_model(base_model)
    example = kind.example(["今 天"])
    found = []
    for scores in ([-50.0, 50.0, 0.0], [-50.0, 0.0, 50.0]):
        with torch.no_grad():
            model.classifier.bias.copy_(torch.tensor(scores))
        found += kind.predict(model, [example], batch_size=1)
    assert found == [("B-X", "O", "B-X"), ("B-X", "I-X", "I-X")]

    tags = ("B-X", "I-X", "I-X", "I-X", "O", "B-Y")
    assert _with_bare_entities(" 今 \u3000天 ", tags) == ("O", "B-X", "O", "O", "O", "O")
    assert _with_bare_entities("今 天去了a", tags) == tags


def test_labels_are_both_tags_of_every_type() -> None:
    examples = [LabellingExample(tokens=("一", "二"), tags=("B-X", "O"), scheme="BMES")]
    assert Labelling.labels_of(examples, "a.txt") == ["B-X", "I-X", "O"]
    assert Labelling.facts_of(examples) == {"tag_scheme": "BMES"}
    with pytest.raises(UsageError, match="没有一个实体"):
        Labelling.labels_of([LabellingExample(tokens=("一",), tags=("O",))], "a.txt")

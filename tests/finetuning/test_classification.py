"""Classification: labels of a training file, predictions by probability, scores."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from plug.errors import UsageError
from plug.finetuning.classification import Classification, LabelPrediction
from plug.finetuning.readers import ClassificationExample
from plug.tokenization import PlugTokenizer


def example(label: str | None, text_b: str | None = None) -> ClassificationExample:
    return ClassificationExample(text_a="花", text_b=text_b, label=label, label_name=f"{label}类")


def test_labels_and_facts_of_a_training_file() -> None:
    examples = [example("b"), example("a"), example("b")]
    assert Classification.labels_of(examples, "a.csv") == ["a", "b"]
    assert Classification.facts_of(examples) == {
        "label_names": {"a": "a类", "b": "b类"},
        "pairs": False,
    }
    assert Classification.facts_of([example("a"), example("b", "山")])["pairs"] is None


@pytest.mark.parametrize(
    ("labels", "complaint"),
    [(["a", "a"], "a.csv 里只有一种标签"), (["1", "2", "1.0"], "a.csv 里 '1' 和 '1.0' 是两个标签")],
)
def test_labels_that_are_none(labels: list[str], complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint):
        Classification.labels_of(list(map(example, labels)), "a.csv")


def test_the_likeliest_label_has_its_probability(
    base_model: Path, tiny_tokenizer: PlugTokenizer
) -> None:
    kind = Classification(tiny_tokenizer, ["a", "b", "c"], source_length=16, pairs=False)
    model = kind.load_model(base_model)
    with torch.no_grad():
        model.classifier.weight.zero_()
        model.classifier.bias.copy_(torch.tensor([0.0, 2.0, 1.0]))
    (found,) = kind.predict(model, [kind.example(["花"])], batch_size=1)
    assert found.label == "b"
    assert found.probability == pytest.approx(float(torch.tensor([0.0, 2.0, 1.0]).softmax(0)[1]))


def test_scores_by_hand(tiny_tokenizer: PlugTokenizer) -> None:
    kind = Classification(tiny_tokenizer, ["好", "坏"], source_length=16)
    answers = [example("好"), example("好"), example("坏"), example("坏")]
    called = [LabelPrediction(label, 0.9) for label in ("好", "坏", "坏", "坏")]
    evaluation = kind.evaluate(answers, called)
    assert evaluation.metrics["accuracy"] == 0.75
    assert evaluation.metrics["macro_f1"] == pytest.approx((2 / 3 + 4 / 5) / 2)
    assert evaluation.metrics["majority"] == 0.5
    assert evaluation.plots[0].key == "图中的编号：0 = 好，1 = 坏。"

"""One label for a text or a pair of texts."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any, NamedTuple

import torch
from torch import Tensor

from plug.errors import UsageError
from plug.evaluation.metrics import confusion_matrix, wilson_interval
from plug.evaluation.report import Evaluation, Table, matrix_plot
from plug.finetuning.kind import (
    SAMPLES,
    Collator,
    Features,
    Kind,
    OnProgress,
    exactly,
    frame,
    run_batches,
)
from plug.finetuning.readers import ClassificationExample
from plug.jsonfiles import shown

MATRIX_LABELS = 20  # a confusion matrix of more labels is a picture only


class LabelPrediction(NamedTuple):
    """The likeliest label and its probability."""

    label: str
    probability: float


class Classification(Kind[ClassificationExample, LabelPrediction]):
    """Reads the encoder's first position; pairs stand as [CLS] a [SEP] b [SEP]."""

    model_class = "PlugForSequenceClassification"
    reads_all = False

    @classmethod
    def labels_of(cls, examples: Sequence[ClassificationExample], source: str) -> list[str]:
        labels = sorted({example.label for example in examples if example.label})
        if len(labels) < 2:
            raise UsageError(f"{source} 里只有一种标签 {shown(labels)}，没有可学的。")
        _check_numbers(labels, source)
        return labels

    @classmethod
    def facts_of(cls, examples: Sequence[ClassificationExample]) -> dict[str, Any]:
        has_two = {example.text_b is not None for example in examples}
        return {
            "label_names": {
                example.label: example.label_name
                for example in examples
                if example.label and example.label_name
            },
            "pairs": has_two.pop() if len(has_two) == 1 else None,
        }

    def check(self, examples: Sequence[ClassificationExample], *, training: bool) -> None:  # noqa: ARG002
        for example in examples:
            if example.label not in self.label_ids:
                raise UsageError(
                    f"{example.place}的标签 {shown(example.label)} 不在标签表里："
                    f"{_few(self.labels)}。"
                )

    def features(self, examples: Sequence[ClassificationExample]) -> list[Features]:
        return [
            {**inputs, "labels": self.label_ids[example.label or ""]}
            for inputs, example in zip(self._inputs(examples), examples, strict=True)
        ]

    def _inputs(self, examples: Sequence[ClassificationExample]) -> list[Features]:
        firsts = self.tokenizer.encode_batch([example.text_a for example in examples])
        seconds = self.tokenizer.encode_batch([example.text_b or "" for example in examples])
        return [
            frame(
                self.tokenizer,
                first,
                None if example.text_b is None else second,
                self.source_length,
            )
            for example, first, second in zip(examples, firsts, seconds, strict=True)
        ]

    def predict(
        self,
        model: Any,
        examples: Sequence[ClassificationExample],
        *,
        batch_size: int,
        on_progress: OnProgress | None = None,
    ) -> list[LabelPrediction]:
        probabilities = self.probabilities(
            model, examples, batch_size=batch_size, on_progress=on_progress
        )
        best = probabilities.max(-1)
        return [
            LabelPrediction(self.labels[index], value)
            for index, value in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]

    def probabilities(
        self,
        model: Any,
        examples: Sequence[ClassificationExample],
        *,
        batch_size: int,
        on_progress: OnProgress | None = None,
    ) -> Tensor:
        """(examples, labels), on the CPU, in the order of the examples and of `labels`."""
        found = torch.empty(len(examples), len(self.labels))
        collate = Collator(self.tokenizer.pad_token_id)
        inputs = self._inputs(examples)
        for indices, output in run_batches(model, inputs, collate, batch_size, on_progress):
            found[indices] = output.logits.float().softmax(-1).cpu()
        return found

    def evaluate(
        self, examples: Sequence[ClassificationExample], predictions: Sequence[LabelPrediction]
    ) -> Evaluation:
        answers = [example.label or "" for example in examples]
        called = [prediction.label for prediction in predictions]
        right = sum(answer == label for answer, label in zip(answers, called, strict=True))
        interval = wilson_interval(right, len(answers))
        matrix = confusion_matrix(answers, called, self.labels)
        rows = [
            self._label_row(label, matrix, index)
            for index, label in enumerate(self.labels)
            if sum(matrix[index]) or any(row[index] for row in matrix)
        ]
        tables = [Table("各标签", ("标签", "例数", "精确率", "召回率", "F1"), rows)]
        if len(self.labels) <= MATRIX_LABELS:
            matrix_rows: list[list[str | int | float]] = [
                [self._named(a), *row] for a, row in zip(self.labels, matrix, strict=True)
            ]
            tables.append(Table("混淆矩阵（行为答案，列为预测）", ("", *self.labels), matrix_rows))
        return Evaluation(
            metrics={
                "accuracy": right / len(answers),
                "accuracy_low": interval.low,
                "accuracy_high": interval.high,
                "majority": max(map(answers.count, set(answers))) / len(answers),
                "macro_f1": fmean(float(row[-1]) for row in rows),
            },
            samples=Table(
                "样例",
                ("文本", "答案", "预测", "概率"),
                [
                    (
                        " ‖ ".join(filter(None, (example.text_a, example.text_b)))[:200],
                        self._named(example.label or ""),
                        self._named(prediction.label),
                        prediction.probability,
                    )
                    for example, prediction in list(zip(examples, predictions, strict=True))[
                        :SAMPLES
                    ]
                ],
            ),
            tables=tables,
            plots=[matrix_plot("confusion", "混淆矩阵", matrix, self.labels)],
        )

    def _label_row(
        self, label: str, matrix: list[list[int]], index: int
    ) -> list[str | int | float]:
        right, answers = matrix[index][index], sum(matrix[index])
        called = sum(row[index] for row in matrix)
        return [
            self._named(label),
            answers,
            right / called if called else 0.0,
            right / answers if answers else 0.0,
            2 * right / (answers + called),
        ]

    def _named(self, label: str) -> str:
        name = self.label_names.get(label)
        return f"{label} {name}" if name else label

    def example(self, parts: Sequence[str]) -> ClassificationExample:
        least, most, meaning = {
            None: (1, 2, "一段文字，或两段"), False: (1, 1, "一段文字"), True: (2, 2, "两段文字")
        }[self.pairs]  # fmt: skip
        return ClassificationExample(
            text_a=exactly(parts, least, most, meaning)[0],
            text_b=parts[1] if len(parts) > 1 else None,
        )

    def record(self, example: ClassificationExample, prediction: LabelPrediction) -> dict[str, Any]:
        texts = {"text": example.text_a}
        if example.text_b is not None:
            texts = {"text_a": example.text_a, "text_b": example.text_b}
        name = self.label_names.get(prediction.label)
        return {
            **texts,
            "label": prediction.label,
            **({"label_name": name} if name else {}),
            "probability": round(prediction.probability, 4),
        }


def _check_numbers(labels: list[str], source: str) -> None:
    """Refuse "1" beside "1.0": two labels by name, surely one by meaning."""
    values: dict[float, str] = {}
    for label in labels:
        try:
            other = values.setdefault(float(label), label)
        except ValueError:
            continue
        if other != label:
            raise UsageError(
                f"{source} 里 {other!r} 和 {label!r} 是两个标签，数值却相同。请统一写法。"
            )


def _few(labels: list[str]) -> str:
    return shown("、".join(labels[:20]))[1:-1] + (
        f" 等 {len(labels)} 个" if len(labels) > 20 else ""
    )

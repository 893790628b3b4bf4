"""A BIO tag for every token, and the entities that they spell."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from plug.errors import UsageError
from plug.evaluation.report import Evaluation, Table, bars_plot
from plug.finetuning.kind import SAMPLES, Collator, Features, Kind, OnProgress, exactly, run_batches
from plug.finetuning.readers import OUTSIDE, LabellingExample
from plug.integrations.transformers import IGNORE_INDEX

Tags = tuple[str, ...]


class Labelling(Kind[LabellingExample, Tags]):
    """Each token is encoded by itself, and its first piece carries its tag.

    A sentence longer than ``source_length`` is read in several windows, one after another.
    """

    model_class = "PlugForTokenClassification"

    def check(self, examples: Sequence[LabellingExample], *, training: bool) -> None:  # noqa: ARG002
        for example in examples:
            tags = example.tags or ()
            if len(tags) != len(example.tokens):
                raise UsageError(
                    f"{example.place}有 {len(example.tokens)} 个词元，却有 {len(tags)} 个标签。"
                )
            if unknown := sorted(set(tags) - self.label_ids.keys()):
                raise UsageError(f"{example.place}的标签 {unknown} 不在标签表里：{self.labels}。")

    def features(self, examples: Sequence[LabellingExample]) -> list[Features]:
        features = []
        for example in examples:
            for first, last, inputs, where in self._windows(example.tokens):
                labels = [IGNORE_INDEX] * len(inputs["input_ids"])
                for position, tag in zip(where, (example.tags or ())[first:last], strict=True):
                    labels[position] = self.label_ids[tag]
                features.append({**inputs, "labels": labels})
        return features

    def _windows(self, tokens: Sequence[str]) -> list[tuple[int, int, Features, list[int]]]:
        """Of each window: its first token, the one after its last, inputs, tokens' positions."""
        room = self.source_length - 2
        pieces = [ids[:room] for ids in self.tokenizer.encode_each(tokens)]
        windows = []
        first = 0
        while first < len(pieces):
            ids, where, last = [self.tokenizer.cls_token_id], [], first
            while last < len(pieces) and len(ids) + len(pieces[last]) <= room + 1:
                where.append(len(ids))
                ids += pieces[last]
                last += 1
            ids.append(self.tokenizer.sep_token_id)
            windows.append((first, last, {"input_ids": ids}, where))
            first = last
        return windows

    def predict(
        self,
        model: Any,
        examples: Sequence[LabellingExample],
        *,
        batch_size: int,
        on_progress: OnProgress | None = None,
    ) -> list[Tags]:
        found = [[""] * len(example.tokens) for example in examples]
        windows = [
            (number, *window)
            for number, example in enumerate(examples)
            for window in self._windows(example.tokens)
        ]
        collate = Collator(self.tokenizer.pad_token_id)
        inputs = [window[3] for window in windows]
        for indices, output in run_batches(model, inputs, collate, batch_size, on_progress):
            for index, best in zip(indices, output.logits.argmax(-1).tolist(), strict=True):
                number, first, last, _, where = windows[index]
                found[number][first:last] = [self.labels[best[position]] for position in where]
        return [tuple(tags) for tags in found]

    def evaluate(
        self, examples: Sequence[LabellingExample], predictions: Sequence[Tags]
    ) -> Evaluation:
        """Entity scores by `seqeval` (CoNLL's: an entity is right if its span and type are)."""
        report = _entity_report([example.tags or () for example in examples], predictions)
        overall = report.pop("micro avg")
        rows: list[list[str | int | float]] = [
            [name, int(row["support"]), row["precision"], row["recall"], row["f1-score"]]
            for name, row in report.items()
            if not name.endswith(" avg")
        ]
        pairs = [
            pair
            for example, tags in zip(examples, predictions, strict=True)
            for pair in zip(example.tags or (), tags, strict=True)
        ]
        return Evaluation(
            metrics={
                "f1": overall["f1-score"],
                "precision": overall["precision"],
                "recall": overall["recall"],
                "token_accuracy": sum(answer == tag for answer, tag in pairs) / len(pairs),
            },
            samples=Table(
                "样例",
                ("文本", "答案", "预测"),
                [
                    ("".join(example.tokens)[:200], _shown(example.tokens, example.tags or ()),
                     _shown(example.tokens, tags))
                    for example, tags in list(zip(examples, predictions, strict=True))[:SAMPLES]
                ],
            ),
            tables=[Table("各类实体", ("类型", "例数", "精确率", "召回率", "F1"), rows)],
            plots=[
                bars_plot(
                    "entities", "各类实体的 F1", {str(row[0]): float(row[-1]) for row in rows}, "F1"
                )
            ],
        )  # fmt: skip

    def example(self, parts: Sequence[str]) -> LabellingExample:
        return LabellingExample(tokens=tuple(exactly(parts, 1, 1, "一段文字")[0]))

    def record(self, example: LabellingExample, prediction: Tags) -> dict[str, Any]:
        entities = [
            {"text": "".join(example.tokens[start:end]), "type": kind, "start": start, "end": end}
            for kind, start, end in entity_spans(prediction)
        ]
        return {"text": "".join(example.tokens), "tags": list(prediction), "entities": entities}


def entity_spans(tags: Sequence[str]) -> list[tuple[str, int, int]]:
    """(type, first token, token after the last) of every entity, as `seqeval` reads BIO tags."""
    entities = _seqeval().sequence_labeling.get_entities(list(tags))
    return [(kind, start, end + 1) for kind, start, end in entities]


def _entity_report(answers: Sequence[Tags], predictions: Sequence[Tags]) -> dict[str, Any]:
    """`seqeval`'s report by type, with "micro avg" for all."""
    if all(tag == OUTSIDE for tags in (*answers, *predictions) for tag in tags):
        nothing = {"precision": 0.0, "recall": 0.0, "f1-score": 0.0, "support": 0.0}
        return {"micro avg": nothing}  # seqeval has no report of no entities
    report = _seqeval().classification_report(
        list(map(list, answers)), list(map(list, predictions)), output_dict=True, zero_division=0
    )
    return {name: {key: float(value) for key, value in row.items()} for name, row in report.items()}


def _seqeval() -> Any:
    try:
        import seqeval.metrics
    except ImportError:
        raise UsageError('实体要用 seqeval。请安装：pip install "plug-zh[train]"') from None
    return seqeval.metrics


def _shown(tokens: Sequence[str], tags: Sequence[str]) -> str:
    return "；".join(
        f"{''.join(tokens[start:end])}（{kind}）" for kind, start, end in entity_spans(tags)
    )

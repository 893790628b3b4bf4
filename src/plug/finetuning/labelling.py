"""A BIO tag for every token, and the entities that they spell."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from plug.errors import UsageError
from plug.evaluation.metrics import entity_scores, entity_spans
from plug.evaluation.report import Evaluation, Table, bars_plot
from plug.finetuning.kind import SAMPLES, Collator, Features, Kind, OnProgress, exactly, run_batches
from plug.finetuning.readers import OUTSIDE, LabellingExample
from plug.jsonfiles import shown
from plug.model.heads import IGNORE_INDEX
from plug.textfiles import trim

Tags = tuple[str, ...]


class Labelling(Kind[LabellingExample, Tags]):
    """Each token is encoded by itself, and its first piece carries its tag.

    Predictions are the likeliest tags that spell entities (`best_paths`). Blanks at the ends of a
    text are outside: the model does not read them. So are those at the ends of an entity.

    A sentence longer than ``source_length`` is read in several windows, one after another.
    """

    model_class = "PlugForTokenClassification"
    by_character = True

    @classmethod
    def labels_of(cls, examples: Sequence[LabellingExample], source: str) -> list[str]:
        """O, and B- and I- of every type: the evaluation file may have tags that this one lacks."""
        types = {tag[2:] for example in examples for tag in example.tags or () if tag != OUTSIDE}
        if not types:
            raise UsageError(f"{source} 里没有一个实体，没有可学的。")
        return sorted({OUTSIDE, *(f"{prefix}-{name}" for name in types for prefix in "BI")})

    @classmethod
    def facts_of(cls, examples: Sequence[LabellingExample]) -> dict[str, Any]:
        return {"tag_scheme": examples[0].scheme}

    def check(self, examples: Sequence[LabellingExample], *, training: bool) -> None:  # noqa: ARG002
        for example in examples:
            tags = example.tags or ()
            if len(tags) != len(example.tokens):
                raise UsageError(
                    f"{example.place}有 {len(example.tokens)} 个词元，却有 {len(tags)} 个标签。"
                )
            if unknown := sorted(set(tags) - self.label_ids.keys()):
                raise UsageError(
                    f"{example.place}的标签 {shown(unknown)} 不在标签表里：{shown(self.labels)}。"
                )

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
        bare = [_without_edges(example.tokens) for example in examples]
        windows = [
            (number, inputs, where)
            for number, example in enumerate(examples)
            for _, _, inputs, where in self._windows(example.tokens[bare[number]])
        ]
        collate = Collator(self.tokenizer.pad_token_id)
        inputs = [window[1] for window in windows]
        paths: list[Tags] = [()] * len(examples)
        counts = Counter(number for number, _, _ in windows)
        scores: dict[int, dict[int, Tensor]] = {}  # by text and window, of texts not yet whole
        whole: dict[int, Tensor] = {}

        def decode() -> None:
            found = best_paths(list(whole.values()), self.labels)
            for (number, own), path in zip(whole.items(), found, strict=True):
                paths[number] = tuple(self.labels[tag] for tag in path[: len(own)])
            whole.clear()

        for indices, output in run_batches(model, inputs, collate, batch_size, on_progress):
            for index, logits in zip(indices, output.logits.float().cpu(), strict=True):
                number, _, where = windows[index]
                parts = scores.setdefault(number, {})
                parts[index] = logits[where].log_softmax(-1)
                if len(parts) == counts[number]:
                    del scores[number]
                    whole[number] = torch.cat([parts[each] for each in sorted(parts)])
            if len(whole) >= batch_size:
                decode()
        if whole:
            decode()
        return [
            (OUTSIDE,) * part.start
            + _with_bare_entities(example.tokens[part], path)
            + (OUTSIDE,) * (len(example.tokens) - part.stop)
            for example, part, path in zip(examples, bare, paths, strict=True)
        ]

    def evaluate(
        self, examples: Sequence[LabellingExample], predictions: Sequence[Tags]
    ) -> Evaluation:
        """Entity scores: an entity is right if its span and its type are."""
        overall, by_kind = entity_scores([example.tags or () for example in examples], predictions)
        rows = [
            (kind, score.support, score.precision, score.recall, score.f1)
            for kind, score in by_kind.items()
        ]
        pairs = [
            pair
            for example, tags in zip(examples, predictions, strict=True)
            for pair in zip(example.tags or (), tags, strict=True)
        ]
        return Evaluation(
            metrics={
                "f1": overall.f1,
                "precision": overall.precision,
                "recall": overall.recall,
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
                    "entities", "各类实体的 F1", {kind: by_kind[kind].f1 for kind in by_kind}, "F1"
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


def _without_edges(tokens: Sequence[str]) -> slice:
    """Where the tokens are that have no blank ones before or behind them."""
    written = [index for index, token in enumerate(tokens) if trim(token)]
    return slice(written[0], written[-1] + 1) if written else slice(0, 0)


def _with_bare_entities(tokens: Sequence[str], tags: Tags) -> Tags:
    """The tags, where blank tokens at the ends of an entity are outside."""
    kept = list(tags)
    for kind, start, end in entity_spans(tags):
        part = _without_edges(tokens[start:end])
        count = part.stop - part.start
        inside = [f"B-{kind}", *[f"I-{kind}"] * (count - 1)][:count]
        after = [OUTSIDE] * (end - start - part.stop)
        kept[start:end] = [OUTSIDE] * part.start + inside + after
    return tuple(kept)


def best_paths(scores: Sequence[Tensor], labels: Sequence[str]) -> list[list[int]]:
    """The likeliest tags of each text of which every I- continues an entity of its type.

    Args:
        scores: of a text (tokens, labels), log-probabilities; texts may differ in length.
        labels: in BIO; an I- whose type has no B- may stand anywhere.

    Returns:
        Of each text indices of labels, at least as many as it has tokens.

    Source: Viterbi 1967, with transitions that are allowed or not; the model has none of its own.
    """
    begins = {label[2:] for label in labels if label.startswith("B-")}
    bound = [label.startswith("I-") and label[2:] in begins for label in labels]
    forbidden = torch.tensor(
        [[b and before[2:] != label[2:] for b, label in zip(bound, labels, strict=True)]
         for before in labels]
    )  # fmt: skip
    padded = pad_sequence(list(scores), batch_first=True)  # zeros: any tag, at no cost
    if not padded.shape[1]:
        return [[] for _ in scores]
    best = padded[:, 0].masked_fill(torch.tensor(bound), -torch.inf)
    came_from = []
    for position in range(1, padded.shape[1]):
        reached = best[:, :, None].masked_fill(forbidden, -torch.inf)
        best, source = reached.max(1)
        best = best + padded[:, position]
        came_from.append(source)
    path = [best.argmax(1)]
    for source in reversed(came_from):
        path.append(source.gather(1, path[-1][:, None])[:, 0])
    return torch.stack(path[::-1], 1).tolist()


def _shown(tokens: Sequence[str], tags: Sequence[str]) -> str:
    return "；".join(
        f"{''.join(tokens[start:end])}（{kind}）" for kind, start, end in entity_spans(tags)
    )

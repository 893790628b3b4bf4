"""Finding the answer to a question in a text."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any, NamedTuple

import torch
from torch import Tensor

from plug.errors import UsageError
from plug.evaluation.metrics import answer_exact_match, answer_f1
from plug.evaluation.report import Evaluation, Table, histogram_plot
from plug.finetuning.kind import SAMPLES, Collator, Features, Kind, OnProgress, exactly, run_batches
from plug.finetuning.readers import QuestionExample

OVERLAP = 128  # tokens that a window of a long context shares with the one before
MAX_QUESTION = 64  # tokens of the question that are read


class Answer(NamedTuple):
    """A stretch of the context, in characters, and its log-probability."""

    text: str
    start: int
    score: float


class Window(NamedTuple):
    """A question and a part of its context, as one input."""

    inputs: Features
    first: int  # position of the context's first token in the input
    where: list[int]  # the character that each token of this part belongs to


class QuestionAnswering(Kind[QuestionExample, Answer]):
    """[CLS] question [SEP] context [SEP], character by character, in windows that overlap.

    A window that does not hold the answer points at [CLS]; an answer is the stretch of at most
    ``target_length`` tokens that is likeliest over all windows.
    """

    model_class = "PlugForQuestionAnswering"

    def check(self, examples: Sequence[QuestionExample], *, training: bool) -> None:
        if training and not any(example.start is not None for example in examples):
            raise UsageError("训练文件里没有一个答案出现在原文中，学不到东西。请检查 answers。")

    def features(self, examples: Sequence[QuestionExample]) -> list[Features]:
        """Examples whose answer does not stand in the context are left out."""
        features = []
        for example in examples:
            if example.start is None:
                continue
            last_character = example.start + len(example.answers[0]) - 1
            for inputs, first, where in self._windows(example):
                start = end = 0  # [CLS]: not here
                if where[0] <= example.start and last_character <= where[-1]:
                    start = first + where.index(example.start)
                    end = first + len(where) - 1 - where[::-1].index(last_character)
                features.append({**inputs, "start_positions": start, "end_positions": end})
        return features

    def _windows(self, example: QuestionExample) -> list[Window]:
        question = self.tokenizer.encode_characters(example.question)[:MAX_QUESTION]
        ids, where = [], []
        for position, pieces in enumerate(self.tokenizer.encode_each(list(example.context))):
            ids += pieces
            where += [position] * len(pieces)
        head = [self.tokenizer.cls_token_id, *question, self.tokenizer.sep_token_id]
        room = self.source_length - len(head) - 1
        if room <= 0:
            raise UsageError(f"source_length={self.source_length} 放不下问题和原文，请加大。")
        windows = []
        for begin in range(
            0, max(1, len(ids) - min(OVERLAP, room // 2)), room - min(OVERLAP, room // 2)
        ):
            part = ids[begin : begin + room]
            inputs = {
                "input_ids": [*head, *part, self.tokenizer.sep_token_id],
                "token_type_ids": [0] * len(head) + [1] * (len(part) + 1),
            }
            windows.append(Window(inputs, len(head), where[begin : begin + room]))
        return windows

    def predict(
        self,
        model: Any,
        examples: Sequence[QuestionExample],
        *,
        batch_size: int,
        on_progress: OnProgress | None = None,
    ) -> list[Answer]:
        best = [Answer("", 0, float("-inf"))] * len(examples)
        windows = [
            (number, window)
            for number, example in enumerate(examples)
            for window in self._windows(example)
        ]
        collate = Collator(self.tokenizer.pad_token_id)
        inputs = [window.inputs for _, window in windows]
        for indices, output in run_batches(model, inputs, collate, batch_size, on_progress):
            starts, ends = (
                logits.log_softmax(-1).cpu()  # at once: a stretch at a time would wait each time
                for logits in (output.start_logits, output.end_logits)
            )
            for row, index in enumerate(indices):
                number, (_, first, where) = windows[index]
                part = slice(first, first + len(where))
                score, start, end = best_span(
                    starts[row, part], ends[row, part], self.target_length
                )
                if score > best[number].score:
                    text = examples[number].context[where[start] : where[end] + 1]
                    best[number] = Answer(text, where[start], score)
        return best

    def evaluate(
        self, examples: Sequence[QuestionExample], predictions: Sequence[Answer]
    ) -> Evaluation:
        pairs = list(zip(examples, predictions, strict=True))
        overlaps = [answer_f1(example.answers, found.text) for example, found in pairs]
        exact = [answer_exact_match(example.answers, found.text) for example, found in pairs]
        return Evaluation(
            metrics={"f1": fmean(overlaps), "exact_match": fmean(exact)},
            samples=Table(
                "样例",
                ("问题", "答案", "预测", "F1"),
                [
                    (example.question, " / ".join(dict.fromkeys(example.answers)), found.text, f1)
                    for (example, found), f1 in list(zip(pairs, overlaps, strict=True))[:SAMPLES]
                ],
            ),
            plots=[histogram_plot("f1", "各例的 F1", overlaps, "F1")],
        )

    def example(self, parts: Sequence[str]) -> QuestionExample:
        question, context = exactly(parts, 2, 2, "问题和原文两段文字")
        return QuestionExample(question=question, context=context)

    def record(self, example: QuestionExample, prediction: Answer) -> dict[str, Any]:
        name = {"id": example.id} if example.id else {}
        return {
            **name,
            "question": example.question,
            "answer": prediction.text,
            "start": prediction.start,
        }


def best_span(starts: Tensor, ends: Tensor, longest: int) -> tuple[float, int, int]:
    """The likeliest stretch: its score, first and last position.

    Args:
        starts: (length,) log-probability that an answer begins here.
        ends: (length,) that it ends here, inclusive.
        longest: positions of a stretch at most.
    """
    allowed = torch.ones(len(starts), len(starts), device=starts.device).triu().tril(longest - 1)
    scores = (starts[:, None] + ends).masked_fill(allowed == 0, -torch.inf)
    index = int(scores.argmax())
    return float(scores.flatten()[index]), index // len(starts), index % len(starts)

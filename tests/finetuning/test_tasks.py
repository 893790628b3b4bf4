"""The table of tasks, and what `read_examples` adds to a reader."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from plug.errors import UsageError
from plug.finetuning.tasks import METRICS, TASKS, find_task, read_examples
from plug.textfiles import Notes


def test_every_task_has_a_kind_with_a_metric_and_labels_that_fit_it() -> None:
    for name, task in TASKS.items():
        assert find_task(name).metric == METRICS[task.kind]
        assert len(set(task.labels)) == len(task.labels)
        if task.kind == "labelling" and task.labels:
            types = {label[2:] for label in task.labels if label != "O"}
            assert {f"{prefix}-{each}" for each in types for prefix in "BI"} < set(task.labels)
        if task.kind in ("reading", "generation"):
            assert task.labels == ()


@pytest.mark.parametrize("name", ["tnew", "", ["tnews"], None])
def test_what_is_no_task(name: object) -> None:
    with pytest.raises(UsageError, match="没有任务"):
        find_task(name)  # type: ignore[arg-type]


def test_what_was_left_out_is_counted_and_logged(
    write_lines: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"sentence1": "甲", "sentence2": "乙", "label": each} for each in ("-", "neutral", "-")]
    path, notes = write_lines("a.json", rows), Notes()
    assert len(read_examples(TASKS["ocnli"], path, answered=True, notes=notes)) == 1
    assert notes.lines() == [f"没有一致标签（“-”）的行没有用：2 处（如 {path} 第 1 行）。"]
    assert caplog.messages == notes.lines()
    assert len(read_examples(TASKS["ocnli"], path, answered=False)) == 3


def test_too_few_examples_and_missing_answers(write_lines: Callable[..., Path]) -> None:
    path = write_lines("a.jsonl", [{"text": "好", "label": "1"}, {"text": "坏"}])
    with pytest.raises(UsageError, match="只有 2 个例子，至少要 3 个"):
        read_examples(TASKS["classification"], path, answered=False, at_least=3)
    with pytest.raises(UsageError, match="第 2 行没有答案（label）"):
        read_examples(TASKS["classification"], path, answered=True)

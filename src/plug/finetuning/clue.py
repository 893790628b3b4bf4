"""CLUE: the score over its classification tasks, and the files that its site takes.

A folder of models holds one directory a task, a folder of data one folder a task, both named as
in `TASKS`: `runs/tnews` is scored on `data/tnews/dev.json`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from plug.errors import UsageError
from plug.files import is_used, new_directory, write_text
from plug.finetuning.predict import Predictor
from plug.finetuning.tasks import TASKS, read_examples

CLUE_TASKS = tuple(name for name, task in TASKS.items() if task.submission)
_TEST_FILES = ("test1.1.json", "test.json")  # TNEWS and CLUEWSC2020 have a test set of CLUE 1.1


@dataclass(frozen=True, slots=True)
class ClueScore:
    """Metrics by task; those without a model are missing."""

    tasks: dict[str, dict[str, float]]

    @property
    def score(self) -> float:
        """The plain mean of the accuracies, as CLUE's."""
        return fmean(metrics["accuracy"] for metrics in self.tasks.values())

    @property
    def missing(self) -> list[str]:
        return [name for name in CLUE_TASKS if name not in self.tasks]


def evaluate_clue(
    models: Path,
    data: Path,
    *,
    batch_size: int = 64,
    device: str | None = None,
    on_task: Callable[[str], None] = lambda name: None,  # noqa: ARG005
) -> ClueScore:
    """Score every task that has a model, on its development set.

    Raises:
        UsageError: no task has a model, or a data file is missing.
    """
    scores = {}
    for name, directory in _task_models(models):
        on_task(name)
        predictor = Predictor(directory, device)
        path = _data_file(data / name, ("dev.json",))
        examples = read_examples(predictor.task, path, answered=True)
        predictor.kind.check(examples, training=False)
        predictions = predictor(examples, batch_size=batch_size)
        scores[name] = predictor.kind.evaluate(examples, predictions).metrics
    return ClueScore(scores)


def write_submission(
    models: Path,
    data: Path,
    submission: Path,
    *,
    batch_size: int = 64,
    device: str | None = None,
    on_task: Callable[[str], None] = lambda name: None,  # noqa: ARG005
) -> list[Path]:
    """For every task that has a model, the file that CLUE's site takes, in the test file's order.

    Source: CLUE's rules for submissions: `{"id": 0, "label": "1"}`, a line an example.

    Raises:
        UsageError: no task has a model, a test file is missing, or ``submission`` is not empty.
    """
    if is_used(submission):
        raise UsageError(f"{submission} 已存在且不为空，不会覆盖。请换一个目录。")
    wanted = [
        (name, directory, _data_file(data / name, _TEST_FILES))
        for name, directory in _task_models(models)
    ]
    written = []
    with new_directory(submission) as temporary:
        for name, directory, path in wanted:
            on_task(name)
            predictor = Predictor(directory, device)
            examples: list[Any] = read_examples(predictor.task, path, answered=False)
            predictions = predictor(examples, batch_size=batch_size)
            lines = [
                json.dumps({"id": index if example.id is None else example.id, "label": it.label})
                for index, (example, it) in enumerate(zip(examples, predictions, strict=True))
            ]
            write_text(temporary / TASKS[name].submission, "\n".join(lines) + "\n")
            written.append(submission / TASKS[name].submission)
    return written


def _task_models(models: Path) -> Iterator[tuple[str, Path]]:
    found = [(name, models / name) for name in CLUE_TASKS if (models / name).is_dir()]
    if not found:
        raise UsageError(
            f"{models} 里没有 CLUE 任务的模型。每个任务一个目录，名为：{'、'.join(CLUE_TASKS)}。"
        )
    yield from found


def _data_file(folder: Path, names: tuple[str, ...]) -> Path:
    for name in names:
        for path in (folder / name, folder / f"{name}.gz"):
            if path.is_file():
                return path
    raise UsageError(f"{folder} 里没有 {' 或 '.join(names)}（也可 .gz）。")

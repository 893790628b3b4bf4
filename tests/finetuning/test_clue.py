"""CLUE's driver: which models and files it takes. Scores and submissions: `tests/cli`."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("transformers")

from plug.errors import UsageError
from plug.finetuning.clue import CLUE_TASKS, ClueScore, evaluate_clue, write_submission


def test_the_score_is_the_mean_of_the_tasks_that_have_a_model() -> None:
    found = ClueScore({"afqmc": {"accuracy": 0.5}, "csl": {"accuracy": 0.75}})
    assert found.score == 0.625
    assert {*found.missing, "afqmc", "csl"} == set(CLUE_TASKS)


def test_what_is_missing_is_told_before_anything_is_written(tmp_path: Path) -> None:
    (tmp_path / "models" / "tnews").mkdir(parents=True)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("")
    with pytest.raises(UsageError, match="没有 CLUE 任务的模型"):
        evaluate_clue(tmp_path, tmp_path)
    with pytest.raises(UsageError, match=r"没有 test1\.1\.json 或 test\.json"):
        write_submission(tmp_path / "models", tmp_path, tmp_path / "new")
    with pytest.raises(UsageError, match="已存在且不为空"):
        write_submission(tmp_path / "models", tmp_path, tmp_path / "full")
    assert not (tmp_path / "new").exists()

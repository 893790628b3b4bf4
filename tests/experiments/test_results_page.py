"""The tables of docs/results.md, and the order of the runs that they are made of."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

EXPERIMENTS = Path(__file__).resolve().parents[2] / "experiments"


def script(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXPERIMENTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


def run(task: str, start: str, seed: int, **metrics: float) -> dict[str, Any]:
    return {
        "task": task,
        "start": start,
        "seed": seed,
        "metrics": metrics,
        "by_epoch": [0.1, 0.2],
        "train_examples": 1000,
        "eval_examples": 50,
        "steps": 7,
        "seconds": 30.0,
        "device": "CPU",
        "torch": "1",
        "transformers": "2",
        "command": f"plug finetune {task} --seed {seed} | x",
    }


RUNS = [
    run("afqmc", "shipped", 1, accuracy=0.72, majority=0.69),
    run("afqmc", "shipped", 2, accuracy=0.70, majority=0.69),
    run("afqmc", "stage1", 1, accuracy=0.66, majority=0.69),
    run("afqmc", "stage1", 2, accuracy=0.67, majority=0.69),
    run("afqmc", "plain", 2, accuracy=0.65, majority=0.69),
    run("afqmc", "plain", 1, accuracy=0.63, majority=0.69),
    run("cluener2020", "random", 1, f1=0.31, precision=0.4, recall=0.25),
    run("cluener2020", "shipped", 1, f1=0.64, precision=0.6, recall=0.7),
    {"task": "tnews", "start": "shipped", "seed": 1, "failed": "no memory"},
]


@pytest.fixture
def page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[list[dict[str, Any]]], str]:
    """The page after the script was run with these lines; run again, it is changed in place."""
    module = script("results_page", monkeypatch)

    def make(lines: list[dict[str, Any]]) -> str:
        results = tmp_path / "results.jsonl"
        results.write_text("".join(json.dumps(line) + "\n" for line in lines))
        words = ["--results", results, "--ablation", results, "--page", tmp_path / "page.md"]
        monkeypatch.setattr("sys.argv", ["results_page", *map(str, words)])
        module.main()
        return (tmp_path / "page.md").read_text(encoding="utf-8")

    return make


def test_means_deviations_aims_and_the_ablation(page: Callable[..., str]) -> None:
    text = page(RUNS)
    # mean 71, deviation sqrt(2) of 72 and 70; mean 66.5, deviation sqrt(0.5)
    row = (
        "| `afqmc` | accuracy | 1,000 / 50 | 69.00 | – | 66.50 ± 0.71 | 71.00 ± 1.41 | 70 reached |"
    )
    assert row in text
    assert "| 31.00 (1 seed) | – | 64.00 (1 seed) | 65 **missed** |" in text
    assert "64.00 ± 1.41 | 66.50 ± 0.71 | +2.50 (+3.00, +2.00) |" in text
    assert "1 of 7 tasks" in text
    assert "tnews" not in text.partition("begin finetune")[2]
    assert "`plug finetune afqmc --seed 1 &#124; x`" in text


def test_the_ablation_compares_at_equal_steps_and_at_equal_time(page: Callable[..., str]) -> None:
    text = page([*RUNS, run("afqmc", "plain-longer", 2, accuracy=0.675, majority=0.69)])
    both = "64.00 ± 1.41 | 67.50 (1 seed) | 66.50 ± 0.71 | +2.50 (+3.00, +2.00) | -0.50 (-0.50) |"
    assert both in text
    table = text.partition("begin finetune")[2].partition("end finetune")[0]
    assert "plain" not in table


def test_what_was_written_by_hand_stays(page: Callable[..., str], tmp_path: Path) -> None:
    text = page(RUNS)
    (tmp_path / "page.md").write_text(text.replace("## Commands", "By hand.\n\n## Commands"))
    again = page([*RUNS, run("afqmc", "shipped", 2, accuracy=0.74, majority=0.69)])
    assert "By hand." in again
    assert "73.00 ± 1.41" in again  # of a run that stands twice, the last counts
    assert "71.00" not in again
    (tmp_path / "page.md").write_text("no marks")
    with pytest.raises(SystemExit, match="0 places for “finetune”"):
        page(RUNS)


def test_nothing_finished_is_no_table(page: Callable[..., str]) -> None:
    with pytest.raises(SystemExit, match="no finished run"):
        page(RUNS[-1:])


def test_runs_come_seed_by_seed_and_starts_may_have_tasks_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = script("finetune_all", monkeypatch)
    for task in ("tnews", "ocnli"):
        (tmp_path / "tasks" / task).mkdir(parents=True)
        for part in ("train.json.gz", "dev.json"):
            (tmp_path / "tasks" / task / part).touch()
    words = (
        f"finetune_all --data {tmp_path}/tasks --folder {tmp_path}/runs --tasks tnews ocnli "
        "--seeds 1 2 --starts shipped random plain=encoder@ocnli --epochs 2 --learning-rate 1e-4"
    )
    monkeypatch.setattr("sys.argv", words.split())
    runs = list(module._runs(*module._arguments()))
    expected = [("tnews", "shipped"), ("tnews", "random")]
    expected += [("ocnli", "shipped"), ("ocnli", "random"), ("ocnli", "plain")]
    assert [run.key for run in runs] == [(*pair, seed) for seed in (1, 2) for pair in expected]
    assert runs[1].command() == (
        "plug finetune tnews --train tasks/tnews/train.json.gz --eval tasks/tnews/dev.json "
        "--output runs/tnews-random-1 --epochs 2.0 --learning-rate 0.0001 --from-scratch"
    )
    assert (runs[4].settings.model, runs[4].settings.from_scratch) == ("encoder", False)


def test_the_longer_encoder_gets_the_time_of_the_full_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """100 steps at 40 tokens a second take as long as 150 at 60; the first rows compiled."""
    module = script("ablation", monkeypatch)
    for name, rate in (("full", 40), ("plain", 60)):
        (tmp_path / name).mkdir()
        rows = [f"{step},{1 if step == 10 else rate}\n" for step in (10, 50, 100)]
        (tmp_path / name / "log.csv").write_text("step,tokens_per_second\n" + "".join(rows))
    arguments = argparse.Namespace(
        folder=tmp_path, corpus=Path("corpus"), config=Path("c.toml"), sets=["steps=100"]
    )
    steps = {
        name: [word for word in module._command(name, arguments) if word.startswith("steps=")]
        for name in module.CHANGES
    }
    assert steps == {"full": ["steps=100"], "plain": ["steps=100"], "plain-longer": ["steps=150"]}

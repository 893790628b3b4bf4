"""`plug finetune`, `predict`, `evaluate TASK`, `evaluate clue` as typed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from plug.finetuning.tasks import TASKS

pytest.importorskip("transformers")

ROWS = [{"sentence": "山上有花", "label": "100"}, {"sentence": "今天天气", "label": "101"}] * 4
TINY = ["--source-length", 32, "--epochs", 1, "--device", "cpu"]


def write(path: Path, rows: list[dict[str, str]]) -> Path:
    path.parent.mkdir(exist_ok=True)
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write(tmp_path / "data" / "dev.json", ROWS)


@pytest.fixture
def tuned(run_plug: Callable, model_directory: Path, data: Path, tmp_path: Path) -> Path:
    output = tmp_path / "runs" / "tnews"
    ran = run_plug(
        *("finetune", "tnews", "--model", model_directory, "--train", data, "--eval", data),
        *("--output", output, *TINY),
    )
    assert (ran.status, f"已写入 {output}" in ran.out) == (0, True), ran.err
    return output


def test_predict_a_text_and_a_file(run_plug: Callable, tuned: Path, tmp_path: Path) -> None:
    one = json.loads(run_plug("predict", "--model", tuned, "山上有花").out)
    assert (one["text"], one["label"] in TASKS["tnews"].labels) == ("山上有花", True)

    (tmp_path / "in.txt").write_text("山上有花\n今天天气\n", encoding="utf-8")
    unlabelled = write(tmp_path / "in.json", [{"sentence": row["sentence"]} for row in ROWS[:2]])
    for file in (tmp_path / "in.txt", unlabelled):
        output = tmp_path / f"{file.name}.out"
        ran = run_plug("predict", "--model", tuned, "--file", file, "--output", output)
        assert ran.status == 0
        first, second = map(json.loads, output.read_text(encoding="utf-8").splitlines())
        assert first["label"] == one["label"]
        assert first["probability"] == pytest.approx(one["probability"], abs=2e-4)
        assert second["text"] == "今天天气"


def test_a_settings_file_with_changes_on_the_command_line(
    run_plug: Callable, model_directory: Path, data: Path, tmp_path: Path
) -> None:
    config = tmp_path / "run.toml"
    config.write_text(
        f'task = "tnews"\ntrain = "{data}"\neval = "{data}"\nmodel = "{model_directory}"\n'
        "source_length = 32\nepochs = 3\nfgm = 0.5\n"
    )
    output = tmp_path / "out"
    ran = run_plug(
        *("finetune", "--config", config, "--output", output, "--epochs", 1),
        *("--set", "fgm=0.25", "--set", "patience=2", "--device", "cpu"),
    )
    assert ran.status == 0, ran.err
    settings = json.loads((output / "finetuning.json").read_text())["settings"]
    found = {
        name: settings[name] for name in ("task", "source_length", "epochs", "fgm", "patience")
    }
    assert found == {
        "task": "tnews", "source_length": 32, "epochs": 1.0, "fgm": 0.25, "patience": 2,
    }  # fmt: skip


def test_evaluate_agrees_with_the_run_and_reports(
    run_plug: Callable, tuned: Path, data: Path, tmp_path: Path
) -> None:
    report = tmp_path / "report"
    command = ("evaluate", "tnews", "--model", tuned, "--data", data)
    ran = run_plug(*command, "--report", report, "--json")
    scores = json.loads(ran.out)
    during = json.loads((tuned / "metrics.json").read_text())
    assert scores.pop("examples") == len(ROWS)
    assert scores == pytest.approx(during)
    assert f"{scores['accuracy']:.4f}" in run_plug(*command).out

    markdown = (report / "report.md").read_text(encoding="utf-8")
    assert f"plug evaluate tnews --model {tuned} --data {data}" in markdown
    assert "| 山上有花 | 100 |" in markdown
    page = (report / "report.html").read_text(encoding="utf-8")
    assert "<td>山上有花</td>" in page
    assert (report / "confusion.png").read_bytes().startswith(b"\x89PNG")


def test_clue_scores_and_submission(
    run_plug: Callable, tuned: Path, data: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "clue"
    (folder / "tnews").mkdir(parents=True)
    shutil.copy(data, folder / "tnews" / "dev.json")
    tests = [{"id": 7, "sentence": "山上有花"}, {"id": 5, "sentence": "今天天气"}]
    write(folder / "tnews" / "test.json", tests)
    command = ("evaluate", "clue", "--models", tuned.parent, "--data", folder)

    report = json.loads(run_plug(*command, "--json").out)
    assert report["score"] == report["tnews"]["accuracy"]
    assert sorted([*report["missing"], "tnews"]) == sorted(
        ["afqmc", "tnews", "iflytek", "cmnli", "ocnli", "cluewsc2020", "csl"]
    )

    submission = tmp_path / "submission"
    assert run_plug(*command, "--submit", submission).status == 0
    (path,) = submission.iterdir()
    assert path.name == "tnews11_predict.json"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["id"] for row in rows] == [7, 5]
    assert {row["label"] for row in rows} <= set(TASKS["tnews"].labels)
    again = run_plug(*command, "--submit", submission)
    assert (again.status, "已存在且不为空" in again.err) == (2, True)


def test_wrong_use_is_one_line(
    run_plug: Callable, tuned: Path, model_directory: Path, data: Path, tmp_path: Path
) -> None:
    same = ("--train", data, "--eval", data, "--output")
    for arguments, complaint in (
        (("finetune", "tnew", *same, tmp_path / "x"), "没有任务 'tnew'"),
        (("finetune", "tnews", *same[:2]), "缺少 --eval、--output"),
        (("finetune", "tnews", *same, "x", "--set", "fgmm=1"), "没有选项 fgmm。是否想用 fgm"),
        (("finetune", "tnews", *same, "x", "--set", "fgm=x"), "fgm='x' 应是一个数"),
        (("finetune", "tnews", *same, tuned), "已有一次完成的训练"),
        (("finetune", "tnews", *same, tmp_path / "x", "--model", "nowhere"), "nowhere"),
        (("predict", "--model", model_directory, "花"), "不是微调过的模型"),
        (("predict", "--model", tuned), "二者选一"),
        (("predict", "--model", tuned, "花", "山"), "要给一段文字，却给了 2 段文字"),
        (("predict", "--model", tuned, " "), "要给一段文字，却有空的"),
        (("predict", "--model", tuned, "--file", data, "--output", "no/x"), "目录不存在"),
        (("predict", "--model", tuned, "--file", data, "--output", data), "已存在，不会覆盖"),
        (("evaluate", "ocnli", "--model", tuned, "--data", data), "没有“sentence1”这一列"),
        (("evaluate", "cmrc2018", "--model", tuned, "--data", data), "不能评测 cmrc2018"),
        (("evaluate", "clue", "--models", data.parent, "--data", data), "没有 CLUE 任务的模型"),
    ):
        ran = run_plug(*arguments)
        assert (ran.status, ran.out, complaint in ran.err) == (2, "", True), ran.err
        assert ran.err.count("\n") == 1

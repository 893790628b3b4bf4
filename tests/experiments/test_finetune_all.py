"""`experiments/finetune_all.py` as it is called: processes that stay up, failures, going on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")

EXPERIMENTS = Path(__file__).resolve().parents[2] / "experiments"
TITLES = [{"sentence": "山上有花", "label": "100"}, {"sentence": "今天天气", "label": "101"}]
PAIR = {"sentence1": "山上有花", "sentence2": "有花", "label": "entailment"}


def write(path: Path, rows: list[dict[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    path.write_text("".join(lines), encoding="utf-8")


@pytest.mark.slow
def test_a_call_does_what_is_missing_and_tells_of_failures(
    model_directory: Path, tmp_path: Path
) -> None:
    """TNEWS is done, OCNLI failed before, AFQMC's labels are wrong."""
    for part in ("train", "dev"):
        write(tmp_path / "tasks" / "tnews" / f"{part}.json", TITLES)
        write(tmp_path / "tasks" / "ocnli" / f"{part}.json", [PAIR, PAIR])
        write(tmp_path / "tasks" / "afqmc" / f"{part}.json", [PAIR, PAIR])
    done = {"task": "tnews", "start": "shipped", "seed": 1}
    write(tmp_path / "runs" / "results.jsonl", [done, done | {"task": "ocnli", "failed": "why"}])
    with (tmp_path / "runs" / "results.jsonl").open("a") as file:
        file.write('{"task": "ocn')  # a call that was killed
    words = (
        f"--data {tmp_path}/tasks --folder {tmp_path}/runs --shipped {model_directory}"
        " --device cpu --tasks tnews ocnli afqmc --starts shipped --seeds 1 --jobs 1"
        " --epochs 1 --epochs-of ocnli=2 --source-length 32"
    )
    ran = subprocess.run(
        [sys.executable, str(EXPERIMENTS / "finetune_all.py"), *words.split()],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    again, failed, last = map(json.loads, ran.stdout.splitlines())
    assert (again["task"], again["steps"], again["metrics"]["majority"]) == ("ocnli", 2, 1.0)
    assert "标签 'entailment' 不在标签表里" in failed["failed"]
    assert last == {"runs": 2, "not_done": 1}
    kept = (tmp_path / "runs" / "results.jsonl").read_text(encoding="utf-8").splitlines()
    assert list(map(json.loads, kept)) == [done, again, failed]
    assert not list((tmp_path / "runs").rglob("*.safetensors"))

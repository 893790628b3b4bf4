"""The benchmark of many cards, with two processes on the CPU in their place."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("psutil")
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.append(str(BENCHMARKS))

import eight_cards  # noqa: E402
import pretrain  # noqa: E402
from eight_cards import compare, main  # noqa: E402
from launching import torchrun  # noqa: E402


def test_texts_that_part_are_told_with_the_lead_they_parted_at() -> None:
    alone: dict[str, object] = {}
    first = {"bf16": {"speed": 1, "ids": [{"ids": [5, 6, 7], "leads": [0.5, 0.1, 0.2]}] * 2}}
    assert compare(first, alone)["bf16"]["equal"] == 2
    assert first == {"bf16": {"speed": 1}}
    second = {"bf16": {"ids": [{"ids": [5, 6, 7], "leads": [9, 9, 9]},
                               {"ids": [5, 8, 9], "leads": [9, 9, 9]}]}}  # fmt: skip
    assert compare(second, alone)["bf16"] == {
        "texts": 2, "equal": 1, "leads_where_they_part": [0.1]
    }  # fmt: skip


@pytest.mark.slow
def test_the_parts_run_with_two_processes(
    run_together: Callable[..., list[Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One part by `torchrun`, the others by processes in which all is imported."""
    run_part = eight_cards.run_part

    def call(command: list[str], *_: object) -> str:
        launcher = torchrun(2)
        assert command[: len(launcher)] == launcher
        run_together(2, "program", command=command[len(launcher) :])
        return ""

    def run_part_here(name: str, command: list[str], limit: float) -> dict[str, Any]:
        if name == "write on 2":
            return run_part(name, command, limit)
        call([*command, "--output", f"{tmp_path}/part.json"])
        return json.loads((tmp_path / "part.json").read_text(encoding="utf-8"))

    monkeypatch.setattr(eight_cards, "run_part", run_part_here)
    monkeypatch.setattr(pretrain, "call", call)
    output = tmp_path / "eight.json"
    parts = ["write", "finetune:full", "pretrain"]
    options = ["--tiny", "--cards", "2", "--parts", *parts, "--batches", "1", "--bits", "16"]
    options += ["--steps", "2", "--limit", "300", "--output", str(output)]
    monkeypatch.setattr("sys.argv", ["eight_cards.py", *options])
    main()

    found = json.loads(output.read_text(encoding="utf-8"))["cards"]["2"]
    assert list(found) == parts
    assert not [part for part in parts if "error" in found[part]], found
    assert found["write"]["ids"]["bf16"]["texts"] == 4
    assert found["finetune:full"]["cards"] == 2
    assert len(found["pretrain"]["seconds"]) == 7

"""`plug classify`, `fill-mask`, `embed` as typed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from plug import traditional


def test_classify(run_plug: Callable, model_directory: Path, tmp_path: Path) -> None:
    command = ("classify", "今天天气", "--labels", "花，山,庙", "--model", model_directory)
    scores = json.loads(run_plug(*command, "--json").out)
    assert {each["label"] for each in scores} == {"花", "山", "庙"}
    assert sum(each["probability"] for each in scores) == pytest.approx(1)
    assert scores[0]["label"] in run_plug(*command).out.splitlines()[0]

    examples = tmp_path / "examples.csv"
    examples.write_text("text,label\n山上,山\n", encoding="utf-8")
    shown = json.loads(run_plug(*command, "--json", "--examples", examples).out)
    assert shown != scores
    examples.write_text("text,label\n山上,水\n", encoding="utf-8")
    ran = run_plug(*command, "--examples", examples)
    assert (ran.status, "第 2 行的标签 '水' 不在 --labels 里" in ran.err) == (2, True)


def test_fill_mask(run_plug: Callable, model_directory: Path) -> None:
    command = ("fill-mask", "今天[MASK]气", "--model", model_directory, "--top-k", 2)
    ((first, second),) = json.loads(run_plug(*command, "--json").out)
    assert first["probability"] >= second["probability"]
    assert run_plug(*command).out.startswith(f"第 1 处：{first['text']} ")


def test_traditional_text_is_converted_on_request(
    run_plug: Callable, model_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(traditional, "to_simplified", lambda text: text.replace("氣", "气"))
    for command, rest in (
        ("embed", ()),
        ("classify", ("--labels", "花,山", "--json")),
        ("fill-mask", ("--json",)),
    ):
        options = (*rest, "--model", model_directory)
        expected = run_plug(command, "今天[MASK]气", *options)
        converted = run_plug(command, "今天[MASK]氣", *options, "--simplify")
        plain = run_plug(command, "今天[MASK]氣", *options)
        assert (converted.status, converted.out == expected.out) == (0, True)
        assert plain.out != expected.out


def test_embed(run_plug: Callable, model_directory: Path, tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_text("花\n山\n", encoding="utf-8")
    options = ("--model", model_directory)
    printed = [
        json.loads(line) for line in run_plug("embed", "花", "山", *options).out.splitlines()
    ]
    run_plug("embed", "--file", tmp_path / "texts.txt", "--output", tmp_path / "v.npy", *options)
    np.testing.assert_allclose(np.load(tmp_path / "v.npy"), printed, atol=1e-6)
    for arguments, complaint in (
        ((), "二者选一"),
        (("花", "--output", tmp_path / "v.npy"), "还不存在的 .npy 文件"),
        (("花", "--output", tmp_path / "none" / "v.npy"), "目录不存在"),
    ):
        ran = run_plug("embed", *arguments, *options)
        assert (ran.status, complaint in ran.err) == (2, True)

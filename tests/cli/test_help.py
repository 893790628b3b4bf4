"""`--help` of every command: whole sentences in any terminal."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import typer
from rich.cells import cell_len

from plug.cli import app
from plug.cli.help import wrap


def commands(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    yield path, command
    for name, each in getattr(command, "commands", {}).items():
        yield from commands(each, (*path, name))


ALL = list(commands(typer.main.get_command(app)))


@pytest.mark.parametrize("columns", [60, 80])
@pytest.mark.parametrize(("path", "command"), ALL, ids=[" ".join(path) for path, _ in ALL])
def test_help_says_each_option_in_whole_sentences(
    path: tuple[str, ...],
    command: Any,
    columns: int,
    run_plug: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))

    ran = run_plug(*path, "--help")

    assert ran.status == 0
    assert max(map(cell_len, ran.out.splitlines())) <= min(columns, 100)
    said = re.sub(r"\s", "", ran.out)
    for parameter in command.params:
        assert re.sub(r"\s", "", parameter.help or "") in said
        assert all(name in ran.out for name in parameter.opts if name.startswith("-"))
    assert not re.search(r"\[(default|required)|Show this|x>=", ran.out)


def test_lines_are_broken_between_characters_and_never_before_punctuation() -> None:
    assert wrap("写满多少个词元后，编码器 out_length 重读。", 10) == [
        "写满多少个",
        "词元后，编",
        "码器",
        "out_length",
        "重读。",
    ]
    assert wrap("一二三四五，六", 10) == ["一二三四", "五，六"]
    assert wrap("", 10) == []


def test_a_default_and_a_limit_are_told_in_chinese(run_plug: Callable[..., Any]) -> None:
    out = run_plug("embed", "-h").out

    assert "（默认 32，不小于 1）" in out
    assert "plug-mini-zh 或模型目录。（默认 plug-mini-zh）" in out

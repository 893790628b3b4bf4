from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable
from typing import NoReturn

import pytest
import typer

import plug
from plug.cli import app
from plug.errors import PlugError
from plug.interrupts import Interrupted

COMMANDS = [
    "generate",
    "convert",
    "quantize",
    "merge",
    "finetune",
    "predict",
    "classify",
    "fill-mask",
    "embed",
    "serve",
    "info",
    "pretrain",
    "evaluate",
]


def test_help_lists_every_command(run_plug: Callable) -> None:
    for arguments in ([], ["--help"], ["-h"]):
        ran = run_plug(*arguments)
        assert ran.status == 0
        assert [name for name in COMMANDS if f" {name} " in ran.out] == COMMANDS
    assert sorted(typer.main.get_command(app).commands) == sorted(COMMANDS)


def test_version(run_plug: Callable) -> None:
    assert run_plug("--version") == (0, f"plug {plug.__version__}\n", "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nope"], "没有命令 nope。用 `plug --help` 看全部命令。"),
        (["pretrain", "nope"], "没有命令 nope。用 `plug --help` 看全部命令。"),
        (["info", "--modle", "mini"], "没有选项 --modle。是否想用 --model？"),
        (["info", "--qqq"], "没有选项 --qqq。加上 `--help` 看全部选项。"),
        (["info", "--model"], "选项 --model 后面要有一个值。"),
        (["info", "--json=3"], "选项 --json 后面不带值。"),
        (["info", "mini"], "多出的参数：mini。带空格的要加引号。"),
        (["info", "--position", "many"], "--position 应是一个整数。"),
        (["info", "--position", "0"], "--position 应不小于 1。"),
        (["generate", "山", "--temperature", "hot"], "--temperature 应是一个数。"),
        (["convert", "--from", "a"], "缺少 --to。加上 `--help` 看用法。"),
        (
            ["convert", "--from", "a", "--to", "b", "--dtype", "int3"],
            "--dtype 不能是 int3，只能是 'float32', 'bfloat16', 'float16'。",
        ),
    ],
)
def test_a_wrong_command_line_is_one_chinese_line_and_status_2(
    run_plug: Callable, arguments: list[str], message: str
) -> None:
    status, out, err = run_plug(*arguments)
    told = err.replace("--position=0 ", "--position ")  # typer before 0.29 gives the value too
    assert (status, out, told) == (2, "", f"错误：{message}\n")


@pytest.mark.parametrize("group", ["pretrain", "evaluate"])
def test_a_group_without_a_command_shows_its_help(run_plug: Callable, group: str) -> None:
    ran = run_plug(group)
    assert ran.status == 2
    assert f"plug {group}" in ran.out
    assert "错误" not in ran.err


def raiser(error: BaseException) -> Callable[..., NoReturn]:
    def fail(*_arguments: object) -> NoReturn:
        raise error

    return fail


def test_the_deepspeed_launcher_adds_an_option_of_its_own(
    run_plug: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = (2, "", "错误：没有选项 --local_rank。加上 `--help` 看全部选项。\n")
    assert run_plug("--local_rank=1", "--version") == wrong  # typed by somebody
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert run_plug("--local_rank=1", "--version").status == 0
    assert run_plug("--local_rank=2", "--version") == wrong


def test_a_failure_is_one_line_and_status_1(
    run_plug: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("plug.cli.info._find_config", raiser(PlugError("磁盘满了。")))
    assert run_plug("info") == (1, "", "错误：磁盘满了。\n")


def test_ctrl_c_is_one_sentence(run_plug: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("plug.cli.info._find_config", raiser(KeyboardInterrupt()))
    assert run_plug("info") == (130, "", "\n已按 Ctrl-C 中断，没有做完。\n")


def test_a_run_that_saved_before_it_ended_says_so(
    run_plug: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = Interrupted("已存到 x。", signal.SIGTERM)
    monkeypatch.setattr("plug.cli.info._find_config", raiser(saved))
    assert run_plug("info") == (143, "", "\n已存到 x。\n")


def test_a_bug_keeps_its_traceback(run_plug: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("plug.cli.info._find_config", raiser(ZeroDivisionError()))
    with pytest.raises(ZeroDivisionError):
        run_plug("info")


@pytest.mark.parametrize("form", [[], ["--json"]])
def test_a_closed_pipe_is_quiet(form: list[str]) -> None:
    command = [sys.executable, "-m", "plug", "info", "--model", "27b", *form]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.close()  # before it can have written
        _, errors = process.communicate()
    assert errors == b""
    assert process.returncode == 1


def test_a_terminal_that_cannot_show_chinese_gets_question_marks() -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "plug", "info", "--model", "27b"],
        env={"PYTHONIOENCODING": "ascii"},
        capture_output=True,
        check=False,
    )
    assert (ran.returncode, ran.stderr) == (0, b"")
    assert b"???" in ran.stdout
    assert b"26,033,484,803" in ran.stdout

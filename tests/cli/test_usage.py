"""What typer says of a wrong command line, in Chinese. `test_main.py` has it as users see it."""

from __future__ import annotations

import pytest

from plug.cli.usage import in_chinese


class Complaint:
    def __init__(self, message: str) -> None:
        self._message = message

    def format_message(self) -> str:
        return self._message


@pytest.mark.parametrize(
    ("message", "sentence"),
    [
        ("Missing command.", "缺少子命令。加上 `--help` 看有哪些。"),
        (
            "No such option: --tpo-k (Possible options: --top-k)",
            "没有选项 --tpo-k。是否想用 --top-k？",
        ),
        ("Missing argument 'TEXT'.", "缺少 TEXT。加上 `--help` 看用法。"),
        ("Got unexpected extra arguments (a b)", "多出的参数：a b。带空格的要加引号。"),
        ("Invalid value for '--top-k': 'x' is not a valid integer.", "--top-k 应是一个整数。"),
        ("Invalid value for '--top-p': 'x' is not a valid float.", "--top-p 应是一个数。"),
        (
            "Invalid value for '--batch-size': 0 is not in the range x>=1.",
            "--batch-size=0 应不小于 1。",
        ),
        (
            "Invalid value for '--bits': 9 is not in the range 4<=x<=8.",
            "--bits=9 应在 4 到 8 之间。",
        ),
        ("something\n  new", "something new"),
    ],
)
def test_each_complaint_is_one_sentence(message: str, sentence: str) -> None:
    assert in_chinese(Complaint(message)) == sentence

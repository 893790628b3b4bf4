"""What typer says about a wrong command line, said in Chinese."""

from __future__ import annotations

import re
from typing import Any

import typer

# typer brings its own copy of click, older versions used click itself; either way this is the
# class that all complaints about the command line are made of.
WrongUsage: type[Exception] = typer.BadParameter.__bases__[0]

_SENTENCES = (  # typer's wording (click's where it differs) -> ours; the rest is passed on as it is
    (r"No such command '(.+?)'\.?.*", r"没有命令 \1。用 `plug --help` 看全部命令。"),
    (r"Missing command\.", "缺少子命令。加上 `--help` 看有哪些。"),
    (r"No such option: (\S+)(?: \(Possible options: (.+)\))", r"没有选项 \1。是否想用 \2？"),
    (r"No such option:? '?([^\s']+?)'?\.?", r"没有选项 \1。加上 `--help` 看全部选项。"),
    (r"Missing (?:argument|option|parameter) '(.+?)'\..*", r"缺少 \1。加上 `--help` 看用法。"),
    (r"Option '(.+?)' requires an argument\.", r"选项 \1 后面要有一个值。"),
    (r"Option '(.+?)' does not take a value\.", r"选项 \1 后面不带值。"),
    (r"Got unexpected extra arguments?(?:\(s\))? \((.+)\)", r"多出的参数：\1。带空格的要加引号。"),
    (r"Invalid value for '(.+?)': .*valid int.*", r"\1 应是一个整数。"),
    (r"Invalid value for '(.+?)': .*valid (?:number|float).*", r"\1 应是一个数。"),
    (
        r"Invalid value for '(.+?)': .*?'?([^\s']*)'? is not one of (.+?)\.",
        r"\1 不能是 \2，只能是 \3。",
    ),
    (r"Invalid value for '(.+?)': .*greater than or equal to (\S+)", r"\1 应不小于 \2。"),
    (r"Invalid value for '(.+?)': .*less than or equal to (\S+)", r"\1 应不大于 \2。"),
    (r"Invalid value for '(.+?)': (.+) is not in the range x>=(\S+)\.", r"\1=\2 应不小于 \3。"),
    (
        r"Invalid value for '(.+?)': (.+) is not in the range (\S+)<=x<=(\S+)\.",
        r"\1=\2 应在 \3 到 \4 之间。",
    ),
    (r"Invalid value for '(.+?)': (.+)", r"\1 的值不对：\2"),
)


def in_chinese(error: Any) -> str:
    """One line for a `WrongUsage`."""
    message = " ".join(error.format_message().split())
    for pattern, sentence in _SENTENCES:
        if match := re.fullmatch(pattern, message):
            return match.expand(sentence)
    return message

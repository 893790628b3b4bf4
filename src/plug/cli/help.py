"""`--help` as it fits any terminal: each option on a line, its help wrapped below it.

typer's own table cuts Chinese sentences short where the terminal has 80 columns or fewer.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from types import MethodType
from typing import Any

from rich.cells import cell_len

_MOST_COLUMNS = 100
_INDENT = 6
# What a line is never broken within: a word of ASCII, or one character; with the punctuation that
# may not end or begin a line.
_UNBREAKABLE = re.compile(r"[（“‘《【]*(?:[!-~]+|\s|[^!-~\s])[，。、；：！？）”’》】…]*")


def use_on(command: Any) -> None:
    """Let a command made by typer, and those below it, show their help in this form."""
    command.format_help = MethodType(_format_help, command)
    for each in getattr(command, "commands", {}).values():
        use_on(each)


def wrap(text: str, width: int) -> list[str]:
    """Return the lines of ``text``, each at most ``width`` columns of a terminal wide."""
    lines, line = [], ""
    for piece in _UNBREAKABLE.findall(" ".join(text.split())):
        if line and cell_len(line + piece.rstrip()) > width:
            lines.append(line.rstrip())
            line = ""
        line += piece if line else piece.lstrip()
    return [*lines, line.rstrip()] if line.strip() else lines


def _format_help(command: Any, context: Any, formatter: Any) -> None:
    width = min(shutil.get_terminal_size().columns, _MOST_COLUMNS)
    lines = wrap(f"用法：{context.command_path} {_usage(command, context)}", width)
    for paragraph in (command.help or "").split("\n\n"):
        lines += ["", *wrap(paragraph, width)]
    for title, rows in sections(command, context):
        lines += ["", f"{title}："]
        # Names of commands are short and stand beside their help, those of options above it.
        column = max(cell_len(name) for name, _ in rows) + 4 if title == "命令" else _INDENT
        for name, text in rows:
            wrapped = [" " * column + line for line in wrap(text, width - column)]
            if title == "命令" and wrapped:
                lines += [f"  {name}".ljust(column) + wrapped[0].lstrip(), *wrapped[1:]]
            else:
                lines += [f"  {name}", *wrapped]
    formatter.write("\n".join(lines) + "\n")


def _usage(command: Any, context: Any) -> str:
    words = ["[选项]"]
    for parameter in command.get_params(context):
        if parameter.param_type_name == "argument":
            name = _argument_name(parameter)
            words.append(name if parameter.required else f"[{name}]")
    return " ".join([*words, "命令 …"] if hasattr(command, "commands") else words)


def sections(command: Any, context: Any) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    kinds: dict[str, list[tuple[str, str]]] = {"argument": [], "option": []}
    for parameter in command.get_params(context):
        if (record := parameter.get_help_record(context)) is not None:  # else it is hidden
            kinds[parameter.param_type_name].append(_translated(*record))
    if kinds["argument"]:
        yield "参数", kinds["argument"]
    if hasattr(command, "commands"):
        below = command.commands.items()
        yield "命令", [(name, (each.help or "").split("\n\n")[0]) for name, each in below]
    yield "选项", kinds["option"]


def _argument_name(parameter: Any) -> str:
    name = parameter.metavar or str(parameter.name)
    return name + (" …" if parameter.nargs != 1 else "")


def _translated(names: str, text: str) -> tuple[str, str]:
    """What typer says of an option, in Chinese."""
    if "--help" in names:
        return "-h, --help", "显示这段说明。"
    for pattern, replacement in _NAMES:
        names = re.sub(pattern, replacement, names)
    if match := re.fullmatch(r"(.*?) *\[([^\[\]]*)\]", text, re.DOTALL):
        facts = [
            re.sub(pattern, replacement, fact.strip())
            for fact in match[2].split(";")
            for pattern, replacement in _FACTS
            if re.fullmatch(pattern, fact.strip())
        ]
        if facts:
            text = f"{match[1]}（{'，'.join(facts)}）"
    return names, text


_NAMES = (
    (r" <list\[(\w+)\]>", r" <\1>"),
    (r" <(\w+) range>", r" <\1>"),
    (r" <str>", " <文字>"),
    (r" <int>", " <整数>"),
    (r" <float>", " <数>"),
    (r" <path>", " <路径>"),
    (r" <Path>", " <路径>"),
)
_FACTS = (
    (r"default: (.+)", r"默认 \1"),
    (r"required", "必填"),
    (r"x>=(\S+)", r"不小于 \1"),
    (r"x<=(\S+)", r"不大于 \1"),
    (r"(\S+)<=x<=(\S+)", r"\1 到 \2"),
)

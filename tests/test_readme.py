"""What both READMEs promise: the same commands, with options and files that exist."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path

import pytest
import typer

import plug
from plug.cli import app

ROOT = Path(__file__).resolve().parents[1]
READMES = ["README.md", "README.zh-CN.md"]


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(name: str, language: str) -> list[str]:
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", read(name), re.MULTILINE | re.DOTALL)
    return [block for named, block in fenced if named == language]


def commands(name: str) -> list[str]:
    """Every line of shell, its comment and the spaces before it cut off."""
    lines = "".join(blocks(name, "sh")).splitlines()
    return [re.sub(r"\s+#.*", "", line) for line in lines]


def test_both_give_the_same_commands_and_code() -> None:
    assert commands(READMES[0]) == commands(READMES[1])
    code = [[ast.dump(ast.parse(block)) for block in blocks(name, "python")] for name in READMES]
    assert code[0] == code[1] != []


@pytest.mark.parametrize("command", [line for line in commands(READMES[0]) if "plug " in line])
def test_a_command_has_the_options_it_is_given(command: str) -> None:
    words = shlex.split(command)
    words = words[len(words) - words[::-1].index("plug") :]  # after the last "plug"
    node = typer.main.get_command(app)
    while hasattr(node, "commands"):
        node = node.commands[words.pop(0)]
    known = {option for parameter in node.params for option in parameter.opts}
    assert {word for word in words if word.startswith("-")} <= known


@pytest.mark.parametrize("name", READMES)
def test_a_readme_is_read_in_a_few_minutes(name: str) -> None:
    assert len(read(name).splitlines()) <= 150


@pytest.mark.parametrize("name", READMES)
def test_linked_and_named_files_exist(name: str) -> None:
    text = read(name)
    linked = re.findall(r"\]\(([^)#:]+)\)", text)
    named = re.findall(r"configs/[\w-]+\.toml", text)
    missing = [path for path in [*linked, *named] if not (ROOT / path).exists()]
    assert missing == []


def test_the_picture_of_the_house_names_every_module() -> None:
    (tree,) = (block for block in blocks("docs/architecture.md", "") if block.startswith("src/"))
    folders, listed = [""], set()
    for line in tree.splitlines():
        indent, entry = re.match(r"( *)(\S+)", line).groups()
        depth = len(indent) // 2
        path = folders[depth] + entry
        if entry.endswith("/"):
            folders[depth + 1 :] = [path]
        else:
            listed.add(path)
    package = ROOT / "src" / "plug"
    sources = [path for path in package.rglob("*") if path.suffix in (".py", ".cu", ".cpp", ".h")]
    files = {str(path.relative_to(ROOT)) for path in sources}
    commands = {path for path in files if "/cli/" in path and not path.endswith("usage.py")}
    unnamed = {path for path in files if path.endswith(("__init__.py", "__main__.py"))}
    unnamed.discard("src/plug/__init__.py")
    assert listed == files - unnamed - commands


def test_python_names_of_the_readme_exist() -> None:
    for block in blocks(READMES[0], "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "plug":
                assert hasattr(plug, node.attr)

"""The rooms of `src/plug`, from the top of the house to the ground: imports go down, never up."""

from __future__ import annotations

import ast
import graphlib
from pathlib import Path

import pytest

import plug

ROOT = Path(plug.__file__).parent
# Rooms on one line may import each other's files, without circles.
LINES = (
    ("cli", "__main__"),
    ("integrations",),
    ("serving",),
    ("pretraining",),
    ("finetuning",),
    ("zero_shot",),
    ("evaluation",),
    ("generation",),
    ("hf",),
    ("loading",),
    ("distributed",),
    ("quantization", "kernels"),
    ("checkpoints",),
    ("model",),
    (
        "tokenization",
        "options",
        "shipped",
        "traditional",
        "interrupts",
        "textfiles",
        "tokenizer_files",
        "jsonfiles",
        "files",
        "progress",
        "device",
        "errors",
    ),
)
LEVELS = {room: level for level, rooms in enumerate(LINES) for room in rooms}


def _modules() -> dict[str, Path]:
    """Every module of the package but its front door, by its dotted name without `plug.`."""
    names = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if name:
            names[name] = path
    return names


MODULES = _modules()


def _imports(path: Path) -> set[str]:
    """The modules of ours that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide where a name lives"
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                is_module = name.removeprefix("plug.") in MODULES
                found.add(name if is_module else node.module or "")
    return {x.removeprefix("plug.") for x in found if x.removeprefix("plug.") in MODULES}


IMPORTS = {name: _imports(path) for name, path in MODULES.items()}


def test_every_room_has_its_place() -> None:
    assert {name.split(".")[0] for name in MODULES} <= LEVELS.keys()


@pytest.mark.parametrize("name", MODULES)
def test_imports_go_down(name: str) -> None:
    level = LEVELS[name.split(".")[0]]
    rooms = {imported.split(".")[0] for imported in IMPORTS[name]}

    assert {room for room in rooms if LEVELS[room] < level} == set()


def test_no_imports_run_in_a_circle() -> None:
    graph = {name: imported - {name} for name, imported in IMPORTS.items()}

    list(graphlib.TopologicalSorter(graph).static_order())  # raises a CycleError that names it

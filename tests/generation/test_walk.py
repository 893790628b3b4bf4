"""How far it is from a text to the matrix product; `docs/architecture.md` has the walk.

A file is entered where a function of it runs during the call; what runs while a module is imported
does not count. Lines are all of the file.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import FrameType
from typing import Any

import plug
from plug.generation.generator import Generator
from plug.generation.plain_model import PlainModel
from plug.model.plug import Plug

SOURCE = str(Path(plug.__file__).parent)
MOST_CALLS, MOST_FILES, MOST_LINES = 6, 20, 4500
CODE_OF_A_FUNCTION = 1  # inspect.CO_OPTIMIZED; class bodies and modules lack it


def names_on_stack(frame: FrameType | None) -> list[str]:
    names = []
    while frame is not None:
        if frame.f_code.co_filename.startswith(SOURCE):
            names.append(Path(frame.f_code.co_filename).name)
        frame = frame.f_back
    return names[::-1]


def test_a_prompt_enters_few_files_and_reaches_the_product_in_few_calls(
    generator: Generator, lively_model: Plug
) -> None:
    generator.prepared.model = PlainModel(lively_model)  # `CpuModel` has one call for a whole step
    entered: set[str] = set()
    walks: list[list[str]] = []

    def watch(frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        if event != "call" or not code.co_filename.startswith(SOURCE):
            return
        if code.co_flags & CODE_OF_A_FUNCTION:
            entered.add(code.co_filename)
        if code.co_filename.endswith("products.py"):
            walks.append(names_on_stack(frame))

    generator("山上", out_length=2)
    sys.setprofile(watch)
    try:
        generator("山上", out_length=2)
    finally:
        sys.setprofile(None)

    calls = [walk[::-1].index("generator.py") for walk in walks]  # after the last in this file
    assert max(calls) <= MOST_CALLS
    assert len(entered) <= MOST_FILES
    assert sum(len(Path(file).read_text().splitlines()) for file in entered) <= MOST_LINES

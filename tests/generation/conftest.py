"""Models that write: a lively random one, the golden one, and one that follows a script."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from plug.checkpoints.original import import_original
from plug.generation.generator import Generator
from plug.generation.model_runner import Engine
from plug.loading.load import load
from plug.model.configuration import PlugConfig
from plug.model.plug import Plug
from plug.tokenization import PlugTokenizer


@pytest.fixture
def lively_model(config: PlugConfig, lively: Callable[[PlugConfig], Plug]) -> Plug:
    return lively(config)


@pytest.fixture
def generator(lively_model: Plug, tiny_tokenizer: PlugTokenizer) -> Generator:
    return Generator(lively_model, tiny_tokenizer)


@pytest.fixture(scope="session")
def original_tokenizer(shared_data: Path) -> PlugTokenizer:
    return PlugTokenizer.from_vocabulary_file(shared_data / "vocab" / "bert-chinese-vocab.txt")


@pytest.fixture(scope="session")
def golden_model(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Plug:
    directory = tmp_path_factory.mktemp("plug-tiny") / "model"
    import_original(golden / "checkpoints" / "mp2", directory)
    return load(directory)


@pytest.fixture(scope="session")
def golden_engine(golden_model: Plug) -> Engine:
    return Engine(golden_model)


@pytest.fixture(scope="session")
def golden_json(golden: Path) -> Callable[[str], Any]:
    """Reads a file of the golden folder."""
    return lambda name: json.loads((golden / name).read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def scripted_engine() -> type[ScriptedEngine]:
    return ScriptedEngine


class ScriptedEngine:
    """An engine without a model, for tests of the loops: it says what it is told.

    At step i, row r (numbered as at the start) gets ``scripts[r][i]`` as its likeliest token,
    whatever is read.
    """

    device = torch.device("cpu")

    def __init__(self, config: PlugConfig, scripts: Sequence[Sequence[int]]) -> None:
        self.config = config
        self.scripts = scripts
        self.order = list(range(len(scripts)))  # the script of each row
        self.next_rows: list[int] | None = None  # those that read at the second encoding
        self.moves = 0
        self.steps = 0
        self.windows: list[list[list[int]]] = []  # the sources of each encoding
        self.window_first_step: list[int] = []
        self.fed: list[tuple[list[int], list[int]]] = []

    def open(self, rows: int, source_length: int, capacity: int) -> int:
        assert rows == len(self.scripts)
        self.source_length, self.capacity = source_length, capacity
        return 1

    def rounded(self, rows: int) -> int:
        return rows

    def read(self, rows: Sequence[int], sources: Sequence[Sequence[int]]) -> None:
        assert max(rows) < len(self.scripts)
        assert max(map(len, sources)) <= self.source_length
        if self.windows and self.next_rows is not None:
            self.order = self.next_rows
        self.windows.append([list(source) for source in sources])
        self.window_first_step.append(self.steps)

    def decode(self, token_ids: Tensor, positions: Tensor, length: int) -> Tensor:
        assert max(positions) < length <= self.capacity
        self.fed.append((token_ids.tolist(), positions.tolist()))
        logits = torch.zeros(len(token_ids), self.config.vocab_size)
        for row in range(len(token_ids)):
            logits[row, self.scripts[self.order[row]][self.steps]] = 1
        self.steps += 1
        return logits

    def replay(self, _key: object, step: Callable[[], Tensor], _length: int, _rows: int) -> Tensor:
        return step()

    def move(self, source: int, target: int, length: int) -> None:
        assert length <= self.capacity
        self.moves += 1
        self.order[target] = self.order[source]

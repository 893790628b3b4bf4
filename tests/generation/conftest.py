"""A small tokenizer of our own kind, the original's, and what writes with each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from plug.checkpoints.original import import_original
from plug.checkpoints.store import load
from plug.generation.engine import Engine
from plug.generation.generate import Generator
from plug.model.plug import Plug
from plug.tokenization import BYTE_TOKENS, SPECIAL_TOKENS, PlugTokenizer

PIECES = "山上有一座庙，里老和尚在讲故事。\n"  # the rest of the world is bytes


@pytest.fixture(scope="session")
def tokenizer() -> PlugTokenizer:
    pieces = [*SPECIAL_TOKENS.values(), *BYTE_TOKENS, *PIECES]
    return PlugTokenizer.from_pieces({piece: index for index, piece in enumerate(pieces)}, [])


@pytest.fixture
def generator(tiny_model: Plug, tokenizer: PlugTokenizer) -> Generator:
    return Generator(tiny_model, tokenizer)


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


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))

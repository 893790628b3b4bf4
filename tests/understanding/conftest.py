from __future__ import annotations

import pytest

from plug.model.plug import Plug
from plug.tokenization import PlugTokenizer
from plug.understanding.reader import TextReader


@pytest.fixture
def reader(tiny_model: Plug, tiny_tokenizer: PlugTokenizer) -> TextReader:
    return TextReader(tiny_model, tiny_tokenizer)

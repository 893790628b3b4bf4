from __future__ import annotations

import pytest

from plug.model.plug import Plug
from plug.tokenization import PlugTokenizer
from plug.zero_shot.encoder import TextEncoder


@pytest.fixture
def encoder(tiny_model: Plug, tiny_tokenizer: PlugTokenizer) -> TextEncoder:
    return TextEncoder(tiny_model, tiny_tokenizer)

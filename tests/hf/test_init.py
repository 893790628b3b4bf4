"""The Auto classes, and the documentation that names them."""

from __future__ import annotations

import importlib
import re
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import plug
from plug.errors import PlugError
from plug.loading.save import save
from plug.model.plug import Plug
from plug.tokenization import PlugTokenizer

transformers = pytest.importorskip("transformers")

from transformers import (  # noqa: E402
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForPreTraining,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from plug import (  # noqa: E402
    PlugForConditionalGeneration,
    PlugForMaskedLM,
    PlugForPreTraining,
    PlugForSequenceClassification,
    PlugForTokenClassification,
    PlugModel,
)


@pytest.mark.parametrize(
    ("auto_class", "model_class"),
    [
        (AutoModel, PlugModel),
        (AutoModelForPreTraining, PlugForPreTraining),
        (AutoModelForSeq2SeqLM, PlugForConditionalGeneration),
        (AutoModelForMaskedLM, PlugForMaskedLM),
        (AutoModelForSequenceClassification, PlugForSequenceClassification),
        (AutoModelForTokenClassification, PlugForTokenClassification),
    ],
)
def test_auto_classes_find_ours(
    auto_class: type[Any],
    model_class: type[Any],
    directory: Path,
    plug_model: Plug,
    assert_same_weights: Callable[..., None],
) -> None:
    model = auto_class.from_pretrained(directory)

    assert type(model) is model_class
    assert_same_weights(model.encoder, plug_model.encoder)
    assert model.get_input_embeddings() is model.embeddings.word_embeddings


def test_without_transformers_the_message_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, "plug.hf")

    with pytest.raises(PlugError, match=r"plug-zh\[train\]"):
        importlib.import_module("plug").PlugForPreTraining  # noqa: B018


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set:UserWarning")  # no GPU here
def test_the_snippets_of_the_documentation_run(
    plug_model: Plug, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, byte_pieces: PlugTokenizer
) -> None:
    save(plug_model, tmp_path / "plug-mini-zh", tokenizer=byte_pieces)
    monkeypatch.setattr("plug.checkpoints.directory.SHIPPED_DIRECTORY", tmp_path / "plug-mini-zh")
    monkeypatch.chdir(tmp_path)
    yours = types.ModuleType("datasets_of_yours")
    yours.pairs = [{"source": "春天", "target": "来"}] * 4  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets_of_yours", yours)
    text = (Path(__file__).parents[2] / "docs/transformers.md").read_text(encoding="utf-8")
    snippets = re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)

    names: dict[str, Any] = {}
    for snippet in snippets:
        exec(snippet, names)

    assert len(snippets) == 4
    assert names["output"].losses.keys() == {"lm", "mlm", "sentence"}
    assert names["tokenizer"].mask_token_id in names["ids"]
    assert PlugTokenizer.load("runs/tuned").encode("春天") == byte_pieces.encode("春天")
    assert plug.load("runs/tuned").config == plug_model.config

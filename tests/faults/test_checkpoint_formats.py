"""Damaged checkpoint files are refused with a sentence, or read as what they say.

The bounded version of `checkpoint_formats.py`; docs/reliability.md has the long one's table.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from campaign import LOADED, REFUSED
from checkpoint_formats import Format, formats, run

from plug.errors import PlugError
from plug.loading.load import load
from plug.tokenization import PlugTokenizer

COUNT = 60


@pytest.fixture(scope="module")
def every_format(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Format]:
    return formats(tmp_path_factory.mktemp("formats"))


@pytest.mark.parametrize(
    "name",
    [
        "model.safetensors",
        "model.safetensors.index.json",
        "config.json",
        "tokenizer.json",
        "vocab.txt",
        "mp_rank_00_model_states.pt",
        "training_state.pt",
    ],
)
def test_damaged_files_are_refused_or_read_as_what_they_say(
    name: str, every_format: dict[str, Format]
) -> None:
    counts = run(every_format[name], 2, COUNT)

    assert counts.faults == []
    assert counts[LOADED] + counts[REFUSED] == COUNT
    assert counts[REFUSED] > COUNT // 4


@pytest.mark.parametrize("kind", [os.mkfifo, lambda path: path.symlink_to("/dev/zero")])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_pipes_and_devices_are_refused(
    name: str, kind: Callable[[Path], None], model_directory: Path
) -> None:
    (model_directory / name).unlink()
    kind(model_directory / name)

    read = PlugTokenizer.load if name == "tokenizer.json" else load
    with pytest.raises(PlugError) as caught:
        read(model_directory)

    assert "\n" not in str(caught.value)
    assert name in str(caught.value)


@pytest.mark.parametrize("size", ["num_hidden_layers", "hidden_size", "vocab_size"])
def test_a_size_beyond_any_model_is_refused_at_once(size: str, model_directory: Path) -> None:
    """Building so many layers would take hours, and so many values more memory than there is."""
    path = model_directory / "config.json"
    text = path.read_text(encoding="utf-8").replace(f'"{size}": ', f'"{size}": 99999999')
    path.write_text(text, encoding="utf-8")

    with pytest.raises(PlugError, match=f"{size}.*太大"):
        load(model_directory)

"""Every command refuses weights that are no numbers: one sentence, the tensor's name, status 1."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch

import plug

TENSOR = "encoder.layers.1.feed_forward.fc1.weight"


@pytest.fixture
def spoilt(model_directory: Path) -> Path:
    file = model_directory / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    tensors[TENSOR][0, 0] = float("nan")
    safetensors.torch.save_file(tensors, file)
    return model_directory


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate", "今天", "--model", "MODEL", "--device", "cpu"],
        ["classify", "今天", "--labels", "好,坏", "--model", "MODEL", "--device", "cpu"],
        ["fill-mask", "今[MASK]", "--model", "MODEL", "--device", "cpu"],
        ["embed", "今天", "--model", "MODEL", "--device", "cpu"],
        ["evaluate", "lm", "--model", "MODEL", "--text", "TEXT", "--device", "cpu"],
        ["quantize", "--model", "MODEL", "--to", "OUT", "--bits", "8"],
        ["convert", "--from", "MODEL", "--to", "OUT", "--to-original", "2"],
        ["convert", "--from", "MODEL", "--to", "OUT", "--to-modelscope"],
    ],
    ids=lambda arguments: " ".join(each for each in arguments if each.islower())[:40],
)
def test_every_command_refuses_them(
    arguments: list[str], spoilt: Path, tmp_path: Path, run_plug: Callable
) -> None:
    (tmp_path / "TEXT").mkdir()
    (tmp_path / "TEXT/a.txt").write_text("今天天气很好，我们去公园看花。\n" * 20, encoding="utf-8")
    places = {"MODEL": spoilt, "TEXT": tmp_path / "TEXT", "OUT": tmp_path / "OUT"}

    ran = run_plug(*(places.get(each, each) for each in arguments))

    assert ran.status == 1, ran
    assert ran.out == ""
    assert TENSOR in ran.err
    assert "NaN" in ran.err
    assert not (tmp_path / "OUT" / "config.json").exists()


def test_the_classes_for_transformers_refuse_them(spoilt: Path) -> None:
    pytest.importorskip("transformers")

    with pytest.raises(plug.PlugError, match=TENSOR):  # `plug finetune` loads by these
        plug.PlugForSequenceClassification.from_pretrained(spoilt)

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


@pytest.fixture
def overflowing(model_directory: Path) -> Path:
    """Every weight is a number, but what the model computes is none."""
    file = model_directory / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    for name in tensors:
        if "fc" in name:
            tensors[name] = tensors[name].sign() * 3e37
    safetensors.torch.save_file(tensors, file)
    return model_directory


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate", "今天"],
        ["generate", "今天", "--num-beams", "2", "--out-length", "3"],
        ["classify", "今天", "--labels", "好,坏"],
        ["classify", "今天", "--labels", "好,坏", "--method", "mlm"],
        ["fill-mask", "今[MASK]"],
        ["embed", "今天"],
        ["evaluate", "lm", "--text", "TEXT", "--json"],
    ],
    ids=" ".join,
)
def test_outputs_that_are_no_numbers_are_no_answer(
    arguments: list[str], overflowing: Path, tmp_path: Path, run_plug: Callable
) -> None:
    text = tmp_path / "a.txt"
    text.write_text("今天天气很好，我们去公园看花。\n" * 20, encoding="utf-8")
    given = [text if each == "TEXT" else each for each in arguments]

    ran = run_plug(*given, "--model", overflowing, "--device", "cpu")

    assert ran.status in (1, 2), ran
    assert ran.out == ""
    assert "NaN" in ran.err or "不是数" in ran.err

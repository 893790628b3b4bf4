from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

pytest.importorskip("transformers")

from plug.errors import PlugError
from plug.finetuning.kind import make_kind
from plug.finetuning.plain import load_plain
from plug.loading.load import load
from plug.tokenization import PlugTokenizer

CPU = torch.device("cpu")
PARTS = [["今天天气很好"], ["山上有座庙，花"], ["花"]]


@pytest.mark.parametrize(
    ("name", "labels", "parts"),
    [
        ("classification", ["花", "山", "庙"], PARTS),
        ("labelling", ["O", "B-X", "I-X"], PARTS),
        ("reading", [], [["花？", "公园看花，今天天气很好"], ["山", "山上有座庙"]]),
        ("generation", [], [["花", "公园看花"], ["山"]]),
    ],
)
def test_predictions_are_those_of_the_classes_for_transformers(
    name: Any,
    labels: list[str],
    parts: list[list[str]],
    model_directory: Path,
    tiny_tokenizer: PlugTokenizer,
    tmp_path: Path,
) -> None:
    torch.manual_seed(1)
    kind = make_kind(name, tiny_tokenizer, labels, source_length=32, target_length=6)
    model = kind.load_model(model_directory)
    model.save_pretrained(tmp_path / "tuned")
    examples = [kind.example(each) for each in parts]

    plain = load_plain(kind, tmp_path / "tuned", CPU)

    expected = kind.predict(model, examples, batch_size=2)
    assert kind.predict(plain, examples, batch_size=2) == expected


def test_a_directory_without_the_head_is_refused(
    model_directory: Path, tiny_tokenizer: PlugTokenizer
) -> None:
    kind = make_kind("classification", tiny_tokenizer, ["花", "山"], source_length=32)

    with pytest.raises(PlugError, match=r"缺少 2 个张量：classifier\.bias"):
        load_plain(kind, model_directory, CPU)


def test_a_head_of_another_width_is_the_adapter_s_fault(
    model_directory: Path, tiny_tokenizer: PlugTokenizer, tmp_path: Path
) -> None:
    kind = make_kind("classification", tiny_tokenizer, ["花", "山"], source_length=32)
    hidden = load(model_directory).config.hidden_size
    layer = "encoder.layers.0.attention.q_proj"
    tensors = {
        f"{layer}.lora_A.weight": torch.zeros(2, hidden),
        f"{layer}.lora_B.weight": torch.zeros(hidden, 2),
        "classifier.weight": torch.zeros(2, 2 * hidden),
        "classifier.bias": torch.zeros(2),
    }
    named = {f"base_model.model.{name}": tensor for name, tensor in tensors.items()}
    save_file(named, tmp_path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))

    with pytest.raises(PlugError, match=rf"{tmp_path.name} 与模型不符.*classifier\.weight 是"):
        load_plain(kind, model_directory, CPU, tmp_path)

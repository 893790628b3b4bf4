"""Adapters at work without peft, beside peft."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from plug.errors import PlugError, UsageError
from plug.generation.generator import Generator
from plug.loading.adapters import AdaptedLinear, fingerprint, has_adapters, read_adapter
from plug.loading.load import load
from plug.loading.save import save
from plug.model.configuration import PRESETS, PlugConfig
from plug.model.plug import Plug
from plug.quantization.convert import quantize_directory
from plug.tokenization import PlugTokenizer

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")

WIDE = dataclasses.replace(PRESETS["test"], hidden_size=128, intermediate_size=256)
IDS = torch.tensor([[2, 9, 8, 7, 3], [2, 30, 31, 3, 3]])


@pytest.fixture
def base(
    make_model: Callable[[PlugConfig], Plug], tiny_tokenizer: PlugTokenizer, tmp_path: Path
) -> Path:
    save(make_model(WIDE), tmp_path / "base", tokenizer=tiny_tokenizer)
    return tmp_path / "base"


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., tuple[Any, Path]]:
    """`make(base, **options)`: an adapted model of peft that changes outputs, and its directory."""

    def adapter(base: Path, **options: Any) -> tuple[Any, Path]:
        from plug.hf import PlugForConditionalGeneration
        from plug.hf.adapters import TARGET_MODULES

        torch.manual_seed(1)
        words = {"r": 3, "target_modules": TARGET_MODULES, "task_type": "SEQ_2_SEQ_LM"} | options
        model = PlugForConditionalGeneration.from_pretrained(base, dtype=torch.float32)
        adapted = peft.get_peft_model(model, peft.LoraConfig(**words)).eval()
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.05)
                elif "magnitude" in name:
                    parameter *= 1.3
        adapted.save_pretrained(tmp_path / "adapter")
        return adapted, tmp_path / "adapter"

    return adapter


@torch.inference_mode()
def logits(model: Plug) -> torch.Tensor:
    encoded = model.encode(IDS)
    return model.lm_logits(model.decode(IDS[:, :3], encoded))


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    "options", [{}, {"use_rslora": True, "lora_alpha": 5}, {"use_dora": True}], ids=str
)
@pytest.mark.parametrize("bits", [None, 8, 4])
def test_outputs_are_those_of_peft(
    bits: int | None, options: dict[str, Any], base: Path, make: Any, tmp_path: Path
) -> None:
    if bits is not None:
        quantize_directory(base, tmp_path / "small", bits=bits)
        base = tmp_path / "small"
    adapted, directory = make(base, **options)

    model = load(base, adapter=directory)

    assert has_adapters(model) == (bits is not None)
    with torch.enable_grad():  # quantised layers then multiply floats, as they do in training
        encoded = model.encode(IDS)
        found = model.lm_logits(model.decode(IDS[:, :3], encoded))
        expected = adapted(input_ids=IDS, decoder_input_ids=IDS[:, :3]).logits
        plain = logits(load(base))
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)
    assert (found - plain).abs().max() > 0.01


@pytest.mark.parametrize("bits", [None, 8, 4])
def test_texts_are_those_of_the_adapted_model(
    bits: int | None, base: Path, make: Any, tmp_path: Path
) -> None:
    if bits is not None:
        quantize_directory(base, tmp_path / "small", bits=bits)
        base = tmp_path / "small"
    _, directory = make(base, use_dora=True)
    generator = Generator(base, device="cpu", adapter=directory)

    result = generator("天气", do_sample=False, out_length=6, logprobs=0)

    model = load(base, adapter=directory)
    source = torch.tensor([[2, *generator.tokenizer.encode("天气"), 3]])
    ids = torch.tensor([[2, *result.token_ids]])
    with torch.inference_mode():
        scores = model.lm_logits(model.decode(ids, model.encode(source))).log_softmax(-1)[0]
    assert result.logprobs is not None
    for place, each in enumerate(result.logprobs):
        expected = scores[place, ids[0, place + 1]].item()
        assert each.logprob == pytest.approx(expected, abs=0.05 if bits else 1e-3)


def test_neither_peft_nor_transformers_is_imported(base: Path, make: Any) -> None:
    _, directory = make(base)
    code = (
        "import sys, plug\n"
        f"plug.Generator({str(base)!r}, device='cpu', adapter={str(directory)!r})\n"
        "print([name for name in ('transformers', 'peft') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_fingerprint_outlives_quantising_and_rounding_and_nothing_else(
    base: Path, tiny_tokenizer: PlugTokenizer, tmp_path: Path
) -> None:
    quantize_directory(base, tmp_path / "small", bits=4)
    save(load(base), tmp_path / "half", tokenizer=tiny_tokenizer, dtype=torch.bfloat16)
    torch.manual_seed(99)
    save(Plug(WIDE), tmp_path / "other", tokenizer=tiny_tokenizer)

    found = {each: fingerprint(tmp_path / each) for each in ("base", "small", "half", "other")}

    assert found["base"] == found["small"] == found["half"] != found["other"]


def test_an_adapter_of_another_model_is_refused(
    base: Path, make: Any, tiny_tokenizer: PlugTokenizer, tmp_path: Path
) -> None:
    _, directory = make(base)
    run = {"base": fingerprint(base), "settings": {"model": "it"}}
    (directory / "finetuning.json").write_text(json.dumps(run))
    load(base, adapter=directory)
    save(Plug(WIDE), tmp_path / "other", tokenizer=tiny_tokenizer)
    narrow = dataclasses.replace(WIDE, intermediate_size=128)
    save(Plug(narrow), tmp_path / "narrow", tokenizer=tiny_tokenizer)

    with pytest.raises(UsageError, match=r"不是在 .*other 上训练的（训练时的模型是 'it'）"):
        load(tmp_path / "other", adapter=directory)
    (directory / "finetuning.json").unlink()
    with pytest.raises(PlugError, match=r"fc1.weight 是 \[256, 128\]，模型里是 \[128, 128\]"):
        load(tmp_path / "narrow", adapter=directory)


def test_what_is_no_adapter_of_ours_is_refused(base: Path, make: Any, tmp_path: Path) -> None:
    _, directory = make(base)
    config, weights = directory / "adapter_config.json", directory / "adapter_model.safetensors"

    with pytest.raises(UsageError, match=r"没有 adapter_config\.json"):
        load(base, adapter=tmp_path / "nowhere")
    with pytest.raises(UsageError, match="device-map"):
        load(base, adapter=directory, device_map="auto")
    before = json.loads(config.read_text())
    for change, match in (
        ({"peft_type": "IA3"}, "peft_type='IA3'"),
        ({"bias": "all"}, "bias='all'"),
        ({"alpha_pattern": {"q_proj": 3}}, "alpha_pattern"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
    ):
        edit(config, **change)
        with pytest.raises(UsageError, match=match):
            load(base, adapter=directory)
        edit(config, **before)
    edit(config, lora_alpha="8")
    with pytest.raises(PlugError, match="lora_alpha='8' 不是数"):
        load(base, adapter=directory)
    edit(config, lora_alpha=10**400)
    with pytest.raises(PlugError, match="lora_alpha"):
        load(base, adapter=directory)
    edit(config, **before)
    for rank, match in ((7, r"的秩是 3，adapter_config\.json 里是 7"), ("3", "秩 '3' 不是整数")):
        edit(config, r=rank)
        with pytest.raises(PlugError, match=match):
            load(base, adapter=directory)
        edit(config, **before)

    tensors = load_file(weights)
    name = next(name for name in tensors if "lora_A" in name)
    save_file(tensors | {name: torch.full_like(tensors[name], torch.nan)}, weights)
    with pytest.raises(PlugError, match="NaN"):
        load(base, adapter=directory)
    empty = {each: tensors[each][:0] for each in [name]}
    other = name.replace("lora_A", "lora_B")
    save_file(tensors | empty | {other: tensors[other][:, :0].contiguous()}, weights)
    with pytest.raises(PlugError, match="两个矩阵不全"):
        load(base, adapter=directory)
    save_file({key: tensor for key, tensor in tensors.items() if key != name}, weights)
    with pytest.raises(PlugError, match="两个矩阵不全"):
        load(base, adapter=directory)
    save_file({key: tensor.to(torch.int8) for key, tensor in tensors.items()}, weights)
    with pytest.raises(PlugError, match=r"lora_.* 是整数"):
        load(base, adapter=directory)
    for nothing in ({}, {"base_model.model.classifier.weight": torch.zeros(2, 128)}):
        save_file(nothing, weights)
        with pytest.raises(PlugError, match="没有适配器的矩阵"):
            load(base, adapter=directory)
    save_file(tensors | {"base_model.model.classifier.weight": torch.zeros(2, 128)}, weights)
    with pytest.raises(UsageError, match="plug predict --adapter"):
        load(base, adapter=directory)
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(PlugError, match="已损坏"):
        load(base, adapter=directory)


@pytest.mark.parametrize("damage", ["none left", "too few", "not announced"])
def test_magnitudes_that_do_not_go_with_the_rest_are_refused(
    damage: str, base: Path, make: Any
) -> None:
    """One number for all rows would be taken for each of them, and change outputs silently."""
    _, directory = make(base, use_dora=True)
    weights = directory / "adapter_model.safetensors"
    tensors = load_file(weights)
    names = [name for name in tensors if "magnitude" in name]
    assert names
    if damage == "not announced":
        edit(directory / "adapter_config.json", use_dora=False)
    elif damage == "too few":
        save_file(tensors | {name: tensors[name][:1].clone() for name in names}, weights)
    else:
        save_file({name: tensors[name] for name in tensors.keys() - set(names)}, weights)

    with pytest.raises(PlugError, match=r"模长（DoRA）与 adapter_config\.json 的 use_dora="):
        load(base, adapter=directory)


def test_ranks_may_differ_from_layer_to_layer(base: Path, make: Any) -> None:
    adapted, directory = make(base, rank_pattern={"fc1": 5})

    found = logits(load(base, adapter=directory))

    with torch.no_grad():
        expected = adapted(input_ids=IDS, decoder_input_ids=IDS[:, :3]).logits
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)


def test_a_layer_without_magnitudes_is_a_sum(base: Path, make: Any) -> None:
    _, directory = make(base)
    low_rank = next(iter(read_adapter(directory, base).layers.values()))
    layer, x = torch.nn.Linear(128, len(low_rank.b)), torch.randn(2, 128)

    with torch.no_grad():
        expected = layer(x) + x @ (low_rank.b @ low_rank.a).T
        torch.testing.assert_close(AdaptedLinear(layer, low_rank)(x), expected)

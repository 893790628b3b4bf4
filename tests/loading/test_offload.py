"""Layers of the encoder that come from elsewhere write the same.

A CPU is the card here, and a second "device" of it another card; what is free is made up.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined

from plug.checkpoints.weights import TensorSpec
from plug.errors import PlugError, UsageError
from plug.generation.generator import Generator, generate
from plug.loading import memory, offload
from plug.loading.estimate import STREAMED_AT_ONCE, Room
from plug.loading.load import load
from plug.loading.offload import LAYERS, StreamedLayers, choose, layer_bytes
from plug.loading.save import save
from plug.model.configuration import PRESETS, PlugConfig
from plug.model.plug import Plug
from plug.quantization.convert import quantize_directory
from plug.tokenization import PlugTokenizer

OPTIONS: dict[str, Any] = {
    "texts": ["山上有座庙，", "今天"],
    "out_length": 9,
    "seed": 1,
    "window": 4,
}
FILE, OTHER = "cpu", "cpu:1"
GB = 10**9


@pytest.fixture
def directory(
    lively: Callable[[PlugConfig], Plug], tiny_tokenizer: PlugTokenizer, tmp_path: Path
) -> Path:
    config = dataclasses.replace(PRESETS["test"], num_hidden_layers=4)
    save(lively(config), tmp_path / "model", tokenizer=tiny_tokenizer)
    return tmp_path / "model"


def written(model: Path | Generator) -> list[tuple[int, ...]]:
    return [each.token_ids for each in generate(model=model, **OPTIONS)]


@pytest.mark.parametrize(
    "where",
    [
        {0: FILE},
        {3: OTHER},
        {1: FILE, 2: OTHER, 3: FILE},
        dict.fromkeys(range(4), FILE),
    ],
)
def test_layers_from_elsewhere_write_the_same(where: dict[int, str], directory: Path) -> None:
    chosen = {f"{LAYERS}{index}": place for index, place in where.items()}

    generator = Generator(directory, device="cpu", device_map=chosen)

    assert written(generator) == written(directory)  # three windows: each layer comes thrice


@torch.inference_mode()
def test_what_is_elsewhere_takes_no_memory_before_and_after(directory: Path) -> None:
    model = load(directory, device_map={f"{LAYERS}1": FILE, f"{LAYERS}2": FILE})

    def elsewhere() -> set[str]:
        return {name.split(".")[2] for name, x in model.named_parameters() if x.is_meta}

    assert isinstance(model.encoder.layers, StreamedLayers)
    assert elsewhere() == {"1", "2"}
    seen = [elsewhere() for _ in model.encoder.layers]
    assert seen == [{"1", "2"}, {"2"}, {"1"}, {"1", "2"}]
    for _ in model.encoder.layers:
        break  # who stops early leaves nothing half done
    ids = torch.tensor([[2, 9, 8, 3]])
    torch.testing.assert_close(model.encode(ids), load(directory).encode(ids))
    assert elsewhere() == {"1", "2"}


@torch.inference_mode()
def test_layers_outlive_their_directory(directory: Path) -> None:
    ids = torch.tensor([[2, 9, 8, 3]])
    expected = load(directory).encode(ids).clone()
    model = load(directory, device_map={f"{LAYERS}1": FILE})
    model.encode(ids)
    save(Plug(model.config), directory, tokenizer=None)

    torch.testing.assert_close(model.encode(ids), expected)


def test_quantized_layers_come_too(
    lively: Callable[[PlugConfig], Plug], tiny_tokenizer: PlugTokenizer, tmp_path: Path
) -> None:
    config = dataclasses.replace(PRESETS["test"], hidden_size=128, intermediate_size=256)
    save(lively(config), tmp_path / "wide", tokenizer=tiny_tokenizer)
    quantize_directory(tmp_path / "wide", tmp_path / "quantized", bits=4)
    chosen = dict.fromkeys((f"{LAYERS}0", f"{LAYERS}2"), FILE)

    generator = Generator(tmp_path / "quantized", device="cpu", device_map=chosen)

    assert written(generator) == written(tmp_path / "quantized")


def test_the_fused_model_takes_them(directory: Path) -> None:
    pytest.importorskip("triton", reason="needs triton, which PyTorch for CUDA brings along")
    from plug.generation.fused_model import FusedModel

    model = load(directory, device_map={f"{LAYERS}1": FILE, f"{LAYERS}3": OTHER})
    generator = Generator(model, Generator(directory).tokenizer)
    generator.prepared.model = FusedModel(model)

    assert written(generator) == written(directory)


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [16, 8])
def test_on_a_gpu_streamed_layers_write_the_same(
    bits: int,
    lively: Callable[[PlugConfig], Plug],
    tiny_tokenizer: PlugTokenizer,
    tmp_path: Path,
) -> None:
    config = dataclasses.replace(
        PRESETS["test"],
        num_hidden_layers=6,
        hidden_size=512,
        num_attention_heads=8,
        intermediate_size=2048,
    )
    save(lively(config), tmp_path / "m", tokenizer=tiny_tokenizer, dtype=torch.bfloat16)
    if bits < 16:
        quantize_directory(tmp_path / "m", tmp_path / "q", bits=bits)
    source = tmp_path / ("m" if bits == 16 else "q")
    chosen = {f"{LAYERS}{index}": FILE for index in (0, 1, 3, 5)}

    generator = Generator(source, device="cuda", device_map=chosen)

    expected = written(Generator(source, device="cuda"))
    assert [written(generator) for _ in range(3)] == [expected] * 3


@pytest.mark.parametrize(
    ("free", "others", "expected"),
    [
        (60, [], {}),  # all fits
        (30, [], dict.fromkeys(range(6, 24), "cpu")),
        (30, [20], dict.fromkeys(range(6, 18), "cuda:1") | dict.fromkeys(range(18, 24), "cpu")),
        (
            30,
            [20, 90],
            dict.fromkeys(range(6, 18), "cuda:1") | dict.fromkeys(range(18, 24), "cuda:2"),
        ),
    ],
)
def test_auto_takes_what_fits_then_other_cards_then_the_file(
    free: int, others: list[int], expected: dict[int, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """27B in bf16: a layer is 1.61 GB; the rest and what writing needs 14.9."""
    with torch.device("meta"):
        model = Plug(PRESETS["27b"])
    specs = {
        name: TensorSpec(torch.bfloat16, tuple(x.shape)) for name, x in model.state_dict().items()
    }
    cards = [free, *others]
    monkeypatch.setattr(offload, "free_memory", lambda device: cards[device.index or 0] * GB)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(cards))

    kept = choose("auto", model, specs, torch.device("cuda:0"), Room())

    assert kept == expected
    if kept:
        size, weights = layer_bytes(specs), sum(spec.num_bytes for spec in specs.values())
        here = weights - (len(kept) - STREAMED_AT_ONCE) * size
        assert Room().need(model.config, here, 2).with_overhead().total <= free * GB
        assert Room().need(model.config, here + size, 2).with_overhead().total > free * GB


def test_a_card_too_small_for_the_rest_is_told_so(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (memory, offload):
        monkeypatch.setattr(module, "free_memory", lambda _device: 1000)
    with pytest.raises(PlugError, match="显存不够"):
        load(directory, device="cuda:0", room=Room(), device_map="auto")


@pytest.mark.parametrize(
    ("chosen", "says"),
    [
        ("balanced", "auto"),
        ({"decoder.layers.0": "cpu"}, r"encoder\.layers\.0 到 encoder\.layers\.3"),
        ({f"{LAYERS}4": "cpu"}, r"encoder\.layers\.4"),
        ({f"{LAYERS}0": "abacus"}, "abacus"),
    ],
)
def test_maps_that_make_no_sense_are_wrong_use(
    chosen: str | dict[str, str], says: str, directory: Path
) -> None:
    with pytest.raises(UsageError, match=says):
        load(directory, device_map=chosen)


def test_a_thread_that_fails_ends_the_pass(directory: Path) -> None:
    model = load(directory, device_map={f"{LAYERS}1": FILE})
    file = directory / "model.safetensors"
    with file.open("r+b") as opened:
        opened.truncate(5000)
    with pytest.raises(PlugError, match="已损坏"):
        model.encode(torch.tensor([[2, 9, 3]]))
    assert isinstance(model.encoder.layers, nn.ModuleList)

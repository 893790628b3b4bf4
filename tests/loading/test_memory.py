"""Refusals before and during loading; the device is made up where there is none."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from plug.checkpoints.headers import read_places
from plug.device import explain_out_of_memory
from plug.errors import PlugError, UsageError
from plug.generation.generator import Generator
from plug.loading import memory
from plug.loading.load import load
from plug.loading.memory import (
    Room,
    check_dtype,
    check_memory,
    generation_need,
    resident_share,
    weight_bytes,
)
from plug.loading.save import save
from plug.model.configuration import PRESETS
from plug.model.plug import Plug
from plug.quantization.convert import quantize_directory
from plug.tokenization import PlugTokenizer

CARD = torch.device("cuda:0")
BIG = PRESETS["27b"]
WEIGHTS = weight_bytes(BIG, 16)  # 52.1 GB
GB = 10**9


@pytest.fixture
def card_with(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """The only device has so many bytes free."""

    def make(free: int, devices: int = 1) -> None:
        monkeypatch.setattr(memory, "free_memory", lambda _device: free)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: devices)

    return make


@pytest.mark.parametrize(
    ("free", "devices", "says", "says_not"),
    [
        (
            40,
            1,
            ["权重 52.1", "空闲 40.0 GB", "--bits 8", "--bits 4", "--device-map"],
            ["torchrun"],
        ),
        (40, 2, ["torchrun --nproc-per-node 2"], []),
        (20, 1, ["--bits 4", "--device-map"], ["--bits 8"]),
        (5, 8, ["--device cpu"], ["--bits", "--device-map", "torchrun"]),
    ],
)
def test_what_does_not_fit_is_told_with_what_would(
    free: int, devices: int, says: list[str], says_not: list[str], card_with: Callable[..., None]
) -> None:
    card_with(free * GB, devices)

    with pytest.raises(PlugError) as caught:
        check_memory(CARD, BIG, WEIGHTS, room=Room())

    message = str(caught.value)
    assert caught.value.exit_code == 1
    assert all(word in message for word in says)
    assert not any(word in message for word in says_not)


def test_caches_and_workspace_of_the_batch_count(card_with: Callable[..., None]) -> None:
    """27B in bf16 on a card of 80 GB: 1 text fits, as do 32; 256 do not, 64 would."""
    card_with(79 * GB)

    check_memory(CARD, BIG, WEIGHTS, room=Room(batch_size=1))
    check_memory(CARD, BIG, WEIGHTS, room=Room(batch_size=32))
    with pytest.raises(PlugError, match=r"--batch-size 64（现在 256），约需 74\.6 GB"):
        check_memory(CARD, BIG, WEIGHTS, room=Room(batch_size=256))


def test_weights_of_8_bits_are_not_told_to_become_8_bits(card_with: Callable[..., None]) -> None:
    card_with(20 * GB)
    with pytest.raises(PlugError) as caught:
        check_memory(CARD, BIG, weight_bytes(BIG, 8), bits=8, room=Room())

    assert "--bits 8" not in str(caught.value)
    assert "--bits 4" in str(caught.value)


def test_loading_asks_before_it_reads(
    tiny_model: Plug, tmp_path: Path, card_with: Callable[..., None]
) -> None:
    save(tiny_model, tmp_path / "model", tokenizer=None)
    card_with(1000)

    with pytest.raises(PlugError, match=r"cuda:0 的显存不够：约需 0\.0 GB"):
        load(tmp_path / "model", device=CARD)


@pytest.mark.parametrize(("capability", "refused"), [((7, 5), True), ((8, 0), False)])
def test_bfloat16_is_refused_where_the_card_lacks_it(
    capability: tuple[int, int], refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device: "Tesla T4")

    check_dtype(CARD, torch.float16)
    if refused:
        with pytest.raises(PlugError, match=r"Tesla T4.*--dtype float16"):
            check_dtype(CARD, torch.bfloat16)
    else:
        check_dtype(CARD, torch.bfloat16)


def test_a_dtype_that_is_none_of_ours_is_wrong_use(tiny_model: Plug, tmp_path: Path) -> None:
    save(tiny_model, tmp_path / "model", tokenizer=None)
    with pytest.raises(UsageError, match=r"float64.*bfloat16"):
        load(tmp_path / "model", dtype=torch.float64)


@pytest.mark.parametrize(("batch_size", "says"), [(8, "--batch-size 4"), (1, "--window")])
def test_memory_that_ends_while_writing_is_one_clear_failure(
    batch_size: int,
    says: str,
    tiny_model: Plug,
    tiny_tokenizer: PlugTokenizer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    card = SimpleNamespace(total_memory=80 * GB)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _device: card)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _device: 79 * GB)
    generator = Generator(tiny_model, tiny_tokenizer)
    expected = generator(["山上"], seed=1)[0].token_ids
    encode = generator.prepared.encode

    def fail(*_: object) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(generator.prepared, "encode", fail)
    with pytest.raises(PlugError, match=f"共 80.0 GB，本程序占着 79.0 GB.*{says}"):
        generator(["山上"] * batch_size, seed=1)

    monkeypatch.setattr(generator.prepared, "encode", encode)
    assert generator(["山上"], seed=1)[0].token_ids == expected  # it still works


def test_other_errors_pass() -> None:
    with pytest.raises(ZeroDivisionError), explain_out_of_memory(CARD, 8):
        raise ZeroDivisionError


def test_what_writing_needs_is_made_of_weights_caches_and_workspace() -> None:
    """27B, 32 texts: the caches are spec section 7's 196,608 bytes a token."""
    config = PRESETS["27b"]
    one, many = (
        generation_need(config, weights=7, batch_size=size, source_length=512, capacity=128)
        for size in (1, 32)
    )
    assert (one.weights, one.caches) == (7, 196_608 * 640)
    assert many.caches == 32 * one.caches
    inside = 16384 * (6 * 8192 + 2 * 32768) * 2  # 32 sources fill what is encoded at once
    assert inside < many.workspace < inside + 5e9
    assert one.total == one.weights + one.caches + one.workspace


def test_the_resident_share_is_all_but_the_encoder_s_layers_but_three() -> None:
    with torch.device("meta"):
        model = Plug(PRESETS["27b"])
    layers = sum(p.numel() for p in model.encoder.layers.parameters())
    everything = sum(p.numel() for p in model.parameters())
    expected = 1 - layers * 21 / 24 / everything
    assert resident_share(model.config) == pytest.approx(expected)


@pytest.mark.parametrize("bits", [32, 16, 8, 4])
def test_the_bytes_of_weights_are_those_of_a_directory(bits: int, tmp_path: Path) -> None:
    """Unlike sizes, so that rows and columns of each matrix count for what they are."""
    config = dataclasses.replace(PRESETS["test"], hidden_size=128, intermediate_size=384)
    dtype = torch.float32 if bits == 32 else torch.bfloat16
    save(Plug(config), tmp_path / "model", tokenizer=None, dtype=dtype)
    if bits < 16:
        quantize_directory(tmp_path / "model", tmp_path / "quantized", bits=bits)
    directory = tmp_path / ("quantized" if bits < 16 else "model")

    stored = sum(place.spec.num_bytes for place in read_places(directory).values())

    assert weight_bytes(config, bits) == stored
    on_device = sum(x.nbytes for x in load(directory, dtype=dtype).state_dict().values())
    assert on_device == stored


def test_the_rest_of_a_quantized_model_keeps_its_precision(tmp_path: Path) -> None:
    config = dataclasses.replace(PRESETS["test"], hidden_size=128, intermediate_size=384)
    save(Plug(config), tmp_path / "model", tokenizer=None)
    quantize_directory(tmp_path / "model", tmp_path / "quantized", bits=4)

    stored = sum(x.spec.num_bytes for x in read_places(tmp_path / "quantized").values())
    assert weight_bytes(config, 4, bytes_per_value=4) == stored


def test_the_shipped_model_in_4_bits_is_told_as_large_as_it_is() -> None:
    """`plug quantize --bits 4` writes 41.2 MB; 31.5 were told while the word table counted too."""
    assert round(weight_bytes(PRESETS["mini"], 4) / 1e6, 1) == 41.2
    assert round(weight_bytes(PRESETS["mini"], 8) / 1e6, 1) == 65.1


def test_a_model_too_narrow_for_groups_has_no_4_bits() -> None:
    with pytest.raises(UsageError, match="--bits 8"):
        weight_bytes(PRESETS["test"], 4)

"""Refusals before and during loading; the device is made up where there is none."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from plug.device import explain_out_of_memory
from plug.errors import PlugError, UsageError
from plug.generation.generator import Generator
from plug.loading import memory
from plug.loading.estimate import Room, weight_bytes
from plug.loading.load import load
from plug.loading.memory import check_dtype, check_memory
from plug.loading.save import save
from plug.model.configuration import PRESETS
from plug.model.plug import Plug
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
    with pytest.raises(PlugError, match=r"--batch-size 64（现在 256），约需 70\.6 GB"):
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

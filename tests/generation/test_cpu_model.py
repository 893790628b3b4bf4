"""Decoding by `kernels/cpu` beside decoding by PyTorch's functions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from plug.generation import cpu_choice
from plug.generation.cpu_choice import BFLOAT16, KERNELS, PYTORCH
from plug.generation.cpu_model import CpuModel
from plug.generation.kv_cache import DecoderCache
from plug.generation.plain_model import PlainModel
from plug.loading.adapters import Adapter, LowRank, attach
from plug.loading.load import load
from plug.loading.save import save
from plug.model.configuration import PlugConfig
from plug.model.plug import Plug
from plug.quantization.convert import quantize_directory

SOURCES = [[2, 9, 8, 7, 3], [2, 6, 3], [2, 5, 0, 11, 12, 13, 3]]  # one with padding inside


@pytest.fixture
def wide_model(make_model: Callable[[PlugConfig], Plug]) -> Plug:
    """Groups of 128 inputs everywhere, as 4 bits want."""
    return make_model(
        PlugConfig(
            vocab_size=320, num_emitted_tokens=300, hidden_size=128, num_attention_heads=4,
            intermediate_size=256, num_hidden_layers=2, num_decoder_layers=3,
            max_position_embeddings=64,
        )
    )  # fmt: skip


def decoded(prepared: PlainModel, steps: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """Logits of each step, of the same sources."""
    encoded = prepared.encode(SOURCES)
    cache = DecoderCache(encoded[0][0][0], layers=3, rows=3, source_length=9, capacity=20)
    cache.put_sources(range(3), encoded)
    return [prepared.decode(ids, where, int(where.max()) + 1, cache) for ids, where in steps]


def steps(rows: int) -> list[tuple[Tensor, Tensor]]:
    """Single tokens, then three a row as a draft has them, rows at unlike positions."""
    generator = torch.Generator().manual_seed(0)

    def ids(tokens: int) -> Tensor:
        return torch.randint(5, 300, (rows, tokens), generator=generator)

    first = torch.zeros(rows, 1, dtype=torch.long)
    ahead = torch.arange(1, rows + 1)[:, None].clamp(max=2)
    return [(ids(1), first), (ids(1), first + 1), (ids(3), ahead + torch.tensor([[0, 1, 2]]))]


@pytest.mark.parametrize("reading", [KERNELS, PYTORCH, BFLOAT16])
@pytest.mark.parametrize("in_bfloat16", [True, False])
@pytest.mark.parametrize("rows", [1, 3])
@torch.inference_mode()
def test_logits_are_those_of_the_plain_model(
    in_bfloat16: bool, rows: int, reading: str, wide_model: Plug, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_choice, "fastest_source", lambda: reading)
    if in_bfloat16:
        wide_model.bfloat16().float()

    found = decoded(CpuModel(wide_model), steps(rows))

    # Processors that multiply pairs of bfloat16 get inputs rounded to it, by 2^-9.
    size = 1e-2 if in_bfloat16 else 1e-5
    for actual, expected in zip(found, decoded(PlainModel(wide_model), steps(rows)), strict=True):
        assert (actual - expected).norm() < size * expected.norm()


@pytest.mark.parametrize("bits", [8, 4])
@torch.inference_mode()
def test_a_row_of_a_quantized_model_is_the_same_to_the_last_bit_in_any_batch(
    bits: int, wide_model: Plug, tmp_path: Path
) -> None:
    save(wide_model, tmp_path / "whole", tokenizer=None)
    quantize_directory(tmp_path / "whole", tmp_path / "small", bits=bits)
    prepared = CpuModel(load(tmp_path / "small"))

    together = decoded(prepared, steps(3))
    alone = decoded(prepared, [(ids[:1], where[:1]) for ids, where in steps(3)])

    for first, both in zip(alone, together, strict=True):
        assert torch.equal(first, both[:1])


@pytest.mark.parametrize("has_magnitudes", [False, True])
@pytest.mark.parametrize("rows", [1, 3])
@torch.inference_mode()
def test_an_adapter_beside_integers_is_added_in_the_step(
    rows: int, has_magnitudes: bool, wide_model: Plug, tmp_path: Path
) -> None:
    save(wide_model, tmp_path / "whole", tokenizer=None)
    quantize_directory(tmp_path / "whole", tmp_path / "small", bits=8)
    model, plain = load(tmp_path / "small"), load(tmp_path / "small")
    without = decoded(CpuModel(plain), steps(rows))
    layers = {
        name: LowRank(torch.randn(3, 128) / 5, torch.randn(out, 3) / 5)
        for index in range(3)
        for name, out in (
            (f"decoder.layers.{index}.self_attention.q_proj", 128),
            (f"decoder.layers.{index}.cross_attention.out_proj", 128),
            (f"decoder.layers.{index}.feed_forward.fc1", 256),
            (f"encoder.layers.{index % 2}.attention.k_proj", 128),
        )
    }
    if has_magnitudes:
        layers = {name: replace(x, magnitude=torch.ones(len(x.b))) for name, x in layers.items()}
    attach(model, Adapter(tmp_path, layers))
    assert CpuModel.can_run(model) == (not has_magnitudes)  # DoRA scales rows besides
    if has_magnitudes:
        return

    found = decoded(CpuModel(model), steps(rows))

    for actual, expected, base in zip(
        found, decoded(PlainModel(model), steps(rows)), without, strict=True
    ):
        # The plain model's head is FBGEMM's, which rounds inputs over their range.
        assert (actual - expected).norm() < 2e-2 * expected.norm()
        assert (actual - base).norm() > 0.1 * expected.norm()


def test_models_in_halves_are_for_the_plain_model(wide_model: Plug) -> None:
    assert not CpuModel.can_run(wide_model.bfloat16())

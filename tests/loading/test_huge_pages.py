"""What a step reads is in memory of its own, bit for bit; everything else stays mapped."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from plug.checkpoints.directory import weight_shapes
from plug.checkpoints.headers import locate_weights
from plug.errors import PlugError
from plug.loading import huge_pages
from plug.loading.estimate import Room
from plug.loading.load import load
from plug.model.plug import Plug
from plug.quantization.convert import quantize_directory

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux")


@pytest.fixture
def quantized(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Plug, Path]:
    """A model in 8 bits, all of it mapped, and its directory; 500 bytes are large here."""
    monkeypatch.setattr(huge_pages, "_HUGE", 4096)
    monkeypatch.setattr(huge_pages, "_LEAST", 500)
    monkeypatch.setattr(huge_pages, "_LENT", tmp_path / "enabled")
    huge_pages._LENT.write_text("always [madvise] never\n")
    directory = tmp_path / "quantized"
    quantize_directory(saved, directory, bits=8)
    return load(directory), directory


def mapped(model: Plug) -> set[str]:
    """Names of the buffers that lie in a mapped file."""
    files = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, *_, name = line.split()
        if name.endswith(".safetensors"):
            files.append([int(each, 16) for each in span.split("-")])
    return {
        name
        for name, buffer in model.named_buffers()
        if any(start <= buffer.data_ptr() < end for start, end in files)
    }


def test_a_step_reads_memory_and_the_rest_is_mapped(quantized: tuple[Plug, Path]) -> None:
    reading, directory = quantized

    writing = load(directory, room=Room())

    for name, tensor in reading.state_dict().items():
        assert torch.equal(writing.state_dict()[name], tensor), name
    moved = mapped(reading) - mapped(writing)
    assert moved == {
        name
        for name, buffer in reading.named_buffers()
        if name.startswith("decoder.layers.")
        and "cross_attention.k_proj" not in name
        and "cross_attention.v_proj" not in name
        and buffer.nbytes >= 500
    }
    assert moved


def test_nothing_is_read_where_addresses_are_limited(
    quantized: tuple[Plug, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, directory = quantized
    places = locate_weights(directory, weight_shapes(model))
    assert huge_pages.read_by_steps(places)
    monkeypatch.setattr(huge_pages, "limits_addresses", lambda: True)
    assert not huge_pages.read_by_steps(places)


@pytest.mark.usefixtures("quantized")
def test_a_copy_is_equal_and_small_ones_are_not_made() -> None:
    large, small = torch.arange(600).view(3, 200), torch.arange(60)
    copied = huge_pages.copy(large)
    assert torch.equal(copied, large)
    assert copied.data_ptr() != large.data_ptr()
    assert huge_pages.copy(small) is small
    huge_pages._LENT.unlink()
    assert huge_pages.copy(large) is large


@pytest.mark.parametrize("told", ["always madvise [never]\n", None])
def test_nothing_is_read_where_linux_has_no_huge_pages(
    told: str | None, quantized: tuple[Plug, Path]
) -> None:
    model, directory = quantized
    huge_pages._LENT.unlink()
    if told is not None:
        huge_pages._LENT.write_text(told)
    assert not huge_pages.read_by_steps(locate_weights(directory, weight_shapes(model)))


def test_a_file_that_has_shrunk_is_damaged(quantized: tuple[Plug, Path]) -> None:
    model, directory = quantized
    places = huge_pages.read_by_steps(locate_weights(directory, weight_shapes(model)))
    place = max(places.values(), key=lambda each: each.start)
    with place.file.open("r+b") as file:
        file.truncate(place.start + 7)
    with pytest.raises(PlugError, match="比它的头部说的短"):
        huge_pages.read(place)
    place.file.unlink()
    with pytest.raises(PlugError, match="已损坏"):
        huge_pages.read(place)

"""The 8- and 4-bit formats are frozen: the files of `tests/golden/quantized` keep their meaning.

The files were written by safetensors from numbers, without our code. `docs/quantization.md` has the
formats byte for byte; `decoded` below is that page as code, and knows neither torch nor our code.
"""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from plug.errors import UsageError
from plug.quantization.scheme import Scheme, read_scheme

GOLDEN = Path(__file__).parent.parent / "golden" / "quantized"


def golden(bits: int) -> tuple[dict[str, Any], bytes]:
    facts = json.loads((GOLDEN / f"int{bits}.json").read_text(encoding="utf-8"))
    return facts, (GOLDEN / f"int{bits}.safetensors").read_bytes()


def decoded(content: bytes, bits: int, shape: tuple[int, int]) -> list[list[float]]:
    """The weight (out, in), from the bytes of a safetensors file."""
    (length,) = struct.unpack_from("<Q", content)
    header = json.loads(content[8 : 8 + length])

    def part(name: str) -> bytes:
        first, last = header[f"layer.{name}"]["data_offsets"]
        return content[8 + length :][first:last]

    def bfloat16(raw: bytes) -> list[float]:
        return [struct.unpack("<f", b"\0\0" + raw[i : i + 2])[0] for i in range(0, len(raw), 2)]

    out, inputs = shape
    if bits == 8:
        scales = struct.unpack(f"<{out}f", part("scale"))
        q = struct.unpack(f"{out * inputs}b", part("weight"))
        return [[q[r * inputs + c] * scales[r] for c in range(inputs)] for r in range(out)]
    words = struct.unpack(f"<{out * inputs // 8}I", part("weight"))
    scales, centers = bfloat16(part("scale")), bfloat16(part("center"))
    place = {column: index for index, column in enumerate((0, 2, 4, 6, 1, 3, 5, 7))}
    rows = []
    for r in range(out):
        row = []
        for c in range(inputs):
            q4 = words[(r * inputs + c) // 8] >> (4 * place[c % 8]) & 15
            group = (r * inputs + c) // 128
            row.append((q4 - 8) * scales[group] + centers[group])
        rows.append(row)
    return rows


@pytest.mark.parametrize("bits", [8, 4])
def test_the_documented_bytes_mean_the_documented_values(bits: int) -> None:
    facts, content = golden(bits)
    assert decoded(content, bits, facts["shape"]) == facts["values"]


@pytest.mark.parametrize("bits", [8, 4])
def test_the_scheme_decodes_the_file_to_the_values(bits: int) -> None:
    facts, content = golden(bits)
    tensors = safetensors.torch.load(content)
    own = {name.removeprefix("layer."): x for name, x in tensors.items() if "bias" not in name}
    scheme = Scheme.of(bits)
    specs = {name: (x.dtype, tuple(x.shape)) for name, x in own.items()}
    assert specs == scheme.tensors(*facts["shape"])

    found = scheme.dequantize(own, torch.float32)

    expected = torch.tensor(facts["values"], dtype=torch.float64)
    assert math.isclose((found - expected).abs().max(), 0, abs_tol=1e-6)


@pytest.mark.parametrize("bits", [8, 4])
def test_quantizing_the_values_gives_the_bytes_again(bits: int) -> None:
    """Where a row or group reaches both ends of its range, the integers are the only ones."""
    facts, content = golden(bits)
    weight = torch.tensor(facts["values"])
    tensors = safetensors.torch.load(content)
    again = Scheme.of(bits).quantize(weight)
    if bits == 8:
        assert torch.equal(again["weight"][[0, 2]], tensors["layer.weight"][[0, 2]])
    else:
        assert torch.equal(again["weight"], tensors["layer.weight"])


@pytest.mark.parametrize("bits", [8, 4])
def test_config_says_the_version_and_an_older_config_has_none(bits: int, tmp_path: Path) -> None:
    facts, _ = golden(bits)
    entry = facts["quantization"]
    assert Scheme.of(bits).to_dict() == entry
    older = {name: value for name, value in entry.items() if name != "version"}
    for written in (entry, older):
        (tmp_path / "config.json").write_text(json.dumps({"quantization": written}))
        assert read_scheme(tmp_path / "config.json") == Scheme.of(bits)


@pytest.mark.parametrize("version", [0, 2, "1", True, 1.0])
def test_another_version_is_refused(version: object, tmp_path: Path) -> None:
    entry = Scheme.of(8).to_dict() | {"version": version}
    (tmp_path / "config.json").write_text(json.dumps({"quantization": entry}))

    with pytest.raises(UsageError, match=r"version.*升级"):
        read_scheme(tmp_path / "config.json")


@pytest.mark.parametrize(
    "entry",
    [
        {"bits": 8.0},
        {"bits": True},
        {"bits": 8, "group_size": 128},
        {"bits": 8, "packing": "x"},
        {"bits": 4, "group_size": 128.0, "packing": "02461357"},
        [],
        {},
        "8",
    ],
)
def test_an_entry_that_is_not_exactly_a_format_is_refused(entry: object, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"quantization": entry}))

    with pytest.raises(UsageError, match=r"quantization|量化"):
        read_scheme(tmp_path / "config.json")

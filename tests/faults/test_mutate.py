from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Iterator
from io import BytesIO

import pytest
import safetensors.torch
import torch
from mutate import (
    json_lines_mutations,
    json_mutations,
    mutations,
    pickle_mutations,
    safetensors_mutations,
    zip_mutations,
)

Mutate = Callable[[bytes, int, int], Iterator[bytes]]


def archive() -> bytes:
    buffer = BytesIO()
    torch.save({"module": {"a": torch.arange(9.0)}, "count": 70000}, buffer)
    return buffer.getvalue()


def a_pickle() -> bytes:
    with zipfile.ZipFile(BytesIO(archive())) as opened:
        name = next(name for name in opened.namelist() if name.endswith(".pkl"))
        return opened.read(name)


CASES = [
    (mutations, "一行\n两行\n".encode()),
    (mutations, bytes(range(256))),
    (json_mutations, json.dumps({"a": 1, "b": [1, {"c": "x"}]}).encode()),
    (json_lines_mutations, b'{"a": 1}\n{"a": 2}\n'),
    (safetensors_mutations, safetensors.torch.save({"a": torch.ones(9), "b": torch.ones(2, 3)})),
    (zip_mutations, archive()),
    (pickle_mutations, a_pickle()),
]


@pytest.mark.parametrize(("mutate", "data"), CASES)
def test_a_seed_gives_the_same_damage_and_mostly_different_files(
    mutate: Mutate, data: bytes
) -> None:
    first = list(mutate(data, 1, 60))

    assert first == list(mutate(data, 1, 60))
    assert first != list(mutate(data, 2, 60))
    assert sum(damaged != data for damaged in first) > 45
    assert len(set(first)) > 30

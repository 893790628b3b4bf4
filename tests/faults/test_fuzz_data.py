"""A few damaged copies of each data format; `fuzz_data.py --count 2000` tries many."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("transformers")

import fuzz_data

FORMATS = {each.name: each for each in fuzz_data.formats()}


@pytest.mark.parametrize("name", FORMATS)
def test_a_damaged_file_is_read_with_one_meaning_or_refused(name: str, tmp_path: Path) -> None:
    counts = fuzz_data.try_format(FORMATS[name], 40, tmp_path)

    assert counts.faults == []
    assert 0 < counts[fuzz_data.REFUSED] < 40  # some copies are damaged enough, some are not


@pytest.mark.parametrize("name", FORMATS)
def test_the_whole_file_is_read(name: str, tmp_path: Path) -> None:
    each = FORMATS[name]
    content = each.content
    path = tmp_path / name
    if name.endswith((".gz", ".zst")):
        pack = {".gz": fuzz_data.gzip.compress, ".zst": fuzz_data.zstandard.compress}[path.suffix]
        content = pack(content)
    path.write_bytes(content)
    each.read(path)

"""Large files that the system does not have cached are read once, and told of."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

import pytest

from plug.loading import page_cache
from plug.loading.page_cache import read_ahead

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux")
SIZE = 64 * 2**20


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of 64 MiB, on the disk; counts as large."""
    monkeypatch.setattr(page_cache, "LARGE", SIZE)
    path = tmp_path / "weights"
    path.write_bytes(os.urandom(1024) * (SIZE // 1024))
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
    return path


def drop(file: Path) -> None:
    """Take a file out of the page cache."""
    descriptor = os.open(file, os.O_RDONLY)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def test_a_file_that_is_not_cached_is_read_and_told_of(
    file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    drop(file)
    if page_cache._is_cached(file):
        pytest.skip("this file system keeps its files in memory, or does not tell")
    caplog.set_level(logging.WARNING)

    read_ahead([file, file])

    assert page_cache._is_cached(file)
    assert "先从硬盘读一遍：0.1 GB" in caplog.text
    caplog.clear()
    read_ahead([file])
    assert not caplog.text


def test_small_files_are_left_alone(
    file: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(page_cache, "LARGE", SIZE + 1)
    drop(file)

    read_ahead([file])

    assert not caplog.text

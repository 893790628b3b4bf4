"""Building: once, checked, and a sentence where it cannot be."""

from __future__ import annotations

import logging
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from plug.kernels.cpu import build
from plug.kernels.cpu.build import library, library_file


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    library.cache_clear()
    yield tmp_path / "plug"
    library.cache_clear()


@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
def test_a_build_is_kept_for_the_next_process(
    own_cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert library() is not None
    [built] = own_cache.glob("*.so")
    assert "只此一次" in caplog.text
    caplog.clear()
    library.cache_clear()

    assert library() is not None
    assert not caplog.text
    assert list(own_cache.iterdir()) == [built]


def test_without_a_compiler_there_is_none_and_it_is_said(
    own_cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: None)  # noqa: ARG005
    caplog.set_level(logging.INFO)

    assert library() is None
    assert "没有找到 C++ 编译器" in caplog.text
    assert not own_cache.exists()


@pytest.mark.parametrize("compiler", ["false", "/no/such/compiler"])
def test_a_compiler_that_fails_is_named(
    compiler: str,
    own_cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("CXX", compiler)

    assert library() is None
    assert "没能编译" in caplog.text
    assert compiler in caplog.text
    assert not list(own_cache.glob("*.so"))


@pytest.mark.usefixtures("own_cache")
def test_a_cache_that_cannot_be_written_has_a_way_out(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CXX", "/no/such/compiler")
    monkeypatch.setattr("os.access", lambda folder, mode: False)  # noqa: ARG005

    assert library() is None
    assert "XDG_CACHE_HOME" in caplog.text
    assert "/no/such/compiler" not in caplog.text  # nothing was compiled in vain


def test_a_damaged_library_is_not_loaded(own_cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    own_cache.mkdir()
    library_file().write_bytes(b"not a library")

    assert library() is None
    assert str(library_file()) in caplog.text


@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
def test_a_processor_that_lacks_the_instructions_is_found_before_they_are_used(
    own_cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(
        build, "_CHECK", "import os, signal, sys; os.kill(os.getpid(), signal.SIGILL)"
    )

    assert library() is None
    assert "处理器没有其中的指令" in caplog.text
    assert not list(own_cache.glob("*.so"))


@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
def test_a_target_that_no_compiler_knows_is_said(
    own_cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PLUG_CPU_TARGET", "no-such-processor")

    assert library() is None
    assert "no-such-processor" in caplog.text
    assert not list(own_cache.glob("*.so"))


WITHOUT_TILES = """
import ctypes, sys
class Stack(ctypes.Structure):
    _fields_ = [("at", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t)]
memory = ctypes.create_string_buffer(8192)  # too small to keep the registers in: Linux refuses
stack = Stack(ctypes.addressof(memory), 0, len(memory))
assert ctypes.CDLL(None).sigaltstack(ctypes.byref(stack), None) == 0
library = ctypes.CDLL(sys.argv[1])
print(library.plug_instructions(), library.plug_self_test())
"""


@pytest.mark.skipif(library() is None, reason="needs a C++ compiler")
def test_where_linux_refuses_the_registers_of_amx_the_other_products_serve() -> None:
    found = library()
    assert found is not None
    if found.plug_instructions() != 1024:
        pytest.skip("needs AMX")

    command = [sys.executable, "-c", WITHOUT_TILES, str(library_file())]
    run = subprocess.run(command, capture_output=True, text=True, check=True)

    assert run.stdout == "512 0\n"

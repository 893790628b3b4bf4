from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from plug.errors import PlugError, UsageError
from plug.jsonfiles import read_bytes, read_json, shown


def test_a_file_is_read_as_what_it_says(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"a": [1, 2.5, "长", null, true]}', encoding="utf-8")

    assert read_json(path) == {"a": [1, 2.5, "长", None, True]}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"{", "不是有效的 JSON"),
        (b"\xff", "不是有效的 JSON"),
        (b"", "不是有效的 JSON"),
        (b"9" * 5000, "不是有效的 JSON"),
        (b'{"a": 1, "b": {"c": 2, "c": 3}}', "两个键 'c'"),
        (b'{"a": NaN}', "NaN"),
        (b'{"a": -Infinity}', "-Infinity"),
        (b'{"a": 1e999}', "1e999"),
        (b"[" * 100_000 + b"]" * 100_000, "嵌套太深"),
    ],
    ids=["cut", "bytes", "empty", "digits", "twice", "nan", "infinity", "overflow", "deep"],
)
def test_what_is_no_certain_json_is_refused(content: bytes, says: str, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content)

    with pytest.raises(UsageError, match=says) as caught:
        read_json(path, UsageError)

    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda _path: None, "读不了"),
        (os.mkfifo, "不是普通文件"),
        (Path.mkdir, "不是普通文件"),
        (lambda path: path.symlink_to("/dev/zero"), "不是普通文件"),
    ],
    ids=["missing", "fifo", "directory", "device"],
)
def test_what_is_no_regular_file_is_refused_without_waiting(
    make: Callable[[Path], object], says: str, tmp_path: Path
) -> None:
    make(tmp_path / "a.json")

    with pytest.raises(PlugError, match=says):
        read_json(tmp_path / "a.json")


def test_a_file_larger_than_its_kind_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    with path.open("wb") as file:
        file.truncate(10**12)  # a hole, which takes no room on the disk

    with pytest.raises(PlugError, match=r"1,000,000 MB.*上限 268 MB"):
        read_bytes(path)


def test_long_values_are_cut_in_messages() -> None:
    assert shown("长" * 1000) == "'" + "长" * 79 + "……"
    assert shown(3) == "3"

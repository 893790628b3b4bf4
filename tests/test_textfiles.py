"""Lines of text files: endings, byte-order marks, other encodings, and what is no text file."""

from __future__ import annotations

import gzip
import os
from pathlib import Path

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from plug import textfiles
from plug.errors import PlugError, UsageError
from plug.textfiles import Notes, is_text, plain_suffix, read_lines, trim


def lines(path: Path, content: bytes) -> list[str]:
    path.write_bytes(content)
    return [line for _, line in read_lines(path)]


def test_a_line_stands_as_in_the_file(tmp_path: Path) -> None:
    content = " 甲\t\n\n\u3000乙\x0b\u2028 \r\n丙\r丁\x85戊".encode()
    assert lines(tmp_path / "a.txt", content) == [
        " 甲\t",
        "",
        "\u3000乙\x0b\u2028 ",
        "丙",
        "丁\x85戊",
    ]


@given(st.lists(st.sampled_from(["", "甲", "ab", " "]), max_size=8), st.integers(1, 5))
def test_lines_do_not_depend_on_how_the_file_comes_in(parts: list[str], size: int) -> None:
    for ending in ("\n", "\r\n", "\r"):
        content = "".join(part + ending for part in parts).encode()
        chunks = [content[i : i + size] for i in range(0, len(content), size)]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(textfiles, "_chunks", lambda _, chunks=chunks: iter(chunks))
            found = list(textfiles._raw_lines(Path("a")))
        assert [line.decode() for line in found] == parts


def test_a_byte_order_mark_is_no_text_wherever_a_line_begins(tmp_path: Path) -> None:
    path, notes = tmp_path / "a.txt", Notes()
    path.write_text("\ufeff甲\n乙\n\ufeff丙\n\ufeff\ufeff丁\ufeff\n", encoding="utf-8")
    assert [line for _, line in read_lines(path, notes)] == ["甲", "乙", "丙", "丁\ufeff"]
    assert notes.lines() == [f"去掉了文件中间的字节顺序标记 U+FEFF：2 处（如 {path} 第 3 行）。"]


@pytest.mark.parametrize(
    ("name", "content", "command"),
    [
        ("a.txt", "一\n中文".encode("gb18030"), "iconv -f GB18030 -t UTF-8 {path} > utf8-a.txt"),
        ("a b.txt", "中".encode("gbk"), "iconv -f GB18030 -t UTF-8 '{path}' > 'utf8-a b.txt'"),
        ("a.tsv.gz", gzip.compress("中文".encode("gbk"), mtime=0),
         "gzip -dc {path} | iconv -f GB18030 -t UTF-8 > utf8-a.tsv"),
        ("a.csv", "中文".encode("gbk"), "utf8-a.csv（或在 Excel 或 WPS 里另存为“CSV UTF-8"),
        ("a.csv", b"\xd0\xcf\x11\xe0\0", "{path} 是 Excel 工作簿或压缩包"),
        ("a.txt", "中文".encode("utf-16"), "iconv -f UTF-16 -t UTF-8"),
        ("a.txt", "text,label\n".encode("utf-16-le"), "iconv -f UTF-16LE -t UTF-8"),
        ("a.txt", "text,label\n".encode("utf-16-be"), "iconv -f UTF-16BE -t UTF-8"),
        ("a.txt", b"\xff\xff\xff", "也不是 GB18030"),
        ("a.txt", b"ab\n\0", "第 2 行含有二进制字节"),
    ],
)  # fmt: skip
def test_another_encoding_is_refused_with_the_command_that_converts_it(
    name: str, content: bytes, command: str, tmp_path: Path
) -> None:
    with pytest.raises(PlugError) as caught:
        lines(tmp_path / name, content)
    assert command.format(path=tmp_path / name) in str(caught.value)


def test_what_is_no_regular_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.txt")
    for path, complaint in (
        (tmp_path / "pipe.txt", "是管道或设备"),
        (Path("/dev/zero"), "是管道或设备"),
        (tmp_path, "是目录"),
        (tmp_path / "none", "不存在"),
        (Path("C:\\me\\a.csv"), "不存在。.*在 WSL 里应写 /mnt/c/me/a.csv"),
        (tmp_path / "a\0b", "不存在"),
        (tmp_path / ("长" * 300), "打不开"),
    ):
        with pytest.raises(UsageError, match=complaint):
            list(read_lines(path))


@pytest.mark.parametrize("ending", ["", ".gz", ".zst"])
def test_a_line_without_end_is_refused_before_memory_is_full(
    ending: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(textfiles, "LONGEST_LINE", 2**20)
    content = b"ab\n" + b"c" * 2**21
    packed = {"": content, ".gz": gzip.compress(content), ".zst": zstandard.compress(content)}
    with pytest.raises(PlugError, match="第 2 行超过 1 MiB"):
        lines(tmp_path / f"a.txt{ending}", packed[ending])


def test_small_helpers() -> None:
    assert [plain_suffix(Path(name)) for name in ("a.json.gz", "b.c.tsv", "d.zst", "e")] == [
        ".json", ".tsv", "", "",
    ]  # fmt: skip
    assert trim("\ufeff \u200b甲 \u200b乙\u3000\u200b") == "甲 \u200b乙"
    assert (is_text("甲"), is_text("\ud800"), is_text(3)) == (True, False, False)

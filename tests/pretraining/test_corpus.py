"""The corpus reader on files written here, byte by byte."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from plug.errors import PlugError, UsageError
from plug.pretraining.corpus import domain_name, expand_paths, read_documents, split_sentences


def documents(path: Path, content: bytes) -> list[str]:
    path.write_bytes(content)
    return list(read_documents(path))


# --- files -----------------------------------------------------------------------------------


def test_a_document_is_a_block_of_lines(tmp_path: Path) -> None:
    content = "\n\n甲\n  乙 丙\t\n \n丁\n\n\n\u3000戊\n己".encode()
    assert documents(tmp_path / "a.txt", content) == ["甲\n乙 丙", "丁", "戊\n己"]


def test_windows_lines_and_a_byte_order_mark(tmp_path: Path) -> None:
    content = b"\xef\xbb\xbf" + "甲\r\n乙\r\n\r\n丙\r\n".encode()
    assert documents(tmp_path / "a.txt", content) == ["甲\n乙", "丙"]


def test_marks_and_zero_width_lines_in_the_middle(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As `cat` of files that each begin with a byte-order mark leaves them."""
    content = "\ufeff甲\n\n\ufeff乙\n\u200b\n丙\ufeff丁\n\ufeff\n\u3000\n戊".encode()
    assert documents(tmp_path / "a.txt", content) == ["甲", "乙", "丙丁", "戊"]
    assert caplog.messages == [
        f"去掉了文件中间的字节顺序标记 U+FEFF：2 处（如 {tmp_path}/a.txt 第 3 行）。",
        f"去掉了一行里的字节顺序标记 U+FEFF：1 处（如 {tmp_path}/a.txt 第 5 行）。",
    ]


def test_json_lines(tmp_path: Path) -> None:
    lines = [
        json.dumps({"text": "甲\n乙", "id": 3}),
        "",
        json.dumps({"text": " 丙“丁” \r\n\n 戊 "}, ensure_ascii=False),
        json.dumps({"text": " \n"}),
    ]
    content = "\n".join(lines).encode()
    assert documents(tmp_path / "a.jsonl", content) == ["甲\n乙", "丙“丁”\n戊"]


@pytest.mark.parametrize("ending", ["txt", "jsonl"])
@pytest.mark.parametrize("compression", ["", ".gz", ".zst"])
def test_compressed_files_read_as_plain_ones(ending: str, compression: str, tmp_path: Path) -> None:
    wanted = [f"文档{number}" * 50 for number in range(3000)]
    if ending == "txt":
        content = "\n\n".join(wanted).encode()
    else:
        content = "\n".join(json.dumps({"text": text}) for text in wanted).encode()
    if compression == ".gz":
        content = gzip.compress(content)
    if compression == ".zst":  # two frames, one after another, as parallel compressors write them
        middle = len(content) // 2
        content = b"".join(
            zstandard.ZstdCompressor().compress(half)
            for half in (content[:middle], content[middle:])
        )
    assert documents(tmp_path / f"a.{ending}{compression}", content) == wanted


@pytest.mark.parametrize(
    ("compression", "keep"),
    [(c, k) for c in (".gz", ".zst") for k in (0.3, 0.9, 0.999)] + [(".zst", 0.0)],
)
def test_a_cut_file_is_an_error_not_a_shorter_corpus(
    compression: str, keep: float, tmp_path: Path
) -> None:
    text = "\n\n".join(str(number) * 9 for number in range(10**6, 10**6 + 9000)).encode()
    whole = gzip.compress(text) if compression == ".gz" else zstandard.compress(text)
    content = whole[: int(keep * len(whole))]
    with pytest.raises(PlugError, match=r"a\.txt\.(gz|zst) 无法解压"):
        documents(tmp_path / f"a.txt{compression}", content)


@pytest.mark.parametrize("compression", [".gz", ".zst"])
def test_a_file_that_is_not_compressed_as_named(compression: str, tmp_path: Path) -> None:
    with pytest.raises(PlugError, match="无法解压"):
        documents(tmp_path / f"a.txt{compression}", "纯文本，没有压缩。".encode() * 9)


def test_binary_bytes(tmp_path: Path) -> None:
    with pytest.raises(PlugError, match="第 3 行含有二进制字节"):
        documents(tmp_path / "a.txt", b"ab\ncd\ne\0f\n")


@pytest.mark.parametrize(
    ("encoding", "byte"),
    [
        ("latin-1", "0xe9"),
        ("gb18030", "0xd6"),
        ("utf-16", "是 UTF-16 文本。.*iconv -f UTF-16 -t UTF-8"),
    ],
)
def test_text_in_another_encoding(encoding: str, byte: str, tmp_path: Path) -> None:
    text = "plain\ncaf\u00e9\n" if encoding == "latin-1" else "plain\n中文\n"
    with pytest.raises(PlugError, match=byte) as caught:
        documents(tmp_path / "a.txt", text.encode(encoding))
    if byte.startswith("0x"):
        assert "第 2 行不是 UTF-8" in str(caught.value)
    if encoding == "gb18030":
        assert f"iconv -f GB18030 -t UTF-8 {tmp_path}/a.txt > utf8-a.txt" in str(caught.value)


@pytest.mark.parametrize(
    "line", ["{broken", '"text"', '{"txt": "a"}', '{"text": 3}', "[1]", '{"text": "\\ud800"}']
)
def test_a_broken_json_line_is_named(line: str, tmp_path: Path) -> None:
    content = f'{{"text": "好"}}\n\n{line}\n'.encode()
    with pytest.raises(PlugError, match=r"a\.jsonl 第 3 行") as caught:
        documents(tmp_path / "a.jsonl", content)
    assert caught.value.exit_code == 1


@pytest.mark.parametrize("content", [b"", b"\n \n\n", b"\xef\xbb\xbf"])
def test_a_file_without_documents(content: bytes, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="没有任何文档"):
        documents(tmp_path / "a.txt", content)


def test_missing_files_and_folders(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="不存在"):
        list(read_documents(tmp_path / "a.txt"))
    with pytest.raises(UsageError, match="不存在"):
        expand_paths([tmp_path / "a.txt"])
    with pytest.raises(UsageError, match="没有语料文件"):
        expand_paths([tmp_path])
    with pytest.raises(UsageError, match="没有给出"):
        expand_paths([])


def test_a_folder_is_its_corpus_files_in_order(tmp_path: Path) -> None:
    for name in ("b.txt", "a-01.txt.zst", "a-00.txt.zst", "notes.md", "c.jsonl.gz"):
        (tmp_path / name).touch()
    expanded = expand_paths([tmp_path / "b.txt", tmp_path])
    names = [path.name for path in expanded]
    assert names == ["b.txt", "a-00.txt.zst", "a-01.txt.zst", "b.txt", "c.jsonl.gz"]


def test_shards_of_a_domain_share_its_name() -> None:
    assert domain_name(Path("x/novels-01.txt.zst")) == "novels"
    assert domain_name(Path("novels.jsonl")) == "novels"
    assert domain_name(Path("web-2021-00.txt")) == "web-2021"


# --- sentences -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sentences",
    [
        ["今天天气很好。", "我们去公园。"],
        ["他说：“你好！”", "她笑了。"],
        ["（真的吗？）", "“是的……”", "他走了"],
        ["第一段。\n", "第二段\n", "\n", "第三段"],
        ["什么？！", "天黑了；", "没有人……", "Stop!", "3.14 is pi."],
        ["没有标点"],
        [],
    ],
)
def test_sentences_by_hand(sentences: list[str]) -> None:
    assert split_sentences("".join(sentences)) == sentences


@given(st.text(st.sampled_from("甲乙a 。！？；…!?\n”’」』）》】)\"'（“，"), max_size=40))
@settings(max_examples=300)
def test_sentences_make_up_the_text_and_end_where_sentences_end(text: str) -> None:
    sentences = split_sentences(text)
    assert "".join(sentences) == text
    assert all(sentences)
    closing = "”’」』）》】)\"'"
    for sentence in sentences[:-1]:
        assert sentence.rstrip("\n").rstrip(closing).endswith(tuple("。！？；…!?")) or (
            sentence.endswith("\n")
        )
    for sentence in sentences:  # one line at most, and one run of ends at most
        assert "\n" not in sentence[:-1]
        ends = [i for i, c in enumerate(sentence) if c in "。！？；…!?"]
        assert ends == list(range(ends[0], ends[0] + len(ends))) if ends else True

"""Text files to documents to sentences: what every other part of pre-training reads.

A corpus is a list of files. Plain text (`.txt`): a document is a run of non-empty lines, a blank
line ends it, its lines are paragraphs. JSON lines (`.jsonl`): one object a line, its document in
the key `text`. Either may be compressed (`.gz`, `.zst`).
"""

from __future__ import annotations

import gzip
import json
import re
import sys
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from plug.errors import PlugError, UsageError
from plug.tokenization import SENTENCE_END

SUFFIXES = (".txt", ".jsonl", ".txt.gz", ".txt.zst", ".jsonl.gz", ".jsonl.zst")

# A sentence ends after 。！？；… (or ASCII ! ?) with the closing quotes and brackets that follow,
# or at a line break.
_SENTENCE = re.compile(rf"[^。！？；…!?\n]*(?:{SENTENCE_END}\n?|\n|$)")


def split_sentences(text: str) -> list[str]:
    """Chinese sentences of ``text``; joined together they are ``text`` again."""
    return [sentence for sentence in _SENTENCE.findall(text) if sentence]


def expand_paths(paths: Iterable[Path]) -> list[Path]:
    """Files as they are, folders as the corpus files in them, sorted.

    Raises:
        UsageError: a path is missing, or a folder holds no corpus file.
    """
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = sorted(p for p in path.iterdir() if p.name.endswith(SUFFIXES))
            if not inside:
                raise UsageError(f"文件夹 {path} 里没有语料文件（{'、'.join(SUFFIXES)}）。")
            files += inside
        elif path.is_file():
            files.append(path)
        else:
            raise UsageError(f"文件 {path} 不存在。")
    if not files:
        raise UsageError("没有给出语料文件。")
    return files


def domain_name(path: Path) -> str:
    """`novels-01.txt.zst` is a shard of the domain `novels`."""
    return re.sub(r"-\d+$", "", path.name.split(".")[0])


def read_documents(path: Path) -> Iterator[str]:
    """The documents of one file, in order; paragraphs are joined by line breaks.

    A paragraph is a line without the blanks around it; empty ones are left out, in JSON as well.

    Raises:
        UsageError: the file is missing or holds no document.
        PlugError: bytes that are not UTF-8 text, a broken JSON line (with its line number), or a
            file that ends too early or cannot be read.
    """
    empty = True
    for document in _documents(path):
        empty = False
        yield document
    if empty:
        raise UsageError(f"{path} 里没有任何文档。")


def _documents(path: Path) -> Iterator[str]:
    is_json = ".jsonl" in path.name
    paragraphs: list[str] = []
    for number, line in read_lines(path):
        if is_json:
            if line and (document := _json_text(line, path, number)):
                yield document
        elif line:
            paragraphs.append(line)
        elif paragraphs:
            yield "\n".join(paragraphs)
            paragraphs = []
    if paragraphs:
        yield "\n".join(paragraphs)


def _json_text(line: str, path: Path, number: int) -> str:
    try:
        text = json.loads(line)["text"]
    except (ValueError, KeyError, TypeError):
        raise PlugError(f'{path} 第 {number} 行不是带有 "text" 键的 JSON 对象。') from None
    if not isinstance(text, str):
        raise PlugError(f'{path} 第 {number} 行的 "text" 不是字符串。')
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise PlugError(f'{path} 第 {number} 行的 "text" 含有孤立的代理码位，不是文本。')
    return "\n".join(filter(None, map(str.strip, text.split("\n"))))


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """(line number from 1, stripped text) of a file, decoded line by line."""
    number = 0
    try:
        for number, raw in enumerate(_raw_lines(path), start=1):
            if b"\0" in raw:
                raise PlugError(f"{path} 第 {number} 行含有二进制字节，不是文本。")
            yield number, raw.decode("utf-8-sig" if number == 1 else "utf-8").strip()
    except UnicodeDecodeError as error:
        raise PlugError(
            f"{path} 第 {number} 行不是 UTF-8 文本（字节 {error.object[error.start]:#04x}）。"
            "请先转换编码。"
        ) from None
    except _decompression_errors() as error:
        raise PlugError(f"{path} 无法解压（第 {number} 行之后）：{error}。请重新取得。") from None
    except OSError as error:
        raise PlugError(f"{path} 读不了：{error.strerror or error}。") from None


def _decompression_errors() -> tuple[type[Exception], ...]:
    errors: tuple[type[Exception], ...] = (EOFError, gzip.BadGzipFile, zlib.error)
    if "zstandard" in sys.modules:
        errors += (sys.modules["zstandard"].ZstdError,)
    return errors


def _raw_lines(path: Path) -> Iterator[bytes]:
    if not path.is_file():
        raise UsageError(f"文件 {path} 不存在。")
    if path.suffix == ".zst":
        yield from _zst_lines(path)
        return
    with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as stream:
        yield from stream


def _zst_lines(path: Path) -> Iterator[bytes]:
    """Lines of all frames of the file; zstandard's own reader takes a cut file for a whole one."""
    try:
        import zstandard
    except ImportError:
        raise UsageError(
            f'读取 {path} 需要 zstandard。请安装：pip install "plug-zh[train]"'
        ) from None
    decompressor = zstandard.ZstdDecompressor(max_window_size=2**31)
    frame, rest = decompressor.decompressobj(), b""
    with path.open("rb") as file:
        while data := file.read(2**20):
            while data:
                if frame.eof:
                    frame = decompressor.decompressobj()
                *lines, rest = (rest + frame.decompress(data)).split(b"\n")
                yield from lines
                data = frame.unused_data
    if not frame.eof:
        raise EOFError("文件不完整")
    if rest:
        yield rest

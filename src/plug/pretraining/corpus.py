"""Text files to documents to sentences: what every other part of pre-training reads.

A corpus is a list of files. Plain text (`.txt`): a document is a run of non-empty lines, a blank
line ends it, its lines are paragraphs. JSON lines (`.jsonl`): one object a line, its document in
the key `text`. Either may be compressed (`.gz`, `.zst`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from plug.errors import PlugError, UsageError
from plug.jsonfiles import parse_json
from plug.textfiles import BYTE_ORDER_MARK, Notes, is_text, read_lines, trim
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


def read_documents(path: Path, notes: Notes | None = None) -> Iterator[str]:
    """The documents of one file, in order; paragraphs are joined by line breaks.

    A paragraph is a line without the blanks and zero-width characters around it. Empty paragraphs
    are left out, in JSON as well. U+FEFF is left out everywhere.

    Args:
        path: of a corpus file.
        notes: is told of every U+FEFF that is left out; they are logged at the file's end.

    Raises:
        UsageError: the file is missing or holds no document.
        PlugError: bytes that are not UTF-8 text, a broken JSON line (with its line number), or a
            file that ends too early or cannot be read.
    """
    notes = notes or Notes()
    empty = True
    for document in _documents(path, notes):
        empty = False
        yield document
    notes.log()
    if empty:
        raise UsageError(f"{path} 里没有任何文档。")


def _documents(path: Path, notes: Notes) -> Iterator[str]:
    is_json = ".jsonl" in path.name
    paragraphs: list[str] = []
    for number, line in read_lines(path, notes):
        place = f"{path} 第 {number} 行"
        if is_json:
            if line.strip() and (document := _json_text(line, place, notes)):
                yield document
        elif paragraph := _paragraph(line, place, notes):
            paragraphs.append(paragraph)
        elif paragraphs:
            yield "\n".join(paragraphs)
            paragraphs = []
    if paragraphs:
        yield "\n".join(paragraphs)


def _paragraph(line: str, place: str, notes: Notes) -> str:
    """The line without blanks and zero-width characters around it, and without U+FEFF in it."""
    if BYTE_ORDER_MARK in line:
        notes.add("去掉了一行里的字节顺序标记 U+FEFF", place)
        line = line.replace(BYTE_ORDER_MARK, "")
    return trim(line)


def _json_text(line: str, place: str, notes: Notes) -> str:
    value = parse_json(line.encode(), place)
    if not isinstance(value, dict) or "text" not in value:
        raise PlugError(f'{place}不是带有 "text" 键的 JSON 对象。')
    text = value["text"]
    if not isinstance(text, str):
        raise PlugError(f'{place}的 "text" 不是字符串。')
    if not is_text(text):
        raise PlugError(f'{place}的 "text" 含有孤立的代理码位，不是文本。')
    return "\n".join(filter(None, (_paragraph(part, place, notes) for part in text.split("\n"))))

"""Lines of UTF-8 text files, plain or compressed (`.gz`, `.zst`): all readers of data use this.

A line is given out as it stands in the file, blanks included, without its ending. Lines end as in
Python's text files: at a line feed, a carriage return, or both. A byte-order mark at the start of a
line is no text: it is left off, and counted where it is not at the start of the file.
"""

from __future__ import annotations

import gzip
import logging
import re
import shlex
import stat
import sys
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from plug.errors import PlugError, UsageError, install
from plug.files import about_windows_path

logger = logging.getLogger(__name__)

BYTE_ORDER_MARK = "\ufeff"
INVISIBLE = "\ufeff\u200b\u200c\u200d\u2060"  # zero-width characters; a line of these is empty
AS_CSV = "在 Excel 或 WPS 里另存为“CSV UTF-8（逗号分隔）”"
LONGEST_LINE = 2**28  # bytes; a SQuAD file is one line

_EDGES = re.compile(rf"^[\s{INVISIBLE}]+|[\s{INVISIBLE}]+$")
_COMPRESSED = (".gz", ".zst")
_WORKBOOKS = (b"PK\x03\x04", b"\xd0\xcf\x11\xe0")  # how .xlsx (a zip) and .xls files begin
_CHUNK = 2**18  # bytes asked of a file at once
_ZST_CHUNK = 2**13  # compressed bytes: they may expand 30,000 times


class Notes:
    """What a reader corrected or passed over: how often, and where first.

    Readers correct what has one certain reading. Each correction is counted here, and the commands
    show the counts, so that nothing changes in silence.
    """

    def __init__(self) -> None:
        self._logged = 0
        self._found: dict[str, tuple[int, str]] = {}

    def add(self, what: str, place: str) -> None:
        count, first = self._found.get(what, (0, place))
        self._found[what] = (count + 1, first)

    def log(self) -> None:
        """Warn of what was added since the last call, a line each."""
        lines = self.lines()
        for line in lines[self._logged :]:
            logger.warning(line)
        self._logged = len(lines)

    def lines(self) -> list[str]:
        """One sentence for each kind of correction, in the order of their first places."""
        return [
            f"{what}：{count} 处（如 {first}）。" for what, (count, first) in self._found.items()
        ]


def plain_suffix(path: Path) -> str:
    """The ending of a file's name, that of its compression left aside: `.json` of `a.json.gz`."""
    name = path.name.removesuffix(path.suffix) if path.suffix in _COMPRESSED else path.name
    return Path(name).suffix


def check_regular_file(path: Path) -> None:
    """Refuse what is not a file on a disk: reading a pipe or a device may never end.

    Raises:
        UsageError: the path does not exist, or is a folder, a pipe, a socket or a device.
    """
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError, ValueError):
        raise UsageError(f"文件 {path} 不存在。{about_windows_path(path)}") from None
    except OSError as error:
        raise UsageError(f"文件 {path} 打不开：{error.strerror or error}。") from None
    if stat.S_ISDIR(mode):
        raise UsageError(f"{path} 是目录，不是文件。")
    if not stat.S_ISREG(mode):
        raise UsageError(f"{path} 是管道或设备，不是普通文件。请先存成文件再读。")


def read_lines(path: Path, notes: Notes | None = None) -> Iterator[tuple[int, str]]:
    """(line number from 1, the line without its ending) of a file, decoded line by line.

    Args:
        path: plain, or compressed as its ending says.
        notes: is told of byte-order marks in the middle of the file.

    Raises:
        UsageError: no regular file, or `zstandard` is missing.
        PlugError: bytes that are not UTF-8 text (with the line and the command that converts
            them), a line of more than 256 MiB, or a file that ends too early or cannot be read.
    """
    check_regular_file(path)
    number = 0
    try:
        for number, raw in enumerate(_raw_lines(path), start=1):
            if number == 1 and raw.startswith((b"\xff\xfe", b"\xfe\xff")):
                raise PlugError(f"{path} 是 UTF-16 文本。{_conversion(path, 'UTF-16')}")
            if number == 1 and raw.startswith(_WORKBOOKS):
                raise PlugError(f"{path} 是 Excel 工作簿或压缩包，不是文本。请{AS_CSV}，或先解压。")
            if b"\0" in raw:
                raise PlugError(_about_zero_bytes(path, number, raw))
            yield number, _decoded(path, number, raw, notes)
    except _decompression_errors() as error:
        raise PlugError(
            f"{path} 无法解压（第 {number} 行之后）：{one_line(error)}。请重新取得。"
        ) from None
    except OSError as error:
        raise PlugError(f"{path} 读不了：{error.strerror or error}。") from None
    except MemoryError:
        raise PlugError(f"{path} 第 {number} 行之后太大，内存放不下。") from None


def trim(text: str) -> str:
    """The text without blanks and zero-width characters around it."""
    return _EDGES.sub("", text)


def is_text(value: object) -> bool:
    """Whether a value is a string that can be encoded: one without lone surrogates."""
    return isinstance(value, str) and not any("\ud800" <= each <= "\udfff" for each in value)


def one_line(error: BaseException) -> str:
    """A library's error message without line breaks, 300 characters at most."""
    return " ".join(str(error).split())[:300]


def _decoded(path: Path, number: int, raw: bytes, notes: Notes | None) -> str:
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        byte = f"字节 {raw[error.start]:#04x}"
        try:
            raw.decode("gb18030")
        except UnicodeDecodeError:
            advice = "它也不是 GB18030，可能已损坏，请重新取得，或先转换成 UTF-8。"
        else:
            advice = _conversion(path, "GB18030")
        raise PlugError(f"{path} 第 {number} 行不是 UTF-8 文本（{byte}）。{advice}") from None
    bare = text.lstrip(BYTE_ORDER_MARK)
    if number > 1 and len(bare) < len(text) and notes is not None:
        notes.add("去掉了文件中间的字节顺序标记 U+FEFF", f"{path} 第 {number} 行")
    return bare


def _about_zero_bytes(path: Path, number: int, raw: bytes) -> str:
    for offset, name in ((1, "UTF-16LE"), (0, "UTF-16BE")):
        high = raw[offset::2]
        if len(raw) > 3 and high.count(0) > 0.4 * len(high):  # ASCII letters of UTF-16
            return f"{path} 第 {number} 行像是 {name} 文本。{_conversion(path, name)}"
    return f"{path} 第 {number} 行含有二进制字节（NUL），不是文本。"


def _conversion(path: Path, encoding: str) -> str:
    """The command that makes UTF-8 of a file."""
    name = shlex.quote(str(path))
    unpack = {".gz": f"gzip -dc {name} | ", ".zst": f"zstd -dc {name} | "}.get(path.suffix, "")
    bare = path.name.removesuffix(path.suffix) if unpack else path.name
    target = shlex.quote(f"utf8-{bare}")
    source = "" if unpack else f"{name} "
    command = f"请先转换：{unpack}iconv -f {encoding} -t UTF-8 {source}> {target}"
    return f"{command}（或{AS_CSV}）" if path.suffix == ".csv" else command


def _decompression_errors() -> tuple[type[Exception], ...]:
    errors: tuple[type[Exception], ...] = (EOFError, gzip.BadGzipFile, zlib.error)
    if "zstandard" in sys.modules:
        errors += (sys.modules["zstandard"].ZstdError,)
    return errors


def _raw_lines(path: Path) -> Iterator[bytes]:
    """Lines without their endings, none longer than `LONGEST_LINE`."""
    parts: list[bytes] = []
    length = number = 0
    held = b""  # a \r at the end of a chunk: the next may begin with the \n that belongs to it
    for chunk in _chunks(path):
        chunk, held = held + chunk, b""
        if chunk.endswith(b"\r"):
            chunk, held = chunk[:-1], b"\r"
        for line in chunk.splitlines(keepends=True):  # of bytes: at \n, \r and \r\n alone
            bare = line.rstrip(b"\r\n")
            parts.append(bare)
            length += len(bare)
            if length > LONGEST_LINE:
                raise PlugError(f"{path} 第 {number + 1} 行超过 {LONGEST_LINE >> 20} MiB，不读。")
            if len(bare) < len(line):
                yield b"".join(parts)
                parts, length, number = [], 0, number + 1
    if held or any(parts):
        yield b"".join(parts)


def _chunks(path: Path) -> Iterable[bytes]:
    if path.suffix == ".zst":
        return _zst_chunks(path)
    return _file_chunks(path)


def _file_chunks(path: Path) -> Iterator[bytes]:
    with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            yield chunk


def _zst_chunks(path: Path) -> Iterator[bytes]:
    """Bytes of all frames of the file; zstandard's own reader takes a cut file for a whole one."""
    try:
        import zstandard
    except ImportError:
        raise UsageError(f"读取 {path} 需要 zstandard。请安装：{install('train')}") from None
    decompressor = zstandard.ZstdDecompressor(max_window_size=2**31)
    frame = decompressor.decompressobj()
    with path.open("rb") as file:
        while data := file.read(_ZST_CHUNK):
            while data:
                if frame.eof:
                    frame = decompressor.decompressobj()
                yield frame.decompress(data)
                data = frame.unused_data
    if not frame.eof:
        raise EOFError("文件不完整")

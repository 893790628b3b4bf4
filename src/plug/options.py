"""Options as data: a field of a settings dataclass carries its help, its limits and its kind.

The command line, the help texts, the tables in `docs/` and the checks are made from these fields,
so that an option is written in one place. Imports no torch.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import numbers
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from plug.errors import UsageError
from plug.jsonfiles import read_bytes

S = TypeVar("S")
REQUIRED = dataclasses.MISSING


class Kind(Protocol):
    """What values an option takes.

    Attributes:
        word_type: the Python type of one word on the command line.
        is_repeated: whether the command line takes the option several times.
        limits: the accepted values, for tables; "" where the type says all.
    """

    @property
    def word_type(self) -> type[Any]: ...

    @property
    def is_repeated(self) -> bool: ...

    @property
    def limits(self) -> str: ...

    def check(self, name: str, value: object) -> Any:
        """Return the value as the settings keep it; raise a `UsageError` if it is not accepted."""
        ...


@dataclass(frozen=True, slots=True)
class Int:
    """An integer in low … high; integers of NumPy become Python's."""

    low: int
    high: int | None = None
    word_type = int
    is_repeated = False

    @property
    def limits(self) -> str:
        return f"≥ {self.low:,}" if self.high is None else f"{self.low:,} … {self.high:,}"

    def check(self, name: str, value: object) -> int:
        if _is_bool(value) or not isinstance(value, numbers.Integral):
            raise UsageError(f"{name}={_shown(value)} 应是整数。")
        number = int(value)
        if number < self.low or (self.high is not None and number > self.high):
            limits = (
                f"不小于 {self.low}" if self.high is None else f"在 {self.low} 到 {self.high} 之间"
            )
            raise UsageError(f"{name}={_shown(number)} 应{limits}。")
        return number


@dataclass(frozen=True, slots=True)
class Float:
    """A finite number in low … high, or 0 where ``zero`` is set; always kept as a float."""

    low: float
    high: float
    zero: bool = False
    word_type = float
    is_repeated = False

    @property
    def limits(self) -> str:
        return f"{'0 or ' if self.zero else ''}{self.low:g} … {self.high:g}"

    def check(self, name: str, value: object) -> float:
        if _is_bool(value) or not isinstance(value, numbers.Real):
            raise UsageError(f"{name}={_shown(value)} 应是一个数。")
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if number == 0 and self.zero:
            return 0.0
        if not self.low <= number <= self.high:  # NaN neither
            zero = "是 0，或" if self.zero else ""
            raise UsageError(
                f"{name}={_shown(value)} 应{zero}在 {self.low:g} 到 {self.high:g} 之间。"
            )
        return number


@dataclass(frozen=True, slots=True)
class Bool:
    """True or False."""

    word_type = bool
    is_repeated = False
    limits = ""

    def check(self, name: str, value: object) -> bool:
        if not _is_bool(value):
            raise UsageError(f"{name}={_shown(value)} 应是 True 或 False。")
        return bool(value)


@dataclass(frozen=True, slots=True)
class Choice:
    """One of a few words."""

    words: tuple[str, ...]
    word_type = str
    is_repeated = False

    @property
    def limits(self) -> str:
        return ", ".join(f"`{word}`" for word in self.words)

    def check(self, name: str, value: object) -> str:
        if not isinstance(value, str) or value not in self.words:
            raise UsageError(
                f"{name}={_shown(value)} 只能是 {' 或 '.join(map(repr, self.words))}。"
            )
        return value


@dataclass(frozen=True, slots=True)
class Text:
    """A string, perhaps empty."""

    longest: int
    word_type = str
    is_repeated = False

    @property
    def limits(self) -> str:
        return f"≤ {self.longest} characters"

    def check(self, name: str, value: object) -> str:
        if not isinstance(value, str) or len(value) > self.longest or "\0" in value:
            raise UsageError(f"{name}={_shown(value)} 应是至多 {self.longest} 个字的文字。")
        return value


@dataclass(frozen=True, slots=True)
class Strings:
    """One string or a few; kept as a tuple without repetitions."""

    most: int
    longest: int
    word_type = str
    is_repeated = True

    @property
    def limits(self) -> str:
        return f"≤ {self.most} strings of ≤ {self.longest} characters"

    def check(self, name: str, value: object) -> tuple[str, ...]:
        values = [value] if isinstance(value, str) else _listed(name, value, self.most)
        for each in values:
            if not isinstance(each, str) or not 1 <= len(each) <= self.longest:
                raise UsageError(
                    f"{name} 里的 {_shown(each)} 应是 1 到 {self.longest} 个字的文字。"
                )
        return tuple(dict.fromkeys(values))


@dataclass(frozen=True, slots=True)
class TokenIds:
    """One token id or several; kept as a tuple without repetitions."""

    most: int
    word_type = int
    is_repeated = True

    @property
    def limits(self) -> str:
        return f"≤ {self.most:,} ids of the vocabulary"

    def check(self, name: str, value: object) -> tuple[int, ...]:
        is_one = isinstance(value, numbers.Integral)
        values = [value] if is_one else _listed(name, value, self.most)
        return tuple(dict.fromkeys(_token_id(name, each) for each in values))


@dataclass(frozen=True, slots=True)
class Biases:
    """A number for each of some token ids: a mapping, or words of the form "ID=NUMBER"."""

    most: int
    size: float
    word_type = str
    is_repeated = True

    @property
    def limits(self) -> str:
        return f"≤ {self.most:,} ids of the vocabulary, −{self.size:g} … {self.size:g}"

    def check(self, name: str, value: object) -> dict[int, float]:
        if isinstance(value, Mapping):
            pairs = list(value.items())
        else:
            pairs = [self._pair(name, word) for word in _listed(name, value, self.most)]
        if len(pairs) > self.most:
            raise UsageError(f"{name} 有 {len(pairs)} 项，至多 {self.most} 项。")
        number = Float(-self.size, self.size)
        return {
            _token_id(name, key): number.check(f"{name}[{_shown(key)}]", bias)
            for key, bias in pairs
        }

    @staticmethod
    def _pair(name: str, word: object) -> tuple[str, float]:
        key, _, bias = word.partition("=") if isinstance(word, str) else ("", "", "")
        try:
            return key, float(bias)
        except ValueError:
            raise UsageError(f"{name}={_shown(word)} 应写成 词元编号=数，如 1234=-5。") from None


@dataclass(frozen=True, slots=True)
class Table:
    """A table of other options: an object of a settings dataclass, or a mapping."""

    settings: type
    word_type = str
    is_repeated = False
    limits = "a table"

    def check(self, name: str, value: object) -> Any:
        if not isinstance(value, (self.settings, Mapping)):
            raise UsageError(f"{name}={_shown(value)} 应是一个表，如 [{name}]。")
        return merge(self.settings, value, {})


@dataclass(frozen=True, slots=True)
class Option:
    """What a field's metadata says under "option".

    Attributes:
        chinese: help of the command line, one or two sentences.
        english: the same, for the tables of the documentation.
        kind: the values it takes.
        unset: what None, or an empty default, means: Chinese and English; "" where the default
            says it.
    """

    chinese: str
    english: str
    kind: Kind
    unset: tuple[str, str] = ("", "")


def option(
    default: Any, kind: Kind, chinese: str, english: str, unset: tuple[str, str] = ("", "")
) -> Any:
    """Return a dataclass field with this default; the arguments are those of `Option`.

    `REQUIRED` as the default makes a field that must be given.
    """
    metadata = {"option": Option(chinese, english, kind, unset)}
    if isinstance(default, dict):  # kept out of the hash: a dict has none
        return dataclasses.field(default_factory=dict, metadata=metadata, hash=False)
    return dataclasses.field(default=default, metadata=metadata)


def options_of(settings: type) -> dict[str, tuple[Any, Option]]:
    """Return the default and the `Option` of each field of a settings dataclass, by its name."""
    found = {}
    for field in dataclasses.fields(settings):
        factory = field.default_factory
        default = field.default if factory is dataclasses.MISSING else factory()
        found[field.name] = default, field.metadata["option"]
    return found


def check_options(settings: Any) -> None:
    """Replace each field of a frozen settings object by its checked value.

    Raises:
        UsageError: a value is of another type than the option takes, or outside its limits.
    """
    for name, (default, each) in options_of(type(settings)).items():
        value = getattr(settings, name)
        if value is None and (default is None or each.kind.is_repeated):
            value = default
        else:
            value = each.kind.check(name, value)
        object.__setattr__(settings, name, value)


def merge(kind: type[S], settings: S | Mapping[str, Any] | None, changes: Mapping[str, Any]) -> S:
    """Return ``settings`` (None: the defaults) with ``changes``, as a new object of ``kind``.

    Raises:
        UsageError: a name is unknown, a value is not accepted, or ``settings`` is something else.
    """
    if settings is None:
        base: dict[str, Any] = {}
    elif isinstance(settings, kind):
        if not changes:
            return settings
        fields = dataclasses.fields(kind)  # type: ignore[arg-type]  # a dataclass
        base = {field.name: getattr(settings, field.name) for field in fields}
    elif isinstance(settings, Mapping):
        base = dict(settings)
    else:
        raise UsageError(f"settings 应是 {kind.__name__} 或字典，却是 {type(settings).__name__}。")
    values = base | dict(changes)
    known = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
    for name in values:
        if name not in known:
            raise UsageError(unknown_option(str(name), known))
    return kind(**values)


def unknown_option(name: str, known: Sequence[str]) -> str:
    """Say that there is no option ``name``, and which of ``known`` may be meant."""
    if close := difflib.get_close_matches(name, known, 1):
        return f"没有选项 {name}。是否想用 {close[0]}？"
    return f"没有选项 {name}。可用的有：{'、'.join(known)}。"


def read_toml(path: Path) -> dict[str, Any]:
    """Return what a TOML file of settings says.

    Raises:
        UsageError: the file cannot be read, or is no TOML.
    """
    if not path.exists():
        raise UsageError(f"设置文件 {path} 不存在。")
    content = read_bytes(path, UsageError)
    try:
        return tomllib.loads(content.decode("utf-8"))
    except RecursionError:
        raise UsageError(f"{path} 的嵌套太深，不是正常的设置文件。") from None
    except ValueError as error:  # also what is not UTF-8
        raise UsageError(f"{path} 不是有效的 TOML：{error}") from None


def parse_assignments(assignments: Sequence[str]) -> dict[str, Any]:
    """Return what words of the form "NAME=VALUE" say; values as in TOML, a bare word is a string.

    Raises:
        UsageError: a word has no "=".
    """
    values: dict[str, Any] = {}
    for assignment in assignments:
        name, equals, value = assignment.partition("=")
        if not equals:
            raise UsageError(f"--set {assignment!r} 应写成 名字=值。")
        try:
            values = merge_tables(values, tomllib.loads(f"{name} = {value}"))
        except (tomllib.TOMLDecodeError, RecursionError):
            values = merge_tables(values, _nested(name.strip(), value.strip()))
    return values


def _nested(name: str, value: str) -> dict[str, Any]:
    """``("a.b", "x")`` as ``{"a": {"b": "x"}}``."""
    first, dot, rest = name.partition(".")
    return {first: _nested(rest, value) if dot else value}


def merge_tables(settings: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Return ``settings`` with ``changes``; of a table in both, only the keys in ``changes``."""
    merged = settings | changes
    for name in settings.keys() & changes.keys():
        if isinstance(settings[name], dict) and isinstance(changes[name], dict):
            merged[name] = settings[name] | changes[name]
    return merged


def markdown_table(settings: type) -> str:
    """Return the options as the rows of a table: name, default, accepted values, meaning."""
    rows = ["| option | default | values | meaning |", "| --- | --- | --- | --- |"]
    for name, (default, each) in options_of(settings).items():
        shown = each.unset[1] or ("none" if default in ((), {}, None) else f"`{default}`")
        if default is REQUIRED:
            shown = "must be given"
        rows.append(f"| `{name}` | {shown} | {each.kind.limits} | {each.english} |")
    return "\n".join(rows) + "\n"


def check_int(name: str, value: object, low: int, high: int | None = None) -> int:
    """Return ``value`` as an int; raise a `UsageError` that names the limits if it is not one."""
    return Int(low, high).check(name, value)


def _listed(name: str, value: object, most: int) -> list[Any]:
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(
        value, (Sequence, set, frozenset)
    ):
        raise UsageError(f"{name}={_shown(value)} 应是一个列表。")
    values = sorted(value) if isinstance(value, (set, frozenset)) else list(value)
    if len(values) > most:
        raise UsageError(f"{name} 有 {len(values)} 项，至多 {most} 项。")
    return values


def _token_id(name: str, value: object) -> int:
    if isinstance(value, str) and value.isascii() and value.isdigit():
        value = int(value[:20])  # keys of JSON objects are strings
    return Int(0, 2**31 - 1).check(f"{name} 的词元编号", value)


def _is_bool(value: object) -> bool:
    return isinstance(value, bool) or type(value).__name__ in ("bool_", "bool")  # NumPy's


def _shown(value: object) -> str:
    """``value`` for a message, cut: a user may have passed a whole text, or 2**100000."""
    if isinstance(value, int) and abs(value) >= 10**30:
        return f"{'-' if value < 0 else ''}(超过 30 位的整数)"
    shown = str(value) if isinstance(value, (int, float)) else repr(value)
    return shown if len(shown) <= 60 else shown[:59] + "…"


def bytes_of(text: str, name: str) -> int:
    """Return a size of memory in bytes: 24GB, 24G or 24 are 10^9 each; 24GiB is 2^30.

    Raises:
        UsageError: it is none; ``name`` says of what.
    """
    found = re.fullmatch(r"\s*(\d{1,9}(?:\.\d+)?)\s*(G|GB|GIB|M|MB|MIB|)\s*", text.upper())
    units = {"M": 10**6, "MB": 10**6, "MIB": 2**20, "GIB": 2**30}
    if found is None or not float(found[1]):
        raise UsageError(f"{name} {text} 不是显存的大小。请写如 24GB 或 80GB。")
    return int(float(found[1]) * units.get(found[2], 10**9))

"""Options as data: each kind accepts what it says, keeps it in one form, and refuses the rest."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from plug.errors import UsageError
from plug.options import (
    Biases,
    Bool,
    Choice,
    Float,
    Int,
    Kind,
    Strings,
    TokenIds,
    check_options,
    markdown_table,
    merge,
    merge_tables,
    option,
    parse_assignments,
    read_toml,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    count: int = option(3, Int(1, 9), "个数。", "how many")
    share: float | None = option(None, Float(0, 1), "份额。", "of all", unset=("全部", "all"))
    bias: dict[int, float] = option({}, Biases(2, 100), "偏置。", "added")

    def __post_init__(self) -> None:
        check_options(self)


def test_a_settings_file_and_assignments(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text('name = "甲"\n[model]\nsize = 3\nheads = 2\n')
    found = merge_tables(
        read_toml(tmp_path / "a.toml"), parse_assignments(["model.size=4", "name=乙", "share=0.5"])
    )
    assert found == {"name": "乙", "model": {"size": 4, "heads": 2}, "share": 0.5}


@pytest.mark.parametrize("content", [b"\xff\xfe", b"a = ", b"a = " + b"[" * 100_000])
def test_what_is_no_settings_file(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_bytes(content)
    with pytest.raises(UsageError, match=r"a\.toml"):
        read_toml(tmp_path / "a.toml")
    with pytest.raises(UsageError, match="应写成 名字=值"):
        parse_assignments(["steps"])


@pytest.mark.parametrize(
    ("kind", "value", "kept"),
    [
        (Int(0, 5), np.int64(5), 5),
        (Float(0, 1), np.float32(0.5), 0.5),
        (Float(0, 1), 1, 1.0),
        (Float(0.5, 1, zero=True), -0.0, 0.0),
        (Bool(), np.bool_(False), False),
        (Strings(2, 5), "句", ("句",)),
        (Strings(3, 5), ["句", "子", "句"], ("句", "子")),
        (TokenIds(3), 7, (7,)),
        (TokenIds(3), {9, 8}, (8, 9)),
        (TokenIds(3), np.array([4, 4]).tolist(), (4,)),
        (Biases(2, 100), {"12": 1, 3: -2.5}, {12: 1.0, 3: -2.5}),
        (Biases(2, 100), ["12=1", "3=-2.5"], {12: 1.0, 3: -2.5}),
    ],
)
def test_an_accepted_value_is_kept_in_one_form(kind: Kind, value: object, kept: object) -> None:
    found = kind.check("name", value)

    assert found == kept
    assert type(found) is type(kept)


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        *[(Int(0, 5), bad) for bad in (6, -1, 2**63, True, 1.0, "1", None, [1], math.nan)],
        *[
            (Float(0.5, 1, zero=True), bad)
            for bad in (0.1, 1e-50, 2, math.nan, math.inf, -math.inf, "1", True, None, 1j)
        ],
        *[(Bool(), bad) for bad in (0, 1, "no", None)],
        *[(Choice(("a", "b")), bad) for bad in ("c", None, ["a"], 1)],
        *[(Strings(2, 5), bad) for bad in ("", "一二三四五六", ["a", "b", "c"], [1], 1, {"a": 1})],
        *[(TokenIds(2), bad) for bad in (-1, [1, 2, 3], [1.0], [True], "1", 2**40, b"12")],
        *[
            (Biases(2, 100), bad)
            for bad in ({1: 101}, {1: math.nan}, {-1: 1}, {"x": 1}, ["1"], ["1=x"], "1=2", 3)
        ],
        (Biases(2, 100), {1: 1, 2: 2, 3: 3}),
    ],
)
def test_any_other_value_is_refused_in_one_short_line(kind: Kind, value: object) -> None:
    with pytest.raises(UsageError, match="name") as error:
        kind.check("name", value)

    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 200


@pytest.mark.parametrize("kind", [Int(0, 5), Float(0, 5), TokenIds(2)])
def test_a_number_that_python_cannot_print_is_refused(kind: Kind) -> None:
    with pytest.raises(UsageError, match="超过 30 位"):
        kind.check("name", 10**5000)


def test_changes_are_merged_into_settings_and_leave_them_alone() -> None:
    settings = Settings(count=5)

    assert merge(Settings, None, {}) == Settings()
    assert merge(Settings, settings, {}) is settings
    assert merge(Settings, settings, {"share": 0.5}) == Settings(count=5, share=0.5)
    assert merge(Settings, {"count": 2}, {"share": 0.5}) == Settings(count=2, share=0.5)
    assert settings == Settings(count=5)
    assert hash(settings) == hash(Settings(count=5))


@pytest.mark.parametrize(
    ("settings", "changes", "says"),
    [
        (None, {"cuont": 1}, "没有选项 cuont。是否想用 count？"),
        (None, {"zzz": 1}, "可用的有：count、share、bias"),
        ({"cuont": 1}, {}, "是否想用 count"),
        (3, {}, "却是 int"),
        (None, {"count": None}, "count=None"),
    ],
)
def test_unknown_names_and_other_settings_are_refused(
    settings: Any, changes: dict[str, Any], says: str
) -> None:
    with pytest.raises(UsageError, match=says):
        merge(Settings, settings, changes)


def test_the_table_has_a_row_for_each_option() -> None:
    assert markdown_table(Settings).splitlines()[2:] == [
        "| `count` | `3` | 1 … 9 | how many |",
        "| `share` | all | 0 … 1 | of all |",
        "| `bias` | none | ≤ 2 ids of the vocabulary, −100 … 100 | added |",
    ]

"""Rows of every format, with their places."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from plug.errors import PlugError, UsageError
from plug.finetuning.readers import read_classification
from plug.finetuning.rows import read_rows

ROWS = [{"text": "好", "label": "1"}, {"text": '5寸"屏', "label": "0"}]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", '{"text": "好", "label": "1"}\n\n{"text": "5寸\\"屏", "label": "0"}\n'),
        ("a.csv", 'text,label\n好,1\n"5寸""屏",0\n'),
        ("a.tsv", 'text\tlabel\n\n好\t1\n5寸"屏\t0\n'),
    ],
)
@pytest.mark.parametrize("ending", ["\n", "\r\n", "\r"])
def test_a_row_is_the_same_in_every_format(
    name: str, content: str, ending: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content.replace("\n", ending).encode())
    assert [row for _, row in read_rows(tmp_path / name)] == ROWS


def test_parquet_streams_and_says_what_is_wrong(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": ["好", "坏"], "label": [1.0, math.nan]}), path)
    found = read_classification(path)
    assert next(found).label == "1"
    with pytest.raises(UsageError, match="第 2 行的标签应是文字或整数，却是 nan"):
        next(found)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(PlugError, match=r"a\.parquet 不是完整的 parquet 文件"):
        list(read_rows(path))


def test_what_holds_no_rows(tmp_path: Path) -> None:
    (tmp_path / "a.xlsx").write_text("x")
    for path, complaint in (
        (tmp_path / "a.xlsx", "不认识的格式"),
        (tmp_path, "是目录"),
        (tmp_path / "none.csv", "不存在"),
        (Path("none"), "没有文件 none"),
        (Path("/dev/null"), "管道或设备"),
    ):
        with pytest.raises(UsageError, match=complaint):
            list(read_rows(path))


@pytest.mark.parametrize(("name", "separator"), [("a.csv", ","), ("a.tsv", "\t")])
def test_a_row_of_empty_cells_is_not_passed_over(name: str, separator: str, tmp_path: Path) -> None:
    """It has a place among the predictions, and nothing to predict for."""
    path = tmp_path / name
    path.write_text(f"text{separator}label\n好{separator}1\n{separator}\n", encoding="utf-8")
    with pytest.raises(UsageError, match="第 3 行的“text”应是文字"):
        list(read_classification(path))


def test_a_long_cell_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(f"text,label\n{'好' * 140_000},1\n", encoding="utf-8")
    assert [len(row["text"]) for _, row in read_rows(tmp_path / "a.csv")] == [140_000]

"""Rows with named columns: JSON lines, CSV, TSV, parquet, and data sets of `datasets`."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from plug.errors import PlugError, UsageError
from plug.jsonfiles import parse_json, shown
from plug.textfiles import (
    AS_CSV,
    BYTE_ORDER_MARK,
    LONGEST_LINE,
    Notes,
    check_regular_file,
    one_line,
    plain_suffix,
    read_lines,
)

Row = tuple[str, dict[str, Any]]  # its place ("dev.json 第 3 行"), its columns

MAX_ROWS = 10**8  # that a parquet file may claim


def read_rows(path: Path, notes: Notes | None = None) -> Iterator[Row]:
    """Rows of JSON lines (`.json`, `.jsonl`), `.csv`, `.tsv`, `.parquet`, or of a `datasets` name.

    All but parquet may be compressed (`.gz`, `.zst`). A path that does not exist and has none of
    these endings is `NAME:SPLIT` of the `datasets` library.

    Args:
        path: see above.
        notes: is told what was passed over, such as a header that is repeated.

    Raises:
        UsageError: no such file, an unknown ending, or a library is missing.
        PlugError: a line is broken (with its number).
    """
    notes = notes or Notes()
    suffix = plain_suffix(path)
    if suffix in (".json", ".jsonl"):
        yield from _json_rows(path, notes)
    elif suffix == ".csv":
        yield from _table_rows(path, _csv_cells(path, notes), notes)
    elif suffix == ".tsv":
        yield from _table_rows(path, _tsv_cells(path, notes), notes)
    elif suffix == ".parquet":
        yield from _parquet_rows(path)
    elif path.is_file():
        advice = f"请{AS_CSV}。" if suffix in (".xlsx", ".xls", ".et") else ""
        raise UsageError(f"{path}：不认识的格式。可用 .jsonl .json .csv .tsv .parquet。{advice}")
    else:
        yield from _dataset_rows(path)


def _json_rows(path: Path, notes: Notes) -> Iterator[Row]:
    for number, line in read_lines(path, notes):
        if not line.strip():
            continue
        place = f"{path} 第 {number} 行"
        try:
            row = parse_json(line.encode(), place)
        except PlugError as error:
            is_array = line.strip() == "[" or line.startswith("[{")
            advice = f"若是数组，可用 jq -c '.[]' {path} 转换。" if is_array else ""
            raise PlugError(f"{error}应是一行一个 JSON 对象。{advice}") from None
        if not isinstance(row, dict):
            raise PlugError(f"{place}应是一个 JSON 对象（{{…}}），却是 {type(row).__name__}。")
        yield place, row


def _csv_cells(path: Path, notes: Notes) -> Iterator[tuple[int, list[str]]]:
    """(line where a row begins, its cells), quoted as in RFC 4180."""
    csv.field_size_limit(LONGEST_LINE)  # Python's own is 131,072 characters a cell
    reader = csv.reader((line + "\n" for _, line in read_lines(path, notes)), strict=True)
    began = 1
    try:
        for cells in reader:
            yield began, cells
            began = reader.line_num + 1
    except csv.Error as error:
        raise PlugError(
            f"{path} 第 {began} 行起的引号没有配对（{error}）。含有引号、逗号或换行的一格要写在一对"
            '双引号里，其中的引号写两次：""。'
        ) from None


def _tsv_cells(path: Path, notes: Notes) -> Iterator[tuple[int, list[str]]]:
    """(line, its cells); a quotation mark is a character like any other."""
    for number, line in read_lines(path, notes):
        cells = line.split("\t")
        if any(len(cell) > 2 and cell[0] == cell[-1] == '"' and '""' in cell for cell in cells):
            notes.add("单元格带有 CSV 式的引号，按原样保留", f"{path} 第 {number} 行")
        yield number, cells if line.strip() or len(cells) > 1 else []


def _table_rows(path: Path, lines: Iterator[tuple[int, list[str]]], notes: Notes) -> Iterator[Row]:
    header: list[str] = []
    for number, cells in lines:
        place = f"{path} 第 {number} 行"
        if not any(cells) and len(cells) < 2:
            continue
        bare = [cell.strip().strip(BYTE_ORDER_MARK) for cell in cells]
        if not header:
            header = bare
            named = [name for name in header if name]
            if twice := sorted({name for name in named if named.count(name) > 1}):
                raise PlugError(f"{place}的表头里 {shown(twice)} 出现了两次，不知道该用哪一列。")
            continue
        if len(cells) != len(header):
            raise PlugError(
                f"{place}有 {len(cells)} 列，表头却有 {len(header)} 列：{shown(header)}。"
                f"{_about_separators(path, header)}"
            )
        if bare == header:
            notes.add("跳过了重复的表头", place)
            continue
        yield place, dict(zip(header, cells, strict=True))


def _about_separators(path: Path, header: list[str]) -> str:
    """What to do where a header of one cell looks like several: Excel's files in some languages."""
    wanted = "制表符" if plain_suffix(path) == ".tsv" else "英文逗号"
    used = [mark for mark in (";", "；", "，", ",", "\t") if len(header) == 1 and mark in header[0]]
    return (
        f"{plain_suffix(path)} 的各列之间要用{wanted}，这里用的是 {shown(used[0])}。"
        if used
        else ""
    )


def _parquet_rows(path: Path) -> Iterator[Row]:
    check_regular_file(path)
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise UsageError(f"读取 {path} 需要 pyarrow。请安装：pip install datasets") from None
    number = 0
    try:
        file = parquet.ParquetFile(path)
        if file.metadata.num_rows > MAX_ROWS:
            raise PlugError(f"{path} 声称有 {file.metadata.num_rows} 行，超过上限 {MAX_ROWS}。")
        metadata = (file.schema_arrow.metadata or {}).get(b"huggingface", b"{}")
        features = (json.loads(metadata).get("info") or {}).get("features") or {}
        for batch in file.iter_batches(batch_size=1024):
            for row in batch.to_pylist():
                number += 1
                place = f"{path} 第 {number} 行"
                yield place, _with_class_names(row, features, place)
    except PlugError:
        raise
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError, MemoryError) as error:
        after = f"（第 {number} 行之后）" if number else ""
        raise PlugError(f"{path} 不是完整的 parquet 文件{after}：{one_line(error)}") from None


def _dataset_rows(path: Path) -> Iterator[Row]:
    name, _, split = str(path).rpartition(":")
    if path.is_dir():
        raise UsageError(f"{path} 是目录。请给出其中的文件，或写 {path}:划分，如 {path}:train。")
    if path.exists():
        check_regular_file(path)
    if not name or not split:
        raise UsageError(
            f"没有文件 {path}。要用 datasets 库的数据集，请写 名字:划分，如 {path}:train。"
        )
    if tables := sorted([*Path(name).glob("*.csv"), *Path(name).glob("*.tsv")]):
        raise UsageError(  # pandas, which `datasets` uses, loses rows and changes "NA" and "01"
            f"{name} 里是表格文件，请直接给出文件，如 {tables[0]}（datasets 会改动其中的文字）。"
        )
    try:
        import datasets
    except ImportError:
        raise UsageError(
            f"没有文件 {path}。要按名字使用 datasets 的数据集，请先安装：pip install datasets"
        ) from None
    number = 0
    try:
        rows = datasets.load_dataset(name, split=split)
        features = rows.features.to_dict()
        for row in rows:
            number += 1
            place = f"{path} 第 {number} 条"
            yield place, _with_class_names(row, features, place)
    except PlugError:
        raise
    except Exception as error:  # a network's, a hub's or a file's: all end here
        if number:
            raise PlugError(f"{path} 第 {number} 条之后读不了：{one_line(error)}") from None
        raise UsageError(f"没有文件 {path}，也取不到这个名字的数据集：{one_line(error)}") from None


def _with_class_names(
    row: Mapping[str, Any], features: Mapping[str, Any], place: str
) -> dict[str, Any]:
    return {
        column: _class_names(value, features.get(column), f"{place}的“{column}”")
        for column, value in row.items()
    }


def _class_names(value: Any, feature: Any, place: str) -> Any:
    """The value with the names of `ClassLabel` in place of their numbers.

    -1, which is how published test sets say "no label", becomes None.

    Args:
        value: of a column, or a part of one.
        feature: its type as `datasets.Features.to_dict` (or a parquet file) describes it.
        place: for errors.
    """
    if isinstance(feature, list) and len(feature) == 1:
        feature = {"feature": feature[0]}
    if not isinstance(feature, dict) or value is None:
        return value
    names = feature.get("names")
    if feature.get("_type") == "ClassLabel" and isinstance(names, list):
        if value == -1:
            return None
        if not isinstance(value, int) or not 0 <= value < len(names):
            raise PlugError(f"{place}的编号 {value!r} 不在 {len(names)} 个类别之内。")
        return names[value]
    if isinstance(value, list):
        return [_class_names(each, feature.get("feature"), place) for each in value]
    return value

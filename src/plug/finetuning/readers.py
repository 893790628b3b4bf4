"""Data files in their published formats to examples; standard library only.

A reader takes a path and yields examples of one kind. Each example knows its place in the file, so
that whatever is found wrong with it later can say where. Answers (labels, tags, targets) may be
missing: a file to predict has none.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from plug.errors import PlugError, UsageError
from plug.pretraining.corpus import read_lines

SEPARATOR = "[SEP]"  # in `src_txt`, between the parts of a source
OUTSIDE = "O"
Row = tuple[str, dict[str, Any]]  # its place ("dev.json 第 3 行"), its columns


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassificationExample:
    """One text or a pair, and its label."""

    text_a: str
    text_b: str | None = None
    label: str | None = None
    label_name: str = ""  # what the file calls the label in words
    id: Any = None
    place: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class LabellingExample:
    """Tokens (characters in the published sets) and a BIO tag for each."""

    tokens: tuple[str, ...]
    tags: tuple[str, ...] | None = None
    place: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadingExample:
    """A question whose answer stands in the context."""

    context: str
    question: str
    answers: tuple[str, ...] = ()  # all that count as right
    start: int | None = None  # character of the context where the first one begins
    id: str = ""
    place: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationExample:
    """Parts of a source ([SEP] comes between them) and what is to be written."""

    source: tuple[str, ...]
    target: str | None = None
    place: str = ""


Example = ClassificationExample | LabellingExample | ReadingExample | GenerationExample


def read_rows(path: Path) -> Iterator[Row]:
    """Rows of JSON lines (`.json`, `.jsonl`), `.csv`, `.tsv`, `.parquet`, or of a `datasets` name.

    All but parquet may be compressed (`.gz`, `.zst`). A path that does not exist and has none of
    these endings is `NAME:SPLIT` of the `datasets` library.

    Raises:
        UsageError: no such file, an unknown ending, or a library is missing.
        PlugError: a line is broken (with its number).
    """
    suffixes = [suffix for suffix in path.suffixes if suffix not in (".gz", ".zst")]
    suffix = suffixes[-1] if suffixes else ""
    if suffix in (".json", ".jsonl"):
        yield from _json_rows(path)
    elif suffix in (".csv", ".tsv"):
        yield from _csv_rows(path, "," if suffix == ".csv" else "\t")
    elif suffix == ".parquet":
        yield from _parquet_rows(path)
    elif path.is_file():
        raise UsageError(f"{path}：不认识的格式。可用 .jsonl .json .csv .tsv .parquet。")
    else:
        yield from _dataset_rows(path)


def _json_rows(path: Path) -> Iterator[Row]:
    for number, line in read_lines(path):
        if not line:
            continue
        place = f"{path} 第 {number} 行"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise PlugError(f"{place}不是完整的 JSON：{error}。应是一行一个 JSON 对象。") from None
        if not isinstance(row, dict):
            raise PlugError(f"{place}应是一个 JSON 对象（{{…}}），却是 {type(row).__name__}。")
        yield place, row


def _csv_rows(path: Path, delimiter: str) -> Iterator[Row]:
    reader = csv.reader((line + "\n" for _, line in read_lines(path)), delimiter=delimiter)
    header = next(reader, [])
    for cells in reader:
        place = f"{path} 第 {reader.line_num} 行"
        if not cells:
            continue
        if delimiter == "\t":  # blanks at the end of a line were cut off, tabs among them
            cells += [""] * (len(header) - len(cells))
        if len(cells) != len(header):
            raise PlugError(f"{place}有 {len(cells)} 列，表头却有 {len(header)} 列：{header}。")
        yield place, dict(zip(header, cells, strict=True))


def _parquet_rows(path: Path) -> Iterator[Row]:
    if not path.is_file():
        raise UsageError(f"文件 {path} 不存在。")
    try:
        from pyarrow import parquet
    except ImportError:
        raise UsageError(f"读取 {path} 需要 pyarrow。请安装：pip install datasets") from None
    try:
        rows = parquet.read_table(path).to_pylist()
    except (OSError, ValueError) as error:  # pyarrow's errors are of these kinds
        raise PlugError(f"{path} 不是完整的 parquet 文件：{error}") from None
    for number, row in enumerate(rows, start=1):
        yield f"{path} 第 {number} 行", row


def _dataset_rows(path: Path) -> Iterator[Row]:
    name, _, split = str(path).rpartition(":")
    if path.is_dir():
        raise UsageError(f"{path} 是目录。请给出其中的文件，或写 {path}:划分，如 {path}:train。")
    if not name or not split:
        raise UsageError(
            f"没有文件 {path}。要用 datasets 库的数据集，请写 名字:划分，如 {path}:train。"
        )
    try:
        import datasets
    except ImportError:
        raise UsageError(
            f"没有文件 {path}。要按名字使用 datasets 的数据集，请先安装：pip install datasets"
        ) from None
    try:
        rows = datasets.load_dataset(name, split=split)
    except Exception as error:  # a network's, a hub's or a file's: all end here
        raise UsageError(f"没有文件 {path}，也取不到这个名字的数据集：{error}") from None
    classes = {
        column: feature.names for column, feature in rows.features.items()
        if isinstance(feature, datasets.ClassLabel)
    }  # fmt: skip
    for number, row in enumerate(rows, start=1):
        named = {column: names[row[column]] for column, names in classes.items()}
        yield f"{path} 第 {number} 条", {**row, **named}


def _text(row: Mapping[str, Any], column: str, place: str) -> str:
    """A column that must hold text.

    Raises:
        UsageError: there is no such column, or it is empty.
    """
    if column not in row:
        raise UsageError(f"{place}没有“{column}”这一列，有的是 {sorted(row)}。")
    value = row[column]
    if not isinstance(value, str) or not value.strip():
        raise UsageError(f"{place}的“{column}”应是文字，却是 {value!r}。")
    return value


def _optional(row: Mapping[str, Any], column: str) -> str | None:
    """A label as text; None where the column is missing or empty."""
    value = row.get(column)
    return None if value is None or value == "" else str(value)


def read_classification(path: Path, columns: tuple[str, ...] = ()) -> Iterator[Example]:
    """Rows with `label` and texts in ``columns`` (one or two).

    Without ``columns``: the user's own data, `text`, or `text_a` and `text_b`. The label "-" of
    OCNLI (annotators did not agree) is skipped.
    """
    for place, row in read_rows(path):
        if _optional(row, "label") == "-":
            continue
        if not (columns or "text" in row or "text_a" in row):
            raise UsageError(
                f"{place}没有“text”这一列，也没有“text_a”和“text_b”，有的是 {sorted(row)}。"
            )
        names = columns or (("text",) if "text" in row else ("text_a", "text_b"))
        texts = [_text(row, name, place) for name in names]
        yield ClassificationExample(
            text_a=texts[0],
            text_b=texts[1] if len(texts) > 1 else None,
            label=_optional(row, "label"),
            label_name=row.get("label_desc") or row.get("label_des") or "",
            id=row.get("id"),
            place=place,
        )


def read_cluewsc(path: Path) -> Iterator[Example]:
    """CLUEWSC2020: does the pronoun mean that noun? The text marks the noun [ ], the pronoun _ _.

    Source: the marks are those of CLUE's baseline.
    """
    for place, row in read_rows(path):
        text, target = _text(row, "text", place), row.get("target")
        if not isinstance(target, dict):
            raise UsageError(f"{place}没有“target”这一列，有的是 {sorted(row)}。")
        marks = []
        for number, (left, right) in enumerate((("[", "]"), ("_", "_")), start=1):
            word = _text(target, f"span{number}_text", place)
            start = target.get(f"span{number}_index", -1)
            if text[start : start + len(word)] != word:
                raise UsageError(f"{place}的 span{number}_index={start} 处不是“{word}”。")
            marks.append((start, start + len(word), left, right))
        for start, end, left, right in sorted(marks, reverse=True):
            text = f"{text[:start]}{left}{text[start:end]}{right}{text[end:]}"
        label = _optional(row, "label")
        yield ClassificationExample(
            text_a=text,
            label=label.lower() if label else None,
            id=row.get("id", row.get("idx")),
            place=place,
        )


def read_csl(path: Path) -> Iterator[Example]:
    """CSL: do the keywords belong to the abstract? Keywords first, joined by ；."""
    for place, row in read_rows(path):
        keywords = row.get("keyword")
        if not isinstance(keywords, list):
            raise UsageError(f"{place}的“keyword”应是关键词的列表，却是 {keywords!r}。")
        yield ClassificationExample(
            text_a="；".join(map(str, keywords)),
            text_b=_text(row, "abst", place),
            label=_optional(row, "label"),
            id=row.get("id"),
            place=place,
        )


def read_cluener(path: Path) -> Iterator[Example]:
    """CLUENER2020: `{"text": …, "label": {type: {words: [[start, end], …]}}}`, ends inclusive."""
    for place, row in read_rows(path):
        text = _text(row, "text", place)
        tags = None
        if isinstance(label := row.get("label"), dict):
            spans = [
                (start, end + 1, kind)
                for kind, entities in label.items()
                for start, end in chain.from_iterable(entities.values())
            ]
            tags = _bio_tags(len(text), spans, place)
        yield LabellingExample(tokens=tuple(text), tags=tags, place=place)


def _bio_tags(length: int, spans: list[tuple[int, int, str]], place: str) -> tuple[str, ...]:
    """A tag a character; of spans that overlap, the one that begins first stays."""
    tags = [OUTSIDE] * length
    for start, end, kind in sorted(spans):
        if not 0 <= start < end <= length:
            raise UsageError(f"{place}的实体 [{start}, {end - 1}] 超出了 {length} 个字的文本。")
        if all(tag == OUTSIDE for tag in tags[start:end]):
            tags[start:end] = [f"B-{kind}", *[f"I-{kind}"] * (end - start - 1)]
    return tuple(tags)


def read_columns(path: Path) -> Iterator[Example]:
    """A character and its tag a line, a blank line between sentences (People's Daily, CoNLL)."""
    tokens: list[str] = []
    tags: list[str] = []
    began = 1
    for number, line in chain(read_lines(path), [(0, "")]):
        if line:
            cells = line.split()
            if len(cells) != 2:
                raise PlugError(f"{path} 第 {number} 行应是“字 标签”两列，却是 {line[:40]!r}。")
            tokens.append(cells[0])
            tags.append(cells[1])
        elif tokens:
            place = f"{path} 第 {began} 行起的句子"
            yield LabellingExample(tokens=tuple(tokens), tags=tuple(tags), place=place)
            tokens, tags = [], []
        if not tokens:
            began = number + 1


def read_labelling(path: Path) -> Iterator[Example]:
    """The user's own: rows with `tokens` and `tags`, lists or texts with blanks between."""
    for place, row in read_rows(path):
        if "tokens" not in row:
            raise UsageError(f"{place}没有“tokens”这一列，有的是 {sorted(row)}。")
        tokens, tags = (
            tuple(value.split() if isinstance(value, str) else map(str, value))
            for value in (row["tokens"], row.get("tags") or ())
        )
        if tags and len(tags) != len(tokens):
            raise UsageError(f"{place}有 {len(tokens)} 个 tokens，却有 {len(tags)} 个 tags。")
        if not tokens or not all(tokens):
            raise UsageError(f"{place}的 tokens 是空的，或有空的一项。")
        yield LabellingExample(tokens=tokens, tags=tags or None, place=place)


def read_squad(path: Path) -> Iterator[ReadingExample]:
    """One JSON document: data, paragraphs, context, qas, answers (CMRC2018, DRCD, DuReader).

    `answer_start` values that do not fit the context are replaced by a search for the answer.
    """
    lines = [line for _, line in read_lines(path)]
    try:
        articles = json.loads("\n".join(lines))["data"]
        questions = [
            (paragraph["context"], question["question"], str(question["id"]),
             [(str(a["text"]), a.get("answer_start", -1)) for a in question.get("answers", ())])
            for article in articles
            for paragraph in article["paragraphs"]
            for question in paragraph["qas"]
        ]  # fmt: skip
    except json.JSONDecodeError as error:
        raise PlugError(f"{path} 第 {error.lineno} 行：不是完整的 JSON（{error.msg}）。") from None
    except (KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{path} 不是 SQuAD 格式（data/paragraphs/qas）：{error!r}") from None
    for context, question, name, found in questions:
        place = f"{path} 的问题 {name}"
        if not context.strip() or not question.strip():
            raise UsageError(f"{place}的 context 或 question 是空的。")
        start = None
        if found:
            answer, start = found[0]
            if context[start : start + len(answer)] != answer or start < 0:
                start = context.find(answer) if answer in context else None
        yield ReadingExample(
            context=context,
            question=question,
            answers=tuple(answer for answer, _ in found),
            start=start,
            id=name,
            place=place,
        )


def read_squad_questions(path: Path) -> Iterator[Example]:
    """Question generation: from the (first) answer and the context, the question."""
    for example in read_squad(path):
        if not example.answers:
            raise UsageError(f"{example.place}没有答案，不能用来生成问题。")
        yield GenerationExample(
            source=(example.answers[0], example.context),
            target=example.question,
            place=example.place,
        )


def read_kbqa(path: Path) -> Iterator[Example]:
    """NLPCC KBQA: blocks of `<question id=N>`, `<triple id=N>`, `<answer id=N>`, tab, text."""
    fields: dict[str, str] = {}
    for number, line in chain(read_lines(path), [(0, "=")]):
        place = f"{path} 第 {number} 行"
        if set(line) == {"="}:
            if fields:
                if "triple" not in fields:
                    raise PlugError(f"{place}之前的一段缺少 <triple>，有的是 {sorted(fields)}。")
                triple, question = fields["triple"], fields.get("question")
                yield GenerationExample(source=(triple,), target=question, place=place)
                fields = {}
        elif line:
            head, _, text = line.partition("\t")
            if not head.startswith("<") or not head.endswith(">"):
                raise PlugError(f"{place}应是“<question id=N>”、制表符和文字，却是 {line[:40]!r}。")
            fields[head[1:].split()[0]] = text


def read_kgclue(path: Path) -> Iterator[Example]:
    """KgCLUE: rows of `question` and `answer`, the latter a triple with ||| between its parts."""
    for place, row in read_rows(path):
        triple, question = _text(row, "answer", place), _optional(row, "question")
        yield GenerationExample(source=(triple,), target=question, place=place)


def read_generation(path: Path) -> Iterator[Example]:
    """The user's own: rows of `src_txt` and `tgt_txt`; [SEP] in the source separates parts."""
    for place, row in read_rows(path):
        source = tuple(_text(row, "src_txt", place).split(SEPARATOR))
        yield GenerationExample(source=source, target=_optional(row, "tgt_txt"), place=place)

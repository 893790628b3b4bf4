"""Data files in their published formats to examples; standard library only.

A reader takes a path and yields examples of one kind. Each example knows its place in the file, so
that an error found later can name it. Answers (labels, tags, targets) may be missing: a file to
predict has none.

Where a value has one certain reading, it is read so and counted in `Notes`. Where it has none, the
file is refused with the place. Nothing is left out or guessed in silence.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from plug.errors import PlugError, UsageError
from plug.finetuning.rows import read_rows
from plug.jsonfiles import parse_json, shown
from plug.textfiles import Notes, is_text, read_lines, trim

SEPARATOR = "[SEP]"  # in `src_txt`, between the parts of a source
OUTSIDE = "O"
NO_AGREEMENT = "-"  # the label of NLI sets where annotators did not agree


@dataclass(frozen=True, slots=True, kw_only=True)
class Placed:
    """Where an example comes from: in words, and the line of a `.txt` file to predict."""

    place: str = ""
    line: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassificationExample(Placed):
    """One text or a pair, and its label."""

    text_a: str
    text_b: str | None = None
    label: str | None = None
    label_name: str = ""  # what the file calls the label in words
    id: str | int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LabellingExample(Placed):
    """Tokens (characters in the published sets) and a tag for each.

    Tags are as the file has them until `tags.convert_to_bio`; `scheme` is then what the file had.
    """

    tokens: tuple[str, ...]
    tags: tuple[str, ...] | None = None
    scheme: str = "BIO"


@dataclass(frozen=True, slots=True, kw_only=True)
class QuestionExample(Placed):
    """A question whose answer stands in the context."""

    context: str
    question: str
    answers: tuple[str, ...] = ()  # all that count as right
    start: int | None = None  # character of the context where the first one begins
    id: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationExample(Placed):
    """Parts of a source ([SEP] comes between them) and what is to be written."""

    source: tuple[str, ...]
    target: str | None = None


Example = ClassificationExample | LabellingExample | QuestionExample | GenerationExample


def text_of(example: Example) -> str:
    """All text that a model reads of an example, or learns to write, in one string."""
    match example:
        case ClassificationExample():
            return example.text_a + (example.text_b or "")
        case LabellingExample():
            return "".join(example.tokens)
        case QuestionExample():
            return example.question + example.context
        case GenerationExample():
            return "".join(example.source) + (example.target or "")


def _text(row: Mapping[str, Any], column: str, place: str) -> str:
    """A column that must hold text.

    Raises:
        UsageError: there is no such column, or it is empty, or no text.
    """
    if column not in row:
        raise UsageError(
            f"{place}没有“{column}”这一列，有的是 {shown(sorted(row))}。{_rename(column)}"
        )
    value = row[column]
    if not is_text(value) or not trim(value):
        raise UsageError(f"{place}的“{column}”应是文字，却是 {shown(value)}。")
    return value


def _rename(columns: str) -> str:
    return f"请把要用的列改名为 {columns}（表格的第一行是列名）。"


def _optional_text(row: Mapping[str, Any], column: str, place: str) -> str | None:
    """A column of text, or None where it is missing or empty."""
    value = row.get(column)
    return None if value is None or value == "" else _text(row, column, place)


def _label(row: Mapping[str, Any], place: str, notes: Notes) -> str | None:
    """The column `label` as text; None where it is missing or empty.

    A number and its digits are the same label (1, 1.0 and "1"), and so are true and "true".

    Raises:
        UsageError: it is a list, an object, NaN, or a fraction.
    """
    value = row.get("label")
    if value is None:
        return None
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float) and value.is_integer():
        notes.add("小数形式的标签（如 1.0）读作整数", place)
        return str(int(value))
    if not is_text(value):
        raise UsageError(f"{place}的标签应是文字或整数，却是 {shown(value)}。")
    bare = trim(value)
    if bare and bare != value:
        notes.add("去掉了标签首尾的空白", place)
    return bare or None


def _id(value: object) -> str | int | None:
    if value is None or (isinstance(value, int) and not isinstance(value, bool)):
        return value
    return value if isinstance(value, str) and is_text(value) else repr(value)


def read_classification(
    path: Path, notes: Notes | None = None, columns: tuple[str, ...] = ()
) -> Iterator[ClassificationExample]:
    """Rows with `label` and texts in ``columns`` (one or two).

    Without ``columns``: the user's own data, `text`, or `text_a` and `text_b`.
    """
    notes = notes or Notes()
    for place, row in read_rows(path, notes):
        if not (columns or "text" in row or "text_a" in row):
            raise UsageError(
                f"{place}没有“text”这一列，也没有“text_a”和“text_b”，有的是 {shown(sorted(row))}。"
                f"{_rename('text,label')}"
            )
        if not columns and "text" in row and "text_a" in row:
            raise UsageError(f"{place}既有“text”又有“text_a”，不知道该用哪个。请只留其一。")
        names = columns or (("text",) if "text" in row else ("text_a", "text_b"))
        texts = [_text(row, name, place) for name in names]
        label_name = row.get("label_desc") or row.get("label_des")
        yield ClassificationExample(
            text_a=texts[0],
            text_b=texts[1] if len(texts) > 1 else None,
            label=_label(row, place, notes),
            label_name=str(label_name) if is_text(label_name) else "",
            id=_id(row.get("id")),
            place=place,
        )


def read_cluewsc(path: Path, notes: Notes | None = None) -> Iterator[ClassificationExample]:
    """CLUEWSC2020: does the pronoun mean that noun? The text marks the noun [ ], the pronoun _ _.

    Source: the marks are those of CLUE's baseline.
    """
    notes = notes or Notes()
    for place, row in read_rows(path, notes):
        text, target = _text(row, "text", place), row.get("target")
        if not isinstance(target, dict):
            raise UsageError(f"{place}没有“target”这一列，有的是 {shown(sorted(row))}。")
        marks = []
        for number, (left, right) in enumerate((("[", "]"), ("_", "_")), start=1):
            word = _text(target, f"span{number}_text", place)
            start: Any = target.get(f"span{number}_index")
            if not _is_position(start) or text[start : start + len(word)] != word:
                raise UsageError(
                    f"{place}的 span{number}_index={shown(start)} 处不是 {shown(word)}。"
                )
            marks.append((start, start + len(word), left, right))
        for start, end, left, right in sorted(marks, reverse=True):
            text = f"{text[:start]}{left}{text[start:end]}{right}{text[end:]}"
        label = _label(row, place, notes)
        yield ClassificationExample(
            text_a=text,
            label=label.lower() if label else None,
            id=_id(row.get("id", row.get("idx"))),
            place=place,
        )


def _is_position(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _plainly(name: object) -> str:
    """A name of a file's as it stands, if that is short and fits on a line."""
    return name if isinstance(name, str) and name.isprintable() and len(name) < 60 else shown(name)


def read_csl(path: Path, notes: Notes | None = None) -> Iterator[ClassificationExample]:
    """CSL: do the keywords belong to the abstract? Keywords first, joined by ；."""
    notes = notes or Notes()
    for place, row in read_rows(path, notes):
        keywords = row.get("keyword")
        if not isinstance(keywords, list) or not keywords or not all(map(is_text, keywords)):
            raise UsageError(f"{place}的“keyword”应是关键词的列表，却是 {shown(keywords)}。")
        yield ClassificationExample(
            text_a="；".join(keywords),
            text_b=_text(row, "abst", place),
            label=_label(row, place, notes),
            id=_id(row.get("id")),
            place=place,
        )


def read_cluener(path: Path, notes: Notes | None = None) -> Iterator[LabellingExample]:
    """CLUENER2020: `{"text": …, "label": {type: {words: [[start, end], …]}}}`, ends inclusive."""
    notes = notes or Notes()
    for place, row in read_rows(path, notes):
        text, label = _text(row, "text", place), row.get("label")
        tags = None
        if isinstance(label, dict):
            tags = _bio_tags(text, list(_cluener_spans(text, label, place)), place, notes)
        elif label not in (None, ""):
            raise UsageError(f"{place}的“label”应是实体的对象，却是 {shown(label)}。")
        yield LabellingExample(tokens=tuple(text), tags=tags, place=place)


def _cluener_spans(text: str, label: dict[str, Any], place: str) -> Iterator[tuple[int, int, str]]:
    for kind, entities in label.items():
        if not isinstance(entities, dict) or not kind.strip() or not is_text(kind):
            raise UsageError(f"{place}的实体类型 {shown(kind)} 应有一个“文字：位置”的对象。")
        for words, spans in entities.items():
            if not isinstance(spans, list):
                raise UsageError(
                    f"{place}的实体 {shown(words)} 应有位置的列表，却是 {shown(spans)}。"
                )
            for span in spans:
                if not (isinstance(span, list) and len(span) == 2 and all(map(_is_position, span))):
                    raise UsageError(f"{place}的位置 {shown(span)} 应是 [起, 止] 两个整数。")
                start, end = span[0], span[1] + 1
                if not start < end <= len(text):
                    raise UsageError(f"{place}的实体 {span} 超出了 {len(text)} 个字的文本。")
                if text[start:end] != words:
                    raise UsageError(
                        f"{place}的位置 {span} 处是 {shown(text[start:end])}，不是 {shown(words)}。"
                    )
                yield start, end, kind


def _bio_tags(
    text: str, spans: list[tuple[int, int, str]], place: str, notes: Notes
) -> tuple[str, ...]:
    """A tag a character; of spans that overlap, the one that begins first stays."""
    tags = [OUTSIDE] * len(text)
    for start, end, kind in sorted(set(spans)):
        if all(tag == OUTSIDE for tag in tags[start:end]):
            tags[start:end] = [f"B-{kind}", *[f"I-{kind}"] * (end - start - 1)]
        else:
            notes.add("实体互相重叠，只留下先开始的", place)
    return tuple(tags)


def read_columns(path: Path, notes: Notes | None = None) -> Iterator[LabellingExample]:
    """A character and its tag a line, a blank line between sentences (People's Daily, CoNLL).

    A tab or blanks part the two. The character may itself be a blank, such as U+3000.
    """
    notes = notes or Notes()
    tokens: list[str] = []
    tags: list[str] = []
    began = 1
    for number, line in chain(read_lines(path, notes), [(0, "")]):
        if trim(line):
            cells = _token_and_tag(line, f"{path} 第 {number} 行")
            if cells[0] == "-DOCSTART-":
                notes.add("跳过了 -DOCSTART- 行", f"{path} 第 {number} 行")
                continue
            tokens.append(cells[0])
            tags.append(cells[1])
        elif tokens:
            place = f"{path} 第 {began} 行起的句子"
            yield LabellingExample(tokens=tuple(tokens), tags=tuple(tags), place=place)
            tokens, tags = [], []
        if not tokens:
            began = number + 1


def _token_and_tag(line: str, place: str) -> tuple[str, str]:
    line = line.rstrip()
    separator = "\t" if "\t" in line else " "
    token, _, tag = line.rpartition(separator)
    token = token.strip() or token  # a blank is a token too
    if not token or len(token.split()) > 1:
        raise PlugError(f"{place}应是“字 标签”两列，却是 {shown(line)}。")
    return token, tag


def read_labelling(path: Path, notes: Notes | None = None) -> Iterator[LabellingExample]:
    """The user's own: rows with `tokens` and `tags` (or `ner_tags`, as `datasets` calls them).

    Both are lists, texts with blanks between, or lists as pandas writes them to a table.
    """
    notes = notes or Notes()
    for place, row in read_rows(path, notes):
        if "tokens" not in row:
            raise UsageError(f"{place}没有“tokens”这一列，有的是 {shown(sorted(row))}。")
        tokens = _list_of_text(row["tokens"], "tokens", place, notes)
        tags = _list_of_text(row.get("tags", row.get("ner_tags")) or [], "tags", place, notes)
        if tags and len(tags) != len(tokens):
            raise UsageError(f"{place}有 {len(tokens)} 个 tokens，却有 {len(tags)} 个 tags。")
        if not tokens or not all(tokens):
            raise UsageError(f"{place}的 tokens 是空的，或有空的一项。")
        yield LabellingExample(tokens=tokens, tags=tags or None, place=place)


def _list_of_text(value: object, column: str, place: str, notes: Notes) -> tuple[str, ...]:
    if isinstance(value, str):
        written = trim(value)
        if _LOOKS_LIKE_LIST[column].fullmatch(written):
            value = _written_list(written, column, place)
            notes.add("写成文字的列表（如 ['北', '京']）读作列表", place)
        elif column == "tags" and (marks := [mark for mark in ",，;；" if mark in written]):
            raise UsageError(
                f"{place}的“tags”是 {shown(written)}，用了 {marks[0]!r}。"
                "写成文字时，tokens 和 tags 的各项之间都要用空格。"
            )
        else:
            value = written.split()
    if not isinstance(value, list):
        raise UsageError(f"{place}的“{column}”应是列表，却是 {shown(value)}。")
    if column == "tags":
        if all(each is None for each in value):  # -1 of a `ClassLabel`: not labelled
            return ()
        if any(isinstance(each, int) for each in value):
            raise UsageError(
                f"{place}的 tags 是编号，不知道它们的名字。请换成 B-PER 一类的名字，"
                "或用带有 ClassLabel 的 parquet 文件。"
            )
    else:
        value = [str(each) if type(each) is int else each for each in value]
    for each in value:
        if not is_text(each):
            raise UsageError(f"{place}的“{column}”里有一项不是文字：{shown(each)}。")
    return tuple(each.strip() for each in value) if column == "tags" else tuple(value)


_LOOKS_LIKE_LIST = {  # a token may be "[1]", but no tag is
    "tokens": re.compile(r"\[\s*\]|\[['\"].*['\"]\]", re.DOTALL),
    "tags": re.compile(r"\[\s*\]|\[['\"\d\[].*\]", re.DOTALL),
}
_QUOTED = r"""(?:'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")"""
_LIST_OF_QUOTED = re.compile(rf"\[(?:{_QUOTED}(?:\s*,\s*{_QUOTED})*)?\s*\]", re.DOTALL)


def _written_list(text: str, column: str, place: str) -> list[str | int]:
    """The items of a list that is written as text: as JSON, or as Python shows lists.

    Raises:
        UsageError: it is neither, such as an array of numpy, which has no commas.
    """
    try:
        if isinstance(value := json.loads(text), list):
            return value
    except (ValueError, RecursionError):
        pass
    try:
        if _LIST_OF_QUOTED.fullmatch(text):
            return [ast.literal_eval(each) for each in re.findall(_QUOTED, text, re.DOTALL)]
    except (ValueError, SyntaxError):
        pass
    raise UsageError(
        f"{place}的“{column}”像是写成文字的列表，却读不懂：{shown(text)}。"
        "请写成 JSON 的列表，或在各项之间用空格。"
    )


def read_squad(path: Path, notes: Notes | None = None) -> Iterator[QuestionExample]:
    """One JSON document: data, paragraphs, context, qas, answers (CMRC2018, DRCD, DuReader).

    An `answer_start` where the answer does not stand is replaced by the nearest place where it
    does. Without a usable `answer_start` an answer that occurs once is taken there. All else is
    kept for scoring, but not for training (`start` is None).
    """
    notes = notes or Notes()
    content = "\n".join(line for _, line in read_lines(path, notes))
    document = parse_json(content.encode(), path)
    asked: dict[str, tuple[str, str]] = {}
    for a, article in enumerate(_objects(document, "data", str(path)), start=1):
        for p, paragraph in enumerate(
            _objects(article, "paragraphs", f"{path} 第 {a} 篇"), start=1
        ):
            where = f"{path} 第 {a} 篇第 {p} 段"
            context = _text(paragraph, "context", where)
            for q, question in enumerate(_objects(paragraph, "qas", where), start=1):
                name = _id(question.get("id"))
                place = f"{where}第 {q} 问" if name is None else f"{path} 的问题“{_plainly(name)}”"
                text = _text(question, "question", place)
                if name is not None and asked.setdefault(str(name), (context, text)) != (
                    context,
                    text,
                ):
                    raise UsageError(
                        f"{path} 里有两个不同的问题都叫 {_plainly(name)}，结果无法对应。"
                    )
                answers = _answers(question, place, notes)
                texts, start = [answer for answer, _ in answers], None
                if answers:
                    if texts[0] not in context:  # blanks around it are no part of it
                        texts[0] = texts[0].strip()
                    start = _answer_start(context, texts[0], answers[0][1], place, notes)
                yield QuestionExample(
                    context=context,
                    question=text,
                    answers=tuple(texts),
                    start=start,
                    id="" if name is None else str(name),
                    place=place,
                )


def _objects(parent: object, key: str, place: str) -> list[dict[str, Any]]:
    items = parent.get(key) if isinstance(parent, dict) else None
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise UsageError(f"{place}不是 SQuAD 格式（data/paragraphs/qas）：“{key}”应是对象的列表。")
    return items


def _answers(question: dict[str, Any], place: str, notes: Notes) -> list[tuple[str, int | None]]:
    """(text, position where the file says that it begins) of every answer that is not empty."""
    found = question.get("answers") or []
    if isinstance(found, dict):  # as `datasets` writes them: lists of texts and of positions
        texts, starts = found.get("text"), found.get("answer_start")
        if not (isinstance(texts, list) and isinstance(starts, list) and len(texts) == len(starts)):
            raise UsageError(f"{place}的 answers 里 text 与 answer_start 应是一样长的列表。")
        found = [{"text": text, "answer_start": at} for text, at in zip(texts, starts, strict=True)]
    if not isinstance(found, list) or not all(isinstance(answer, dict) for answer in found):
        raise UsageError(f"{place}的 answers 应是对象的列表，却是 {shown(found)}。")
    if question.get("is_impossible") is True:
        return []
    answers = []
    for answer in found:
        text, start = answer.get("text"), _number(answer.get("answer_start"), place)
        text = str(text) if type(text) is int else text
        if not is_text(text):
            raise UsageError(f"{place}的答案应是文字，却是 {shown(text)}。")
        if trim(text):
            answers.append((text, start))
        else:
            notes.add("空的答案按没有答案计", place)
    return answers


def _number(value: object, place: str) -> int | None:
    """`answer_start` as an integer: 6, 6.0 and "6" are the same; null and below 0 are unknown."""
    if isinstance(value, str) and value.strip().lstrip("-").isdecimal() and len(value) < 20:
        value = int(value)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if value is None or value == "":
        return None
    if not isinstance(value, int) or isinstance(value, bool):
        raise UsageError(f"{place}的 answer_start 应是整数，却是 {shown(value)}。")
    return value if value >= 0 else None


def _answer_start(
    context: str, answer: str, claimed: int | None, place: str, notes: Notes
) -> int | None:
    """The character where the answer begins; None where that is not certain."""
    if claimed is not None and context.startswith(answer, claimed):
        return claimed
    places = [at for at in range(len(context)) if context.startswith(answer, at)]
    if not places:
        notes.add("答案不在原文中，不用来训练", place)
        return None
    if claimed is None:
        if len(places) == 1:
            notes.add("答案没有位置，在原文中只出现一次，取该处", place)
            return places[0]
        notes.add("答案没有位置，在原文中出现多次，不用来训练", place)
        return None
    distances = [abs(at - claimed) for at in places]
    if distances.count(min(distances)) > 1:
        notes.add("答案的位置不对，前后两处一样近，不用来训练", place)
        return None
    notes.add("答案的位置不对，改为最近的一处", place)
    return places[distances.index(min(distances))]


def read_squad_questions(path: Path, notes: Notes | None = None) -> Iterator[GenerationExample]:
    """Question generation: from the (first) answer and the context, the question."""
    for example in read_squad(path, notes):
        if not example.answers:
            raise UsageError(f"{example.place}没有答案，不能用来生成问题。")
        yield GenerationExample(
            source=(example.answers[0], example.context),
            target=example.question,
            place=example.place,
        )


def read_kbqa(path: Path, notes: Notes | None = None) -> Iterator[GenerationExample]:
    """NLPCC KBQA: blocks of `<question id=N>`, `<triple id=N>`, `<answer id=N>`, tab, text."""
    fields: dict[str, str] = {}
    for number, line in chain(read_lines(path, notes), [(0, "=")]):
        place = f"{path} 第 {number} 行" if number else f"{path} 末尾"
        line = line.strip()
        if set(line) == {"="}:
            if fields:
                if not fields.get("triple", "").strip():
                    raise PlugError(
                        f"{place}之前的一段缺少 <triple>，有的是 {shown(sorted(fields))}。"
                    )
                triple, question = fields["triple"], fields.get("question") or None
                yield GenerationExample(source=(triple,), target=question, place=place)
                fields = {}
        elif line:
            head, _, text = line.partition("\t")
            name = head[1:-1].split()[:1]
            if not head.startswith("<") or not head.endswith(">") or not name:
                raise PlugError(f"{place}应是“<question id=N>”、制表符和文字，却是 {shown(line)}。")
            if name[0] in fields:
                raise PlugError(
                    f"{place}的 <{_plainly(name[0])}> 在一段里出现两次。两段之间应有一行 ====。"
                )
            fields[name[0]] = text


def read_kgclue(path: Path, notes: Notes | None = None) -> Iterator[GenerationExample]:
    """KgCLUE: rows of `question` and `answer`, the latter a triple with ||| between its parts."""
    for place, row in read_rows(path, notes):
        triple, question = _text(row, "answer", place), _optional_text(row, "question", place)
        yield GenerationExample(source=(triple,), target=question, place=place)


def read_generation(path: Path, notes: Notes | None = None) -> Iterator[GenerationExample]:
    """The user's own: rows of `src_txt` and `tgt_txt`; [SEP] in the source separates parts."""
    for place, row in read_rows(path, notes):
        source = tuple(_text(row, "src_txt", place).split(SEPARATOR))
        if not all(map(trim, source)):
            raise UsageError(f"{place}的“src_txt”在 {SEPARATOR} 之间有空的一段。")
        target = _optional_text(row, "tgt_txt", place)
        yield GenerationExample(source=source, target=target, place=place)

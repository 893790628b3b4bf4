"""Every task, each one entry: how its file is read, what it asks, its metric and defaults.

To add a task, add an entry. Imports no torch: the command line lists the tasks from here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from plug.errors import UsageError
from plug.finetuning import readers
from plug.finetuning.readers import (
    NO_AGREEMENT,
    ClassificationExample,
    Example,
    LabellingExample,
)
from plug.finetuning.tags import convert_to_bio
from plug.jsonfiles import shown
from plug.textfiles import Notes

KindName = Literal["classification", "labelling", "reading", "generation"]
METRICS: dict[KindName, str] = {  # the best checkpoint is the one with the highest
    "classification": "accuracy",
    "labelling": "f1",
    "reading": "f1",
    "generation": "bleu4",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """One task.

    Attributes:
        title: what it is, in Chinese.
        kind: which of the four ways to fine-tune.
        reader: its file to examples.
        labels: those published; empty: those that occur in the training file.
        epochs: default of a run, as are the batch size and the lengths.
        batch_size: examples a step.
        source_length: tokens read at most, [CLS] and [SEP] counted.
        target_length: tokens written at most (generation), or of an answer (reading).
        submission: the file name that CLUE asks for; empty where it does not.
    """

    title: str
    kind: KindName
    reader: Callable[[Path, Notes], Iterator[Example]]
    labels: tuple[str, ...] = ()
    epochs: float = 3.0
    batch_size: int = 32
    source_length: int = 128
    target_length: int = 30
    submission: str = ""

    @property
    def metric(self) -> str:
        return METRICS[self.kind]


def _bio(*types: str) -> tuple[str, ...]:
    return (readers.OUTSIDE, *(f"{prefix}-{name}" for name in types for prefix in "BI"))


_pair = partial(readers.read_classification, columns=("sentence1", "sentence2"))
_sentence = partial(readers.read_classification, columns=("sentence",))
_NLI = ("neutral", "entailment", "contradiction")
_TNEWS = (100, 101, 102, 103, 104, 106, 107, 108, 109, 110, 112, 113, 114, 115, 116)
_CLUENER = (
    "address", "book", "company", "game", "government",
    "movie", "name", "organization", "position", "scene",
)  # fmt: skip

TASKS: dict[str, Task] = {
    "afqmc": Task(
        title="蚂蚁金融语义相似度（两句话是否同义）",
        kind="classification",
        reader=_pair,
        labels=("0", "1"),
        batch_size=64,
        submission="afqmc_predict.json",
    ),
    "tnews": Task(
        title="今日头条新闻标题分类（15 类）",
        kind="classification",
        reader=_sentence,
        labels=tuple(map(str, _TNEWS)),
        batch_size=64,
        submission="tnews11_predict.json",
    ),
    "iflytek": Task(
        title="应用描述长文本分类（119 类）",
        kind="classification",
        reader=_sentence,
        labels=tuple(map(str, range(119))),
        epochs=6.0,
        source_length=256,
        submission="iflytek_predict.json",
    ),
    "cmnli": Task(
        title="自然语言推理（由英文译来）",
        kind="classification",
        reader=_pair,
        labels=_NLI,
        submission="cmnli_predict.json",
    ),
    "ocnli": Task(
        title="原生中文自然语言推理",
        kind="classification",
        reader=_pair,
        labels=_NLI,
        epochs=5.0,
        submission="ocnli_50k_predict.json",
    ),
    "cluewsc2020": Task(
        title="代词消解（代词指的是不是那个名词）",
        kind="classification",
        reader=readers.read_cluewsc,
        labels=("true", "false"),
        epochs=10.0,
        submission="cluewsc11_predict.json",
    ),
    "csl": Task(
        title="论文关键词识别（关键词是否都属于摘要）",
        kind="classification",
        reader=readers.read_csl,
        labels=("0", "1"),
        epochs=6.0,
        source_length=384,
        submission="csl_predict.json",
    ),
    "cluener2020": Task(
        title="细粒度命名实体（10 类）",
        kind="labelling",
        reader=readers.read_cluener,
        labels=_bio(*_CLUENER),
        epochs=10.0,
    ),
    "people_daily_ner": Task(
        title="人民日报命名实体（人、地、机构）",
        kind="labelling",
        reader=readers.read_columns,
        labels=_bio("LOC", "ORG", "PER"),
        source_length=256,
    ),
    "cmrc2018": Task(
        title="抽取式阅读理解 CMRC2018",
        kind="reading",
        reader=readers.read_squad,
        source_length=512,
        target_length=64,
    ),
    "drcd": Task(
        title="抽取式阅读理解 DRCD（繁体）",
        kind="reading",
        reader=readers.read_squad,
        source_length=512,
        target_length=128,
    ),
    "dureader_robust_qg": Task(
        title="DuReader-robust：由答案和原文生成问题",
        kind="generation",
        reader=readers.read_squad_questions,
        epochs=10.0,
        source_length=384,
    ),
    "cmrc2018_qg": Task(
        title="CMRC2018：由答案和原文生成问题",
        kind="generation",
        reader=readers.read_squad_questions,
        epochs=5.0,
        source_length=384,
        target_length=96,
    ),
    "drcd_qg": Task(
        title="DRCD：由答案和原文生成问题（繁体）",
        kind="generation",
        reader=readers.read_squad_questions,
        epochs=5.0,
        source_length=384,
        target_length=128,
    ),
    "kbqg": Task(
        title="NLPCC KBQA：由知识三元组生成问题",
        kind="generation",
        reader=readers.read_kbqa,
        epochs=5.0,
        target_length=64,
    ),
    "kgclue": Task(
        title="KgCLUE：由知识三元组生成问题",
        kind="generation",
        reader=readers.read_kgclue,
        epochs=5.0,
        target_length=48,
    ),
    "classification": Task(
        title="自己的分类数据：text 与 label，或 text_a、text_b 与 label",
        kind="classification",
        reader=readers.read_classification,
        source_length=256,
    ),
    "labelling": Task(
        title="自己的序列标注数据：tokens 与 tags（BIO）",
        kind="labelling",
        reader=readers.read_labelling,
        source_length=256,
    ),
    "reading": Task(
        title="自己的抽取式阅读理解数据：SQuAD 格式的 JSON",
        kind="reading",
        reader=readers.read_squad,
        source_length=512,
        target_length=64,
    ),
    "generation": Task(
        title="自己的生成数据：src_txt 与 tgt_txt",
        kind="generation",
        reader=readers.read_generation,
        source_length=384,
        target_length=128,
    ),
}


def find_task(name: str) -> Task:
    """The task of that name.

    Raises:
        UsageError: there is none.
    """
    if not isinstance(name, str) or name not in TASKS:
        raise UsageError(f"没有任务 {shown(name)}。可用：{'、'.join(TASKS)}。")
    return TASKS[name]


def read_examples(
    task: Task, path: Path, *, answered: bool, at_least: int = 1, notes: Notes | None = None
) -> list[Example]:
    """All examples of a file; tags of any scheme are in BIO.

    Args:
        task: says how to read it.
        path: the file, or a `datasets` name where the task's format has rows.
        answered: every example must have its label, tags, answers or target. Rows of NLI sets
            whose annotators did not agree (label "-") are left out and counted.
        at_least: how many there must be.
        notes: is told of everything that was corrected or left out; it is logged as well.

    Raises:
        UsageError: an answer is missing, or there are too few examples.
        PlugError: the file is broken.
    """
    notes = notes or Notes()
    examples = list(task.reader(path, notes))
    if answered:
        examples = [example for example in examples if not _is_disputed(task, example, notes)]
    if len(examples) < at_least:
        raise UsageError(f"{path} 只有 {len(examples)} 个例子，至少要 {at_least} 个。")
    if answered:
        for example in examples:
            if not _answer(example):
                raise UsageError(f"{example.place}没有答案（{_ANSWERS[task.kind]}）。")
    if labelled := [example for example in examples if isinstance(example, LabellingExample)]:
        examples = [*convert_to_bio(labelled, notes)]
    notes.log()
    return examples


def _is_disputed(task: Task, example: Example, notes: Notes) -> bool:
    """Whether the label is "-": annotators did not agree."""
    if not isinstance(example, ClassificationExample) or example.label != NO_AGREEMENT:
        return False
    if not task.labels:
        if example.text_b is None:
            return False  # "-" and "+" are labels like others
        raise UsageError(
            f"{example.place}的标签是“-”：在 NLI 数据里这表示没有一致的标签。"
            "请删去这些行；若它是真正的标签，请换个名字。"
        )
    notes.add("没有一致标签（“-”）的行没有用", example.place)
    return True


_ANSWERS: dict[KindName, str] = {
    "classification": "label",
    "labelling": "tags",
    "reading": "answers",
    "generation": "要生成的文字",
}


def fingerprint_of(examples: Iterable[Example]) -> str:
    """What tells data from other data: a hash of the texts and answers in their order."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(repr((readers.text_of(example), _answer(example))).encode())
    return digest.hexdigest()[:32]


def _answer(example: Example) -> object:
    match example:
        case ClassificationExample():
            return example.label
        case LabellingExample():
            return example.tags
        case readers.QuestionExample():
            return example.answers
        case readers.GenerationExample():
            return example.target

"""Damaged data files, corpora and finetuning.json: each is read with one meaning or refused.

    python tests/faults/fuzz_data.py --count 2000

prints a table of outcomes and the numbers of the copies that failed. The ordinary suite tries a few
copies of each format (`test_fuzz_data.py`).
"""

from __future__ import annotations

import argparse
import gzip
import io
import json
import logging
import random
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parent))

import zstandard
from campaign import HANG, LOADED, REFUSED, TRACEBACK, WRONG, Counts, WrongAnswerError, campaign
from mutate import json_lines_mutations, json_mutations, mutations

from plug.checkpoints.directory import RUN_FILE, find_model_directory
from plug.finetuning import readers
from plug.finetuning.kind import make_kind
from plug.finetuning.predict import kind_of
from plug.finetuning.tasks import Task, find_task, read_examples
from plug.pretraining.corpus import read_documents, split_sentences
from plug.tokenization import PlugTokenizer

SEED = 20261127
Mutate = Callable[[bytes, int, int], Iterator[bytes]]


class Format(NamedTuple):
    """A format's whole file, how it is damaged, and what reads it."""

    name: str  # of the file
    content: bytes
    mutate: Mutate
    read: Callable[[Path], object]


def _lines(*rows: object) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


SQUAD = {
    "version": "v1.0",
    "data": [
        {
            "title": "庙",
            "paragraphs": [
                {
                    "id": f"P{number}",
                    "context": "山上有座庙，庙里有花，花很好看。",
                    "qas": [
                        {
                            "id": f"Q{number}-{start}",
                            "question": "庙里有什么？",
                            "answers": [{"text": "花", "answer_start": start}],
                        }
                        for start in (9, 11)
                    ],
                }
                for number in range(3)
            ],
        }
    ],
}
NER = {"name": {"温格": [[0, 1]]}, "organization": {"曼联": [[3, 4], [6, 7]]}}
SPANS = {"span1_text": "洋人", "span1_index": 2, "span2_text": "他们", "span2_index": 6}
ROWS = {  # by task
    name: _lines(*({"id": number, **row} for number in range(4)))
    for name, row in {
        "classification": {"text": "今天天气很好。", "label": "好"},
        "ocnli": {"sentence1": "甲", "sentence2": "乙", "label": "neutral"},
        "cluewsc2020": {"text": "这些洋人好。他们高。", "target": SPANS, "label": "true"},
        "csl": {"abst": "摘要。", "keyword": ["磨齿", "误差"], "label": 1},
        "cluener2020": {"text": "温格胜曼联和曼联", "label": NER},
        "labelling": {"tokens": list("李雷在北京"), "tags": ["B-P", "E-P", "O", "B-L", "E-L"]},
        "generation": {"src_txt": "花[SEP]山上有花", "tgt_txt": "有什么？"},
        "kgclue": {"question": "问？", "answer": "甲 ||| 乙 ||| 丙"},
    }.items()
}
CSV = 'text,label\n"他说""好""，\n走了",好\n很坏,坏\n5寸"屏,好\n'.encode()
TSV = 'text\tlabel\n"他说好\t好\n很坏\t坏\n5寸"屏\t好\n'.encode()
COLUMNS = "中 B-ORG\n共 I-ORG\n\n致 O\n\u3000 O\n中 B-ORG\n国 I-ORG\n\n".encode() * 3
KBQA = "".join(
    f"<question id={number}>\t谁写的？\n<triple id={number}>\t红楼梦 ||| 作者 ||| 曹雪芹\n"
    f"<answer id={number}>\t曹雪芹\n=====\n"
    for number in range(3)
).encode()
CORPUS_LINES = _lines(*({"text": f"第{number}篇。\n第二段", "id": number} for number in range(5)))
CORPUS = "第一篇。他说：“你好！”\n第二段\n\n第二篇……真的吗？！\n\n\u3000\n第三篇。\n".encode() * 3


def _compressed(pack: Callable[[bytes], bytes]) -> Mutate:
    """Half of the copies are damaged before they are compressed, half after."""

    def mutate(data: bytes, seed: int, count: int) -> Iterator[bytes]:
        rng = random.Random(seed)
        for _ in range(count):
            if rng.random() < 0.5:
                yield pack(next(mutations(data, rng.getrandbits(32), 1)))
            else:
                yield next(mutations(pack(data), rng.getrandbits(32), 1))

    return mutate


def _parquet() -> bytes:
    import pyarrow
    from pyarrow import parquet

    table = pyarrow.table(
        {
            "tokens": [list("李雷在北京"), ["山"]] * 20,
            "tags": [["B-P", "I-P", "O", "O", "O"], ["O"]] * 20,
        }
    )
    stream = io.BytesIO()
    parquet.write_table(table, stream)
    return stream.getvalue()


def formats() -> list[Format]:
    """Every format; `parquet` where pyarrow is installed."""
    tokenizer = PlugTokenizer.load(find_model_directory())
    run = {
        "settings": {
            "task": "classification", "train": "a.jsonl", "eval": "b.jsonl", "output": "o",
            "model": "plug-mini-zh", "epochs": 3.0, "batch_size": 8, "learning_rate": 5e-4,
            "source_length": 128, "target_length": 30, "num_beams": 1, "precision": "bf16",
        },
        "labels": ["坏", "好"],
        "label_names": {"好": "好评"},
        "pairs": False,
    }  # fmt: skip

    def task(name: str, answered: bool = True) -> Callable[[Path], object]:
        return lambda path: read_task(find_task(name), path, tokenizer, answered)

    def fine_tuned(path: Path) -> None:
        config = json.loads((find_model_directory() / "config.json").read_text())
        config["id2label"] = {"0": "坏", "1": "好"}
        (path.parent / "config.json").write_text(json.dumps(config))
        tokenizer.save(path.parent)
        kind = kind_of(path.parent)
        if kind.labels != ["坏", "好"] or kind.source_length > 512:
            raise WrongAnswerError(f"{kind.labels} {kind.source_length}")
        kind._inputs([kind.example(["今天天气很好。"])])

    def corpus(path: Path) -> None:
        for document in read_documents(path):
            if "\ufeff" in document or not document.strip():
                raise WrongAnswerError(repr(document))
            tokenizer.encode_batch(split_sentences(document))

    squad = json.dumps(SQUAD, ensure_ascii=False).encode()
    rows = [
        Format(f"{name}.jsonl", content, json_lines_mutations, task(name))
        for name, content in ROWS.items()
    ]
    gz = _compressed(lambda data: gzip.compress(data, mtime=0))
    found = [
        *rows,
        Format("table.csv", CSV, mutations, task("classification")),
        Format("table.tsv", TSV, mutations, task("classification", answered=False)),
        Format("columns.txt", COLUMNS, mutations, task("people_daily_ner")),
        Format("kbqa.txt", KBQA, mutations, task("kbqg")),
        Format("squad.json", squad, json_mutations, task("reading")),
        Format("questions.json", squad, json_mutations, task("dureader_robust_qg")),
        Format("corpus.txt", CORPUS, mutations, corpus),
        Format("corpus.jsonl", CORPUS_LINES, json_lines_mutations, corpus),
        Format("corpus.txt.gz", CORPUS, gz, corpus),
        Format("corpus.txt.zst", CORPUS, _compressed(zstandard.compress), corpus),
        Format(RUN_FILE, json.dumps(run, ensure_ascii=False).encode(), json_mutations, fine_tuned),
    ]
    try:
        content = _parquet()
    except ImportError:
        return found
    return [*found, Format("labelling.parquet", content, mutations, task("labelling"))]


def read_task(task: Task, path: Path, tokenizer: PlugTokenizer, answered: bool) -> None:
    """Read a file as `plug finetune` does, as far as the inputs of the model.

    Raises:
        WrongAnswerError: what was read contradicts itself.
    """
    examples = read_examples(task, path, answered=answered)
    found = set()
    for each in examples:
        _check_example(each)
        found |= set(getattr(each, "tags", None) or ()) | {getattr(each, "label", None)}
    labels = task.labels or sorted(found - {None})
    kind = make_kind(task.kind, tokenizer, labels, source_length=128, target_length=64)
    if answered:
        kind.check(examples, training=True)
        kind.features(examples)


def _check_example(each: readers.Example) -> None:
    match each:
        case readers.QuestionExample(start=int(start)):
            if not each.answers[0] or not each.context.startswith(each.answers[0], start):
                raise WrongAnswerError(f"{each.answers[0]!r} does not stand at {start}")
        case readers.LabellingExample(tags=tuple(tags)):
            before = ["", *(tag[2:] for tag in tags)]
            for tag, kind in zip(tags, before, strict=False):
                if tag != "O" and not tag.startswith("B-") and kind != tag[2:]:
                    raise WrongAnswerError(f"no BIO: {tags}")
        case readers.ClassificationExample(label=str(label)):
            if label != label.strip() or label in ("nan", "None", "[]", "{}"):
                raise WrongAnswerError(f"label {label!r}")


def try_format(each: Format, count: int, folder: Path) -> Counts:
    """The outcomes of ``count`` damaged copies."""
    path = folder / each.name

    def read(copy: bytes) -> None:
        path.write_bytes(copy)
        each.read(path)

    seed = SEED + zlib.crc32(each.name.encode())
    return campaign(each.mutate(each.content, seed, count), read, seconds=60)


def main() -> int:
    """Print the table; the status is 1 if any copy failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=2000, help="copies of each format")
    parser.add_argument("--only", help="part of a format's file name")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    failed = 0
    print("| format | copies | read | refused | tracebacks | hangs | wrong |")
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for each in formats():
            if arguments.only and arguments.only not in each.name:
                continue
            counts = try_format(each, arguments.count, Path(folder))
            shown = [counts[name] for name in (LOADED, REFUSED, TRACEBACK, HANG, WRONG)]
            print(
                f"| `{each.name}` | {counts.total()} | {' | '.join(map(str, shown))} |", flush=True
            )
            for number, told in counts.faults[:5]:
                print(f"copy {number}: {told}", file=sys.stderr)
            failed += len(counts.faults)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())

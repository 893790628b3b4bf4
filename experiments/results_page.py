"""Tables of docs/results.md from the lines that `finetune_all.py` wrote.

    python experiments/results_page.py --results docs/runs/finetune.jsonl --page docs/results.md \
        [--ablation docs/runs/ablation.jsonl docs/runs/ablation-encoders.jsonl]

Replaces what stands in the page between `<!-- begin NAME -->` and `<!-- end NAME -->` for the names
`finetune`, `commands` and `ablation`; the words around them are written by hand. A page that is not
there yet is begun. Several files of lines may be given; of a run that is in two, the last counts.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

from plug.finetuning.clue import CLUE_TASKS
from plug.finetuning.tasks import TASKS

# What the issue expects of the shipped model, in percent.
AIMS = {
    "tnews": 52, "afqmc": 70, "ocnli": 55, "cluener2020": 65,
    "dureader_robust_qg": 20, "cmrc2018_qg": 20,
}  # fmt: skip
# CLUE's leaderboard and the papers, on their own (larger) training sets and test sets.
TINY = {"tnews": 54.57, "afqmc": 69.52, "iflytek": 57.31}  # RoBERTa-tiny, 7.5M
BASE = {"tnews": 56.58, "afqmc": 73.70, "iflytek": 60.29}  # BERT-base
PLUG = {
    "afqmc": 77.441, "tnews": 73.060, "iflytek": 64.000, "cmnli": 84.949, "ocnli": 83.267,
    "cluewsc2020": 94.483, "csl": 87.100, "dureader_robust_qg": 42.83,
}  # fmt: skip
TITLES = {"random": "random weights", "stage1": "stage 1 alone", "shipped": "plug-mini-zh"}
NAMES = {"accuracy": "accuracy", "f1": "F1", "bleu4": "BLEU-4"}
# Starting points of the ablation, beside that with all objectives (`stage1` or `full`).
PLAIN = {"plain": "equal steps", "plain-longer": "equal time"}

PAGE = """# Results

What `plug-mini-zh` reaches on each task after fine-tuning, and what its pre-training is worth. The tables are made by
`experiments/results_page.py` from the lines of `experiments/finetune_all.py` ([the runs](runs/finetune.jsonl)).

## Fine-tuning

Three starting points of the same shape and settings: random weights, the encoder of stage 1 alone (StructBERT; where the task
writes, under a decoder of random weights), and the shipped model (stages 1 and 2). The epoch that is best on the development file counts, which
flatters all of them a little. The development files are the first halves of the published ones; the training files of CMNLI, IFLYTEK, CSL and
DuReader-robust are parts of the published ones (the table has their sizes): compare with the published figures with care. Those of PLUG 27B are
an ensemble's, on the test sets.

<!-- begin finetune -->
<!-- end finetune -->

## Commands

Beside the published data in `tasks/`. A difference of a few tenths between devices is chance.

<!-- begin commands -->
<!-- end commands -->

## What the word and sentence objectives bring

Stage 1 with the word and sentence objectives beside the masked-LM loss (`full`), as StructBERT's paper claims they help; with the masked-LM
loss alone for as many steps (`plain`), and for as long on the same card,
compilation aside (`plain-longer`). Then the same fine-tuning of each.

<!-- begin ablation -->
<!-- end ablation -->
"""  # noqa: E501

Line = dict[str, Any]
Cell = tuple[str, str]  # task, start


class Scores(NamedTuple):
    """The runs of one task from one starting point, by seed."""

    lines: list[Line]

    def percent(self, metric: str) -> list[float]:
        return [100 * line["metrics"][metric] for line in self.lines]

    def shown(self, metric: str) -> str:
        """Mean ± standard deviation over seeds, in percent; one seed has no deviation."""
        values = self.percent(metric)
        if len(values) < 2:
            return "".join(f"{value:.2f} (1 seed)" for value in values) or "–"
        return f"{fmean(values):.2f} ± {stdev(values):.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--results", nargs="+", type=Path, required=True)
    parser.add_argument("--ablation", nargs="+", type=Path, default=[])
    parser.add_argument("--page", type=Path, required=True)
    arguments = parser.parse_args()
    lines = [line for line in read_lines(arguments.results) if line["start"] not in PLAIN]
    blocks = {"finetune": finetune_block(lines), "commands": commands_block(lines)}
    if arguments.ablation:
        encoders = read_encoders(arguments.ablation)
        blocks["ablation"] = ablation_block(read_lines(arguments.ablation), encoders)
    page = arguments.page.read_text(encoding="utf-8") if arguments.page.is_file() else PAGE
    for name, block in blocks.items():
        page = replaced(page, name, block)
    arguments.page.write_text(page, encoding="utf-8")
    print(f"{arguments.page}: {len(lines)} runs")


def read_lines(paths: Iterable[Path]) -> list[Line]:
    """Runs of all files, the last of each; those that failed left out."""
    found = {
        (line["task"], line["start"], line["seed"]): line
        for line in _lines(paths)
        if "task" in line and "failed" not in line
    }
    if not found:
        raise SystemExit(f"no finished run in {', '.join(map(str, paths))}")
    return list(found.values())


def read_encoders(paths: Iterable[Path]) -> list[Line]:
    """Lines of `ablation.py` on how the encoders were made."""
    return [line for line in _lines(paths) if "name" in line]


def _lines(paths: Iterable[Path]) -> Iterator[Line]:
    for path in paths:
        yield from map(json.loads, path.read_text(encoding="utf-8").splitlines())


def replaced(page: str, name: str, block: str) -> str:
    """The page with ``block`` between the marks of that name, which must be there."""
    marks = re.compile(rf"(<!-- begin {name} -->\n).*?(<!-- end {name} -->)", re.DOTALL)
    page, count = marks.subn(lambda found: f"{found[1]}\n{block}\n{found[2]}", page)
    if count != 1:
        raise SystemExit(f"the page has {count} places for “{name}”, not one")
    return page


def grouped(lines: Iterable[Line]) -> dict[Cell, Scores]:
    cells: dict[Cell, Scores] = {}
    for line in sorted(lines, key=lambda line: line["seed"]):
        cells.setdefault((line["task"], line["start"]), Scores([])).lines.append(line)
    return cells


def tasks_of(lines: Iterable[Line]) -> list[str]:
    present = {line["task"] for line in lines}
    return [task for task in TASKS if task in present]


def starts_of(lines: Iterable[Line]) -> list[str]:
    present = {line["start"] for line in lines}
    return [*(start for start in TITLES if start in present), *sorted(present - TITLES.keys())]


def finetune_block(lines: list[Line]) -> str:
    """Scores by task and starting point, beside what others reach; CLUE's mean; generation."""
    cells, starts = grouped(lines), starts_of(lines)
    nothing = Scores([])
    rows = []
    for task in tasks_of(lines):
        metric = TASKS[task].metric
        shipped = cells.get((task, "shipped"), nothing)
        aim = AIMS.get(task)
        reached = ""
        if aim is not None and shipped.lines:
            reached = " reached" if fmean(shipped.percent(metric)) >= aim else " **missed**"
        rows.append(
            [
                f"`{task}`",
                NAMES[metric],
                _sizes([line for line in lines if line["task"] == task]),
                _majority([line for line in lines if line["task"] == task]),
                *(cells.get((task, start), nothing).shown(metric) for start in starts),
                "" if aim is None else f"{aim}{reached}",
                *(_published(table, task) for table in (TINY, BASE, PLUG)),
            ]
        )
    means = [_clue_score(cells, start) for start in starts]
    rows.append(["**CLUE score**", "mean", "", "", *means, "", "", "", "80.61"])
    header = [
        "task",
        "metric",
        "train / dev",
        "majority",
        *(TITLES.get(start, start) for start in starts),
    ]
    parts = [
        table([*header, "aim", "RoBERTa-tiny 7.5M", "BERT-base 102M", "PLUG 27B"], rows),
        _circumstances(lines),
    ]
    if written := [task for task in tasks_of(lines) if TASKS[task].kind == "generation"]:
        parts.append(_detail(cells, written, starts, "Question generation", {
            "bleu4": "BLEU-4 (original)", "bleu4_strict": "BLEU-4 (strict)", "rouge_l": "ROUGE-L",
            "exact_match": "exact match", "distinct_2": "distinct-2",
        }))  # fmt: skip
    if labelled := [task for task in tasks_of(lines) if TASKS[task].kind == "labelling"]:
        parts.append(_detail(cells, labelled, starts, "Entities", {
            "f1": "F1", "precision": "precision", "recall": "recall",
        }))  # fmt: skip
    if read := [task for task in tasks_of(lines) if TASKS[task].kind == "reading"]:
        columns = {"f1": "F1", "exact_match": "exact match"}
        parts.append(_detail(cells, read, starts, "Reading", columns))
    return "\n\n".join(parts) + "\n"


def _sizes(lines: list[Line]) -> str:
    """Examples learnt from and scored on, the same in all runs."""
    sizes = {(line["train_examples"], line["eval_examples"]) for line in lines}
    return "; ".join(f"{train:,} / {dev:,}" for train, dev in sorted(sizes))


def _majority(lines: list[Line]) -> str:
    """Accuracy of the most frequent answer, the same in all runs."""
    shares = {line["metrics"].get("majority") for line in lines} - {None}
    return "".join(f"{100 * share:.2f}" for share in shares)


def _published(scores: dict[str, float], task: str) -> str:
    return f"{scores[task]:.2f}" if task in scores else ""


def _clue_score(cells: dict[Cell, Scores], start: str) -> str:
    """The plain mean over CLUE's tasks of the mean over seeds, where all of them were run."""
    found = [
        cells[task, start].percent("accuracy") for task in CLUE_TASKS if (task, start) in cells
    ]
    if len(found) < len(CLUE_TASKS):
        return f"{len(found)} of {len(CLUE_TASKS)} tasks"
    return f"**{fmean(map(fmean, found)):.2f}**"


def _circumstances(lines: list[Line]) -> str:
    machines = sorted({f"{line['device']}, torch {line['torch']}, transformers "
                       f"{line['transformers']}" for line in lines})  # fmt: skip
    seconds = sum(line["seconds"] for line in lines)
    return (
        f"{len(lines)} runs, {seconds / 60:.0f} minutes of processes in all (several shared the "
        f"device); {'; '.join(machines)}. In percent, mean ± standard deviation over seeds, of the "
        "best epoch on the development file."
    )


def _detail(
    cells: dict[Cell, Scores],
    tasks: Sequence[str],
    starts: Sequence[str],
    title: str,
    columns: dict[str, str],
) -> str:
    rows = [
        [f"`{task}`", TITLES.get(start, start), *(cells[task, start].shown(key) for key in columns)]
        for task in tasks
        for start in starts
        if (task, start) in cells
    ]
    return f"**{title}**\n\n" + table(["task", "start", *columns.values()], rows)


def commands_block(lines: list[Line]) -> str:
    """Each figure by seed, the epochs behind it, and the command that makes it again."""
    rows = []
    cells = grouped(lines)
    for task in tasks_of(lines):
        metric = TASKS[task].metric
        for start in starts_of(lines):
            if (task, start) in cells:
                runs = cells[task, start].lines
                by_epoch = " ".join(f"{100 * value:.1f}" for value in runs[0]["by_epoch"])
                rows.append(
                    [
                        f"`{task}`",
                        TITLES.get(start, start),
                        ", ".join(f"{100 * run['metrics'][metric]:.2f}" for run in runs),
                        by_epoch,
                        str(runs[0]["steps"]),
                        ", ".join(f"{run['seconds']:.0f}" for run in runs),
                        f"`{runs[0]['command']}`",
                    ]
                )
    header = ["task", "start", "each seed", "epochs of the first", "steps", "seconds", "command"]
    return table(header, rows) + "\n"


def ablation_block(lines: list[Line], encoders: list[Line]) -> str:
    """How the encoders were made; each on each task, and the differences, seed by seed."""
    full = "stage1" if any(line["start"] == "stage1" for line in lines) else "full"
    present = {line["start"] for line in lines}
    plain = [start for start in PLAIN if start in present]
    tasks = tasks_of(line for line in lines if line["start"] in plain)
    lines = [line for line in lines if line["start"] in (*plain, full) and line["task"] in tasks]
    cells = grouped(lines)
    rows = []
    for task in tasks:
        metric = TASKS[task].metric
        scores = {start: cells.get((task, start), Scores([])) for start in (*plain, full)}
        by_seed = {
            start: {line["seed"]: 100 * line["metrics"][metric] for line in each.lines}
            for start, each in scores.items()
        }
        row = [f"`{task}`", NAMES[metric], *(each.shown(metric) for each in scores.values())]
        for start in plain:
            shared = sorted(by_seed[start].keys() & by_seed[full].keys())
            differences = [by_seed[full][seed] - by_seed[start][seed] for seed in shared]
            listed = ", ".join(f"{value:+.2f}" for value in differences)
            row.append(f"{fmean(differences):+.2f} ({listed})" if differences else "–")
        rows.append(row)
    header = [
        "task",
        "metric",
        *(f"masked LM alone, {PLAIN[start]} (`{start}`)" for start in plain),
        f"with word and sentence objectives (`{full}`)",
        *(f"gain at {PLAIN[start]} (by seed)" for start in plain),
    ]
    parts = [table(header, rows), _circumstances(lines), commands_block(lines).strip()]
    if encoders:
        costs = [
            [
                f"`{encoder['name']}`",
                f"{encoder['step']:,.0f}",
                f"{encoder['tokens'] / 1e6:,.1f}M",
                f"{encoder['seconds']:,.0f}",
                ", ".join(f"{name} {value:.3f}" for name, value in encoder["losses"].items()),
                f"`{encoder['command']}`",
            ]
            for encoder in encoders
        ]
        head = ["encoder", "steps", "tokens", "seconds", "losses at the end", "command"]
        parts.insert(0, table(head, costs))
    return "\n\n".join(parts) + "\n"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    cells = [header, ["---"] * len(header), *rows]
    return "\n".join(
        f"| {' | '.join(cell.replace('|', '&#124;') for cell in row)} |" for row in cells
    )


if __name__ == "__main__":
    main()

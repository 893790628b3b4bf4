"""The small model fine-tuned in every mode of `--memory`: what each costs in quality.

    python experiments/finetune_modes.py --data tasks --folder build/modes --jobs 10 --seeds 1 2
    python experiments/finetune_modes.py --table build/modes/results.jsonl

Parts of TNEWS and of CMRC2018's questions (--examples), so that twenty runs take minutes. A line a
run is appended to FOLDER/results.jsonl, by the processes of `experiments/finetune_all.py`; the same
command run again does what is missing there. --table makes docs/results.md's table of them.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import statistics
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from finetune_all import FOLDERS, Run, _forget_failures, _Worker

from plug.finetuning.settings import FinetuneSettings
from plug.finetuning.tasks import TASKS

# Rates: the default, and four times that for adapters. None was tuned.
MODES: dict[str, dict[str, Any]] = {
    "adamw": {"memory": "full"},
    "adafactor": {"memory": "full", "optimizer": "adafactor"},
    "adamw8bit": {"memory": "full", "optimizer": "adamw8bit"},
    "adamw8bit_fused": {"memory": "full", "optimizer": "adamw8bit_fused"},
    "lora": {"memory": "lora", "learning_rate": 2e-3},
    "qlora8": {"memory": "qlora", "learning_rate": 2e-3, "bits": 8},
    "qlora4": {"memory": "qlora", "learning_rate": 2e-3, "bits": 4},
}
NAMES = {
    "adamw": "every weight, AdamW",
    "adafactor": "every weight, `--optimizer adafactor`",
    "adamw8bit": "every weight, `--optimizer adamw8bit`",
    "adamw8bit_fused": "every weight, `--optimizer adamw8bit_fused`",
    "lora": "`--memory lora`",
    "qlora8": "`--memory qlora`, 8 bits",
    "qlora4": "`--memory qlora`, 4 bits",
}
EPOCHS = {"tnews": 1.0, "cmrc2018_qg": 2.0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, help="a folder a task")
    parser.add_argument("--folder", type=Path, help="runs and results.jsonl")
    parser.add_argument("--table", type=Path, help="print the table of these results instead")
    parser.add_argument("--shipped", default="plug-mini-zh", help="name or directory")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=list(MODES))
    parser.add_argument("--examples", nargs=2, type=int, default=[32000, 5000], metavar="N")
    parser.add_argument("--held-out", nargs=2, type=int, default=[5000, 750], metavar="N")
    parser.add_argument("--jobs", type=int, default=10)
    parser.add_argument("--minutes", type=float, default=600.0)
    parser.add_argument("--device")
    arguments = parser.parse_args()
    if arguments.table:
        print(table([json.loads(line) for line in arguments.table.open(encoding="utf-8")]))
        return
    arguments.folder.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // arguments.jobs)))
    results = arguments.folder / "results.jsonl"
    done = _forget_failures(results)
    waiting = iter([run for run in runs(arguments) if run.key not in done])
    deadline, lock = time.monotonic() + 60 * arguments.minutes, threading.Lock()

    def serve(number: int) -> None:
        with _Worker(arguments.folder / f"worker-{number}.log", arguments.device) as worker:
            while time.monotonic() < deadline:
                with lock:
                    run = next(waiting, None)
                line = None if run is None else worker.finish(run, deadline)
                if line is None:
                    return
                with lock, results.open("a", encoding="utf-8") as file:
                    text = json.dumps(line, ensure_ascii=False)
                    file.write(text + "\n")
                    print(text, flush=True)

    with ThreadPoolExecutor(arguments.jobs) as pool:
        for server in [pool.submit(serve, number) for number in range(arguments.jobs)]:
            server.result()


def runs(arguments: argparse.Namespace) -> Iterator[Run]:
    """Each mode, task and seed; the longest first."""
    files = {
        task: (
            part(arguments, task, "train", count),
            part(arguments, task, "dev", held_out),
        )
        for task, count, held_out in zip(
            EPOCHS, arguments.examples, arguments.held_out, strict=True
        )
    }
    for task in reversed(EPOCHS):
        for seed in arguments.seeds:
            for mode in reversed(arguments.modes):
                options = dict(MODES[mode])
                bits = options.pop("bits", None)
                model = arguments.shipped if bits is None else quantized(arguments, bits)
                train, dev = files[task]
                settings = FinetuneSettings(
                    task=task,
                    train=str(train),
                    eval=str(dev),
                    output=str(arguments.folder / f"{task}-{mode}-{seed}"),
                    model=str(model),
                    seed=seed,
                    epochs=EPOCHS[task],
                    eval_batch_size=128,
                    **options,
                )
                yield Run(task, mode, seed, settings)


def quantized(arguments: argparse.Namespace, bits: int) -> Path:
    from plug.quantization.convert import quantize_directory

    target: Path = arguments.folder / f"mini-{bits}"
    if not target.is_dir():
        quantize_directory(arguments.shipped, target, bits=bits)
    return target


def part(arguments: argparse.Namespace, task: str, name: str, count: int) -> Path:
    """The first ``count`` examples of a published file, as a file of its format."""
    folder = FOLDERS.get(task, task)
    source = next((arguments.data / folder).glob(f"{name}.*"))
    target = arguments.folder / folder / f"{name}.json"
    target.parent.mkdir(exist_ok=True)
    content = source.read_bytes()
    text = (gzip.decompress(content) if source.suffix == ".gz" else content).decode("utf-8")
    if TASKS[task].kind == "classification":
        target.write_text("".join(text.splitlines(keepends=True)[:count]), encoding="utf-8")
        return target
    left, kept = count, []
    for article in json.loads(text)["data"]:
        for paragraph in article["paragraphs"]:
            questions = paragraph["qas"][:left]
            left -= len(questions)
            if questions:
                kept.append({"paragraphs": [{**paragraph, "qas": questions}]})
    target.write_text(json.dumps({"data": kept}, ensure_ascii=False), encoding="utf-8")
    return target


def table(rows: list[dict[str, Any]]) -> str:
    """Scores in percent by mode and task, and how far each is from AdamW's; of modes that ran."""
    scores: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        if "failed" not in row:
            value = 100 * row["metrics"][TASKS[row["task"]].metric]
            scores.setdefault((row["task"], row["start"]), []).append(value)
    lines = ["| mode | TNEWS, accuracy | CMRC2018 questions, BLEU-4 |", "| --- | --- | --- |"]
    ran = {mode for _, mode in scores}
    for mode in filter(ran.__contains__, MODES):
        cells = []
        for task in EPOCHS:
            found = scores.get((task, mode), [])
            each = ", ".join(f"{value:.1f}" for value in found)
            mean = statistics.mean(found) if found else float("nan")
            change = mean - statistics.mean(scores[task, "adamw"])
            cells.append(f"{mean:.1f} ({each}){'' if mode == 'adamw' else f' {change:+.1f}'}")
        lines.append(f"| {NAMES[mode]} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()

"""Fine-tune every task from several starting points and seeds; one JSON line a run.

    python benchmarks/finetune_all.py --data tasks --folder build/finetune --jobs 6 \
        --stage1 runs/mini-stage1/model --seeds 1 2 3 --minutes 9

Starting points: `shipped` (plug-mini-zh), `random` (the same shape, random weights) and, with
`--stage1`, `stage1` (that encoder; for generation, under a random decoder). Further ones:
`--start NAME=DIRECTORY`. Runs are processes of their own, `--jobs` at a time on one device, in the
order seed, task, start. Results are appended to FOLDER/results.jsonl; runs that stand there are
skipped, so that the same command goes on after `--minutes` (runs not done by then are dropped).
Each line holds the command, the scores on the development file, the best epoch's step and seconds.

Where seqeval is not installed (it needs scikit-learn alone): pip install --no-deps --target DIR
seqeval elsewhere, and PYTHONPATH=DIR here.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from plug.checkpoints.store import find_model_directory, load, save
from plug.finetuning.tasks import TASKS
from plug.model.plug import Plug
from plug.tokenization import PlugTokenizer

FOLDERS = {  # where a task's name is not that of its data's folder
    "dureader_robust_qg": "dureader_robust",
    "cmrc2018_qg": "cmrc2018",
    "drcd_qg": "drcd",
    "kbqg": "nlpcc_kbqa",
}
DEFAULT_TASKS = [  # those of docs/results.md
    *("afqmc", "tnews", "iflytek", "cmnli", "ocnli", "cluewsc2020", "csl"),
    *("cluener2020", "dureader_robust_qg", "cmrc2018_qg"),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--tasks", nargs="+", default=DEFAULT_TASKS, choices=list(TASKS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--stage1", type=Path)
    parser.add_argument("--start", nargs="+", default=[], metavar="NAME=DIRECTORY")
    parser.add_argument("--jobs", type=int, default=4)
    parser.add_argument("--minutes", type=float, default=600.0)
    parser.add_argument("--keep", action="store_true", help="keep the models, not reports alone")
    arguments, options = parser.parse_known_args()  # the rest goes to `plug finetune`

    arguments.folder.mkdir(parents=True, exist_ok=True)
    results = arguments.folder / "results.jsonl"
    done = {
        tuple(json.loads(line)[key] for key in ("task", "start", "seed"))
        for line in (results.read_text().splitlines() if results.is_file() else [])
    }
    deadline = time.monotonic() + 60 * arguments.minutes
    runs = [
        (task, start, seed, model)
        for seed in arguments.seeds
        for task in arguments.tasks
        for start, model in _starts(arguments, task).items()
        if (task, start, seed) not in done
    ]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        for line in pool.map(lambda run: _run(*run, arguments, options, deadline), runs):
            if line is not None:
                with results.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(line, ensure_ascii=False) + "\n")
                print(json.dumps(line, ensure_ascii=False), flush=True)
    left = (
        len(runs) - len(results.read_text().splitlines() if results.is_file() else []) + len(done)
    )
    print(json.dumps({"runs": len(runs), "not_done": left, "device": _device()}))


def _starts(arguments: argparse.Namespace, task: str) -> dict[str, list[str]]:
    """Options of `plug finetune` by the name of the starting point."""
    starts = {"shipped": [], "random": ["--from-scratch"]}
    if arguments.stage1:
        model = arguments.stage1
        if TASKS[task].kind == "generation":
            model = _with_decoder(model, arguments.folder / "stage1-with-decoder")
        starts["stage1"] = ["--model", str(model)]
    for each in arguments.start:
        name, _, directory = each.partition("=")
        starts[name] = ["--model", directory]
    return starts


def _with_decoder(encoder: Path, target: Path) -> Path:
    """The encoder of stage 1 under a decoder of random weights, in the shipped model's shape."""
    if not target.is_dir():
        shape = load("plug-mini-zh").config
        torch.manual_seed(0)
        model = Plug(shape)
        weights = load(encoder).state_dict()
        missing = model.load_state_dict(weights, strict=False).missing_keys
        assert all(name.startswith("decoder.") for name in missing), missing
        save(model, target, tokenizer=PlugTokenizer.load(find_model_directory(encoder)))
    return target


def _run(
    task: str,
    start: str,
    seed: int,
    model: list[str],
    arguments: argparse.Namespace,
    options: list[str],
    deadline: float,
) -> dict[str, object] | None:
    """One run; None if there is no time for it, or it did not end in time."""
    left = deadline - time.monotonic()
    if left <= 0:
        return None
    data = arguments.data / FOLDERS.get(task, task)
    train, dev = (next(data.glob(f"{part}.*")) for part in ("train", "dev"))
    output = arguments.folder / f"{task}-{start}-{seed}"
    shutil.rmtree(output, ignore_errors=True)
    words = ["finetune", task, "--train", str(train), "--eval", str(dev), "--output", str(output)]
    words += [*model, "--seed", str(seed), *options]
    began = time.monotonic()
    try:
        command = [sys.executable, "-m", "plug", *words]
        ran = subprocess.run(command, capture_output=True, text=True, timeout=left)
    except subprocess.TimeoutExpired:
        shutil.rmtree(output, ignore_errors=True)
        return None
    line: dict[str, object] = {"task": task, "start": start, "seed": seed}
    if ran.returncode:
        return line | {"failed": ran.stderr[-2000:], "command": shlex.join(["plug", *words])}
    log = [json.loads(each) for each in (output / "log.jsonl").read_text().splitlines()]
    metric = f"eval_{TASKS[task].metric}"
    if not arguments.keep:
        for path in output.glob("model*.safetensors*"):
            path.unlink()
    return line | {
        "metrics": json.loads((output / "metrics.json").read_text()),
        "by_epoch": [entry[metric] for entry in log if metric in entry],
        "seconds": round(time.monotonic() - began, 1),
        "command": shlex.join(["plug", *words]),
    }


def _device() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


if __name__ == "__main__":
    main()

"""Fine-tune every task from several starting points and seeds; one JSON line a run.

    python experiments/finetune_all.py --data tasks --folder build/finetune --jobs 8 \
        --starts shipped random stage1=runs/mini-stage1/model --seeds 1 2 3 --minutes 9

Starting points: `shipped` (--shipped, plug-mini-zh), `random` (its shape, random weights), and
NAME=DIRECTORY for others, or NAME=DIRECTORY@TASK,TASK for these tasks alone; an encoder alone gets
a random decoder where the task writes. Further options are those of `plug finetune`, for every run.

--jobs processes work on one device, each importing its libraries once and taking one run after
another, in the order seed, task (the long ones first), start. Each run is what the `plug finetune`
command in its line does; only its checkpoints are smaller. Lines are appended to
FOLDER/results.jsonl; the same command run again does what is missing there (failed runs too).
After --minutes whatever still runs is dropped. `experiments/results_page.py` makes tables of it.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import gc
import json
import multiprocessing
import os
import shutil
import threading
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from plug.finetuning.settings import FinetuneSettings
from plug.finetuning.tasks import TASKS

FOLDERS = {  # where a task's name is not that of its data's folder
    "dureader_robust_qg": "dureader_robust",
    "cmrc2018_qg": "cmrc2018",
    "drcd_qg": "drcd",
    "kbqg": "nlpcc_kbqa",
}
DEFAULT_TASKS = [  # of docs/results.md, the longest first: short runs fill the gaps at the end
    *("cmrc2018_qg", "tnews", "afqmc", "cluener2020", "iflytek", "ocnli"),
    *("cmnli", "csl", "dureader_robust_qg", "cluewsc2020"),
]
FACTS = ["train_examples", "eval_examples", "steps", "best_step", "device", "torch", "transformers"]


@dataclass(frozen=True)
class Run:
    """One line of the results."""

    task: str
    start: str
    seed: int
    settings: FinetuneSettings

    @property
    def key(self) -> tuple[str, str, int]:
        return self.task, self.start, self.seed

    def command(self) -> str:
        """As it would be typed beside folders `tasks` and `runs`."""
        train, dev = (Path(path) for path in (self.settings.train, self.settings.eval))
        return dataclasses.replace(
            self.settings,
            train=f"tasks/{train.parent.name}/{train.name}",
            eval=f"tasks/{dev.parent.name}/{dev.name}",
            output=f"runs/{Path(self.settings.output).name}",
        ).command()


def main() -> None:
    arguments, settings = _arguments()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // arguments.jobs)))
    results = arguments.folder / "results.jsonl"
    done = _forget_failures(results)
    runs = [run for run in _runs(arguments, settings) if run.key not in done]
    deadline = time.monotonic() + 60 * arguments.minutes
    waiting, lock, stopped = iter(runs), threading.Lock(), threading.Event()
    finished = 0

    def serve(number: int) -> None:
        nonlocal finished
        log = arguments.folder / f"worker-{number}.log"
        with _Worker(log, arguments.device) as worker:
            while time.monotonic() < deadline:
                with lock:
                    run = next(waiting, None)
                line = None if run is None else worker.finish(run, deadline)
                if line is None or stopped.is_set():
                    return
                with lock, results.open("a", encoding="utf-8") as file:
                    text = json.dumps(line, ensure_ascii=False)
                    file.write(text + "\n")
                    print(text, flush=True)
                    finished += "failed" not in line

    with ThreadPoolExecutor(arguments.jobs) as pool:
        servers = [pool.submit(serve, number) for number in range(arguments.jobs)]
        try:
            for server in servers:
                server.result()
        except KeyboardInterrupt:  # the workers have been told, too
            stopped.set()
    print(json.dumps({"runs": len(runs), "not_done": len(runs) - finished}))


def _forget_failures(results: Path) -> set[tuple[str, str, int]]:
    """Take failed runs, and a line that was cut off, out of the results; what is done."""
    lines = results.read_text(encoding="utf-8").splitlines() if results.is_file() else []
    kept = []
    for line in lines:
        with contextlib.suppress(ValueError):
            if "failed" not in (row := json.loads(line)):
                kept.append(row)
    if len(kept) < len(lines):
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept)
        results.write_text(text, encoding="utf-8")
    return {(row["task"], row["start"], row["seed"]) for row in kept}


def _arguments() -> tuple[argparse.Namespace, dict[str, Any]]:
    """Ours, and the settings of `plug finetune` that were given."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="a folder a task")
    parser.add_argument("--folder", type=Path, required=True, help="runs and results.jsonl")
    parser.add_argument("--tasks", nargs="+", default=DEFAULT_TASKS, choices=list(TASKS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--starts", nargs="+", default=["shipped", "random"])
    parser.add_argument("--shipped", default="plug-mini-zh", help="name or directory")
    parser.add_argument(
        "--epochs-of", nargs="+", type=_epochs, default=[], metavar="TASK=N", help="not the task's"
    )
    parser.add_argument("--jobs", type=int, default=4)
    parser.add_argument("--minutes", type=float, default=600.0)
    parser.add_argument("--device")
    own = {"task", "train", "eval", "output", "model", "from_scratch", "seed", "parallel"}
    free = [field for field in dataclasses.fields(FinetuneSettings) if field.name not in own]
    read: dict[str, dict[str, Any]] = {
        "int": {"type": int},
        "float": {"type": float},
        "str": {"type": str},
        "bool": {"action": argparse.BooleanOptionalAction},
    }
    for field in free:
        option = "--" + field.name.replace("_", "-")
        parser.add_argument(option, default=argparse.SUPPRESS, **read[str(field.type)])
    arguments = parser.parse_args()
    names = [field.name for field in free if field.name in arguments]
    return arguments, {name: getattr(arguments, name) for name in names}


def _epochs(text: str) -> tuple[str, float]:
    task, _, number = text.partition("=")
    if task not in TASKS:
        raise argparse.ArgumentTypeError(f"{task!r} is not a task")
    return task, float(number)


def _runs(arguments: argparse.Namespace, settings: dict[str, Any]) -> Iterator[Run]:
    epochs = dict(arguments.epochs_of)
    for seed in arguments.seeds:
        for task in arguments.tasks:
            data = arguments.data / FOLDERS.get(task, task)
            train, dev = (next(data.glob(f"{part}.*")) for part in ("train", "dev"))
            for start in arguments.starts:
                start, _, wanted = start.partition("@")
                if wanted and task not in wanted.split(","):
                    continue
                name, model = _start(start, task, arguments)
                yield Run(
                    task,
                    name,
                    seed,
                    FinetuneSettings(
                        task=task,
                        train=str(train),
                        eval=str(dev),
                        output=str(arguments.folder / f"{task}-{name}-{seed}"),
                        model=model,
                        from_scratch=name == "random",
                        seed=seed,
                        **settings | ({"epochs": epochs[task]} if task in epochs else {}),
                    ),
                )


def _start(start: str, task: str, arguments: argparse.Namespace) -> tuple[str, str]:
    """Name and model of a starting point."""
    name, _, directory = start.partition("=")
    if not directory:
        if name not in ("shipped", "random"):
            raise SystemExit(f"--starts {name}: shipped, random or NAME=DIRECTORY.")
        return name, arguments.shipped
    if TASKS[task].kind == "generation":
        return name, str(_with_decoder(Path(directory), arguments.shipped))
    return name, directory


@functools.cache
def _with_decoder(encoder: Path, shipped: str) -> Path:
    """ENCODER-with-decoder: that encoder under random weights, in the shipped model's shape."""
    import torch

    from plug.checkpoints.directory import CONFIG_FILE, find_model_directory
    from plug.loading.load import load
    from plug.loading.save import save
    from plug.model.configuration import PlugConfig
    from plug.model.plug import Plug
    from plug.tokenization import PlugTokenizer

    weights = load(encoder)
    if weights.decoder is not None:
        return encoder
    target = encoder.with_name(f"{encoder.name}-with-decoder")
    if not target.is_dir():
        whole = PlugConfig.from_file(find_model_directory(shipped) / CONFIG_FILE)
        shape = dataclasses.replace(weights.config, num_decoder_layers=whole.num_decoder_layers)
        torch.manual_seed(0)
        model = Plug(shape)
        missing = model.load_state_dict(weights.state_dict(), strict=False).missing_keys
        assert all(name.startswith("decoder.") for name in missing), missing
        save(model, target, tokenizer=PlugTokenizer.load(find_model_directory(encoder)))
    return target


class _Worker:
    """A process that does runs, one after another; a new one after a failure or a crash."""

    def __init__(self, log: Path, device: str | None) -> None:
        self._log = log
        self._device = device
        self._process: Any = None
        self._connection: Connection | None = None

    def __enter__(self) -> _Worker:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._process = None

    def finish(self, run: Run, deadline: float) -> dict[str, Any] | None:
        """The run's line; None if it did not end in time."""
        if self._process is None:
            context = multiprocessing.get_context("spawn")
            self._connection, theirs = context.Pipe()
            arguments = theirs, self._log, self._device
            self._process = context.Process(target=_work, args=arguments, daemon=True)
            self._process.start()
            theirs.close()  # so that a dead process is an end of file here
        assert self._connection is not None
        began = time.monotonic()
        line: dict[str, Any] = {"task": run.task, "start": run.start, "seed": run.seed}
        try:
            self._connection.send(run.settings)
            if not self._connection.poll(max(0.0, deadline - began)):
                shutil.rmtree(run.settings.output, ignore_errors=True)
                return None
            line |= self._connection.recv()
        except (EOFError, OSError) as error:
            line["failed"] = f"the process ended ({error!r}); see {self._log}"
        if "failed" in line:  # a CUDA error stays with its process
            self.__exit__()
        seconds = round(time.monotonic() - began, 1)
        return line | {"seconds": seconds, "command": run.command()}


def _work(connection: Connection, log: Path, device: str | None) -> None:
    """A worker's process: settings come in, what came of them goes out."""
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    import torch

    from plug.finetuning.run import finetune

    while True:
        try:
            settings = connection.recv()
        except EOFError:
            return
        output = Path(settings.output)
        shutil.rmtree(output, ignore_errors=True)
        try:
            result = finetune(settings, device=device, resumable=False)
            entries = [json.loads(line) for line in (output / "log.jsonl").open(encoding="utf-8")]
            metric = f"eval_{TASKS[settings.task].metric}"
            connection.send(
                {
                    "metrics": result.metrics,
                    "by_epoch": [entry[metric] for entry in entries if metric in entry],
                    **{key: result.facts[key] for key in FACTS},
                }
            )
        except Exception:
            connection.send({"failed": traceback.format_exc()[-2000:]})
        for path in output.glob("model*.safetensors*"):
            path.unlink()
        gc.collect()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()

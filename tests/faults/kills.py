"""Kill every writing command at every file event, fill its disk, and start it twice.

    python tests/faults/kills.py [--most N] [--only NAME]

Each command runs once under `strace`, which counts its system calls on files of its folder. Then it
runs once for each of them and is killed as it enters that call (`strace -e inject`). Afterwards the
same command, with --resume where it has one, must leave what an undisturbed run leaves. The first
trace also shows whether everything was synced before it was renamed. Figures: docs/reliability.md.

Linux and `strace` are needed, and root for the small file system that is filled. The bounded
version in the test suite (the fixture `kill`) counts what Python tells an audit hook instead.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers  # noqa: F401 (imported once here, not in each child)
from safetensors.torch import load_file

import plug.cli
import plug.evaluation.report
import plug.finetuning.run
import plug.pretraining.run
from plug.checkpoints.original import export_original
from plug.checkpoints.original_cache import converted
from plug.files import is_used
from plug.finetuning.predict import Predictor
from plug.loading.load import load
from plug.loading.save import save
from plug.model.configuration import PRESETS
from plug.model.plug import Plug
from plug.pretraining.tokens import read_tokens
from plug.tokenization import BYTE_TOKENS, SPECIAL_TOKENS, PlugTokenizer

CALLS = (
    "openat", "write", "pwrite64", "ftruncate", "fallocate", "msync", "fsync", "flock",
    "rename", "mkdir", "unlink", "unlinkat", "rmdir",
)  # fmt: skip
CHARACTERS = "今天气很好，我们去公园看花。山上有座庙\n"
Check = Callable[[Path], object]


@dataclass(frozen=True)
class Command:
    """A command that writes ``target`` (a name), and how to see that it is whole."""

    name: str
    words: tuple[str, ...]  # of `plug`; "{inputs}" and "{target}" are filled in
    target: str
    check: Check
    resumes: bool = False


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return load(directory).state_dict()


def original_shards(directory: Path) -> list[float]:
    found = [
        torch.load(path, weights_only=True)["module"]
        for path in sorted(directory.glob("model/*.pt"))
    ]
    return [float(sum(tensor.double().sum() for tensor in state.values())) for state in found]


def texts(directory: Path) -> dict[str, str]:
    return {p.name: p.read_text() for p in directory.iterdir() if p.suffix == ".json"}


def fine_tuned(directory: Path) -> dict[str, torch.Tensor]:
    assert not (directory / "checkpoints").exists()
    for name in ("report.md", "report.html", "log.jsonl", "predictions.jsonl", "metrics.json"):
        assert (directory / name).stat().st_size, name
    Predictor(directory, "cpu")
    return load_file(directory / "model.safetensors")


STAGE = ("--config", "{inputs}/stage1.toml", "--device", "cpu", "--set", "output={target}")
COMMANDS = [
    Command(
        "pretrain vocab",
        (
            "pretrain",
            "vocab",
            "--corpus",
            "{inputs}/text.txt",
            "--size",
            "330",
            "--alphabet",
            "40",
            "--output",
            "{target}",
        ),
        "vocab",
        lambda d: PlugTokenizer.load(d).backend.get_vocab(),
    ),
    Command(
        "pretrain data",
        (
            "pretrain",
            "data",
            "--corpus",
            "{inputs}/text.txt",
            "--tokenizer",
            "{inputs}/model",
            "--heldout",
            "0.1",
            "--output",
            "{target}",
        ),
        "corpus",
        lambda d: [
            (
                x.name,
                x.tokens.tolist(),
                x.sentences.tolist(),
                (d / "heldout" / "text.txt").read_text(),
            )
            for x in read_tokens(d)
        ],
    ),
    Command(
        "pretrain stage1",
        ("pretrain", "stage1", *STAGE),
        "run",
        lambda d: weights(d / "model"),
        resumes=True,
    ),
    Command(
        "convert", ("convert", "--from", "{inputs}/original", "--to", "{target}"), "new", weights
    ),
    Command(
        "convert --to-original",
        ("convert", "--from", "{inputs}/model", "--to", "{target}", "--to-original", "2"),
        "theirs",
        original_shards,
    ),
    Command(
        "convert --to-modelscope",
        ("convert", "--from", "{inputs}/original", "--to", "{target}", "--to-modelscope"),
        "hub",
        lambda d: (weights(d), (d / "README.md").read_text()),
    ),
    Command(
        "quantize",
        ("quantize", "--model", "{inputs}/model", "--bits", "8", "--to", "{target}"),
        "eight",
        weights,
    ),
    Command(
        "finetune",
        (
            "finetune",
            "classification",
            "--train",
            "{inputs}/train.jsonl",
            "--eval",
            "{inputs}/train.jsonl",
            "--model",
            "{inputs}/model",
            "--epochs",
            "2",
            "--batch-size",
            "4",
            "--source-length",
            "32",
            "--device",
            "cpu",
            "--output",
            "{target}",
        ),
        "tuned",
        fine_tuned,
        resumes=True,
    ),
    Command(
        "predict --output",
        (
            "predict",
            "--model",
            "{inputs}/tuned",
            "--file",
            "{inputs}/train.jsonl",
            "--device",
            "cpu",
            "--output",
            "{target}",
        ),
        "answers.jsonl",
        lambda p: p.read_text(),
    ),
    Command(
        "evaluate --report",
        (
            "evaluate",
            "classification",
            "--model",
            "{inputs}/tuned",
            "--data",
            "{inputs}/train.jsonl",
            "--device",
            "cpu",
            "--report",
            "{target}",
        ),
        "report",
        lambda d: (d / "metrics.json").read_text(),
    ),
    Command("plug.save", ("save",), "saved", weights),
    Command("ModelScope's cache", ("cache",), "original.plug", weights),
]


def make_inputs(folder: Path) -> None:
    """A tiny model, an original's checkpoint of it, a corpus and a task's file."""
    torch.manual_seed(0)
    pieces = [*SPECIAL_TOKENS.values(), *BYTE_TOKENS, *CHARACTERS, "今天", "天气"]
    pieces += [f"空{index}" for index in range(320 - len(pieces))]
    merges = [("今", "天"), ("天", "气")]
    tokenizer = PlugTokenizer.from_pieces({piece: i for i, piece in enumerate(pieces)}, merges)
    save(Plug(PRESETS["test"]), folder / "model", tokenizer=tokenizer)
    export_original(folder / "model", folder / "original", 2)
    draw = random.Random(0)
    documents = ["".join(draw.choices(CHARACTERS[:-1], k=200)) + "。" for _ in range(40)]
    (folder / "text.txt").write_text("\n\n".join(documents), encoding="utf-8")
    rows = [
        {"text": "".join(draw.sample(CHARACTERS[:-1], 6)), "label": "花山"[n % 2]} for n in range(8)
    ]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (folder / "train.jsonl").write_text(lines, encoding="utf-8")
    settings = {
        "corpus": str(folder / "corpus"), "output": "", "steps": 3, "shapes": [[32, 1.0]],
        "batch_tokens": 64, "learning_rate": 1e-3, "preset": "test", "precision": "fp32",
        "workers": 0, "log_every": 1, "checkpoint_every": 1,
    }  # fmt: skip
    text = "\n".join(f"{name} = {json.dumps(value)}" for name, value in settings.items())
    (folder / "stage1.toml").write_text(text, encoding="utf-8")


def run_words(words: list[str], target: Path, inputs: Path) -> int:
    if words[0] == "save":
        save(load(inputs / "model"), target, tokenizer=None)
        return 0
    if words[0] == "cache":
        shutil.copytree(inputs / "original", target.parent / "original", dirs_exist_ok=True)
        for path in (target.parent / "original").rglob("*"):
            os.utime(path, (1, 1))
        converted(target.parent / "original", lambda: contextlib.nullcontext(lambda _a, _b: None))
        return 0
    sys.argv = ["plug", *words]
    return plug.cli.main()


@dataclass
class Ran:
    status: int  # 137 where it was killed
    errors: str
    trace: str = ""


class Bench:
    """Runs commands in forked children, which need not import torch again."""

    def __init__(self, folder: Path) -> None:
        self.inputs, self.trace = folder / "inputs", folder / "trace"
        self.inputs.mkdir()

    def start(self, command: Command, target: Path, *options: str) -> tuple[int, int, Path]:
        """A child that waits for a byte; its id, where to write the byte, and its output."""
        fill = {"inputs": str(self.inputs), "target": str(target)}
        words = [word.format(**fill) for word in command.words] + list(options)
        number, log = tempfile.mkstemp(dir=self.inputs.parent)
        ready, go = os.pipe()
        child = os.fork()
        if child:
            os.close(ready)
            os.close(number)
            return child, go, Path(log)
        os.close(go)
        os.dup2(number, 1)
        os.dup2(number, 2)
        streams = (io.TextIOWrapper(os.fdopen(n, "wb", 0), write_through=True) for n in (1, 2))
        sys.stdout, sys.stderr = streams
        os.read(ready, 1)
        try:
            status = run_words(words, target, self.inputs)
        except BaseException:
            import traceback

            traceback.print_exc()
            status = 99
        sys.stdout.flush()
        os._exit(status)

    def finish(self, child: int, log: Path) -> Ran:
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        errors = log.read_text(errors="replace")
        log.unlink()
        return Ran(137 if status == -9 else status, errors)

    def run(
        self, command: Command, target: Path, *options: str, inject: str = "", traced: bool = False
    ) -> Ran:
        child, go, log = self.start(command, target, *options)
        tracer = None
        if inject or traced:
            arguments = [
                "strace",
                "-f",
                "-y",
                "-s",
                "0",
                "-o",
                str(self.trace),
                "-e",
                f"trace={','.join(CALLS)}",
            ]
            arguments += ["-e", f"inject={inject}"] if inject else []
            tracer = subprocess.Popen(
                [*arguments, "-p", str(child)], stderr=subprocess.PIPE, text=True
            )
            assert tracer.stderr is not None
            assert "attached" in tracer.stderr.readline()
        os.write(go, b"x")
        os.close(go)
        ran = self.finish(child, log)
        if tracer is not None:
            tracer.communicate()
            ran.trace = self.trace.read_text(errors="replace")
        return ran


def events(trace: str, folder: Path) -> list[tuple[str, int]]:
    """The calls on files of ``folder``: the name, and which of that name it was in the process."""
    main = trace.split(maxsplit=1)[0]
    counts: dict[str, int] = {}
    found = []
    for line in trace.splitlines():
        match = re.match(rf"{main}\s+(\w+)\((.*)", line)
        if match is None or match[1] not in CALLS:
            continue
        name = match[1]
        counts[name] = counts.get(name, 0) + 1
        touches = str(folder) in match[2]
        if touches and (name != "openat" or "O_CREAT" in match[2] or "O_WRONLY" in match[2]):
            found.append((name, counts[name]))
    return found


def _parent(path: str) -> str:
    return path.rpartition("/")[0]


def unsynced(trace: str, folder: Path) -> list[str]:
    """What was renamed to its last name before it was synced.

    A file is dirty once it is opened to be written, a directory once a name in it has changed.
    """
    dirty: set[str] = set()
    faults = []
    for line in trace.splitlines():
        if str(folder) not in line or " = -1 " in line:
            continue
        call = re.search(r"(\w+)\((.*)", line)
        if call is None:
            continue
        name, rest = call[1], call[2]
        paths = [p for p in re.findall(r'[<"]([^<>"]+)[>"]', rest) if p.startswith(str(folder))]
        if not paths:
            continue
        if name == "openat" and ("O_CREAT" in rest or "O_WRONLY" in rest or "O_RDWR" in rest):
            dirty.add(paths[0])
            if "O_CREAT" in rest:
                dirty.add(_parent(paths[0]))
        elif name in ("write", "pwrite64", "ftruncate", "fallocate"):
            dirty.add(paths[0])
        elif name == "mkdir":
            dirty |= {paths[0], _parent(paths[0])}
        elif name in ("fsync", "unlink", "rmdir"):
            dirty.discard(paths[0])
        elif name == "rename" and len(paths) == 2:
            old, new = paths
            left = {p for p in dirty if p == old or p.startswith(f"{old}/")}
            hidden = re.compile(r"/\.[^/]*(lock|old-\w+|partial-\w+)$")
            left = {p for p in left if not p.endswith(".lock")}
            if not hidden.search(new):
                faults += sorted(left)
            dirty -= {p for p in dirty if p == old or p.startswith(f"{old}/")}
            dirty.add(_parent(new))
    return faults


def same(first: object, second: object) -> bool:
    if isinstance(first, dict) and isinstance(second, dict):
        return first.keys() == second.keys() and all(same(first[k], second[k]) for k in first)
    if isinstance(first, tuple) and isinstance(second, tuple):
        return all(map(same, first, second))
    if isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor):
        return torch.equal(first, second)
    return first == second


def is_whole(command: Command, target: Path, expected: object) -> bool:
    try:
        return same(command.check(target), expected)
    except Exception:
        return False


def again(bench: Bench, command: Command, target: Path, expected: object) -> str:
    """Run the same command once more; what is wrong then, or nothing."""
    if not command.resumes and is_whole(command, target, expected) and command.name not in (
        "evaluate --report", "plug.save", "ModelScope's cache",
    ):  # fmt: skip
        return ""  # it had finished before it was stopped, and says that the output is there
    options = ["--resume"] if command.resumes and is_used(target) else []
    ran = bench.run(command, target, *options)
    finished = "已有一次完成的训练" in ran.errors
    if ran.status != 0 and not finished:
        return f"again: {ran.status} {ran.errors.strip()[-300:]}"
    if not is_whole(command, target, expected):
        return "not whole"
    left = [p.name for p in target.parent.iterdir() if re.search(r"\.(partial|old)-\w+$", p.name)]
    return f"left over: {left}" if left else ""


def try_kills(
    bench: Bench, command: Command, folder: Path, most: int
) -> tuple[str, list[str], list[str]]:
    target = folder / "first" / command.target
    target.parent.mkdir(parents=True)
    ran = bench.run(command, target, traced=True)
    assert ran.status == 0, ran.errors
    expected = command.check(target)
    points = events(ran.trace, target.parent)
    order = unsynced(ran.trace, target.parent)
    total = len(points)
    step = max(1, total / most) if most else 1
    points = [points[int(i * step)] for i in range(int(len(points) / step))]
    faults = []
    for number, (call, when) in enumerate(points):
        target = folder / str(number) / command.target
        target.parent.mkdir()
        ran = bench.run(command, target, inject=f"{call}:signal=KILL:when={when}")
        if "Traceback" in ran.errors:
            faults.append(f"{call} {when}: {ran.errors[-300:]}")
        elif problem := again(bench, command, target, expected):
            faults.append(f"{call} {when}: {problem}")
        shutil.rmtree(target.parent)
    return f"{len(points)} of {total}", faults, order


@contextlib.contextmanager
def small_disk(folder: Path, kilobytes: int) -> Iterator[None]:
    folder.mkdir()
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", folder], check=True
    )
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", folder], check=True)
        folder.rmdir()


def try_full_disks(bench: Bench, command: Command, folder: Path) -> tuple[int, list[str]]:
    """Disks of a tenth, two tenths, … of what the command needs."""
    reference = folder / "reference" / command.target
    reference.parent.mkdir(parents=True)
    bench.run(command, reference)
    expected = command.check(reference)
    needed = sum(p.stat().st_size // 1024 + 4 for p in reference.parent.rglob("*") if p.is_file())
    tried, faults = 0, []
    for tenths in range(1, 10):
        disk = folder / "disk"
        with small_disk(disk, max(8, needed * tenths // 10)):
            target = disk / command.target
            ran = bench.run(command, target)
            if ran.status == 0:
                continue
            tried += 1
            lines = [line for line in ran.errors.splitlines() if line.startswith("错误：")]
            if command.words[0] not in ("save", "cache") and (
                "Traceback" in ran.errors or len(lines) != 1 or ran.status != 1
            ):
                faults.append(f"{tenths}0%: {ran.status} {ran.errors.strip()[-300:]}")
            subprocess.run(["mount", "-o", "remount,size=1g", disk], check=True)
            if problem := again(bench, command, target, expected):
                faults.append(f"{tenths}0%: {problem}")
    return tried, faults


def try_two(bench: Bench, command: Command, folder: Path, rounds: int) -> tuple[int, list[str]]:
    reference = folder / "reference" / command.target
    reference.parent.mkdir(parents=True)
    bench.run(command, reference)
    expected, faults = command.check(reference), []
    for number in range(rounds):
        target = folder / f"two-{number}" / command.target
        target.parent.mkdir()
        children = [bench.start(command, target) for _ in range(2)]
        for _, go, _ in children:
            os.write(go, b"x")
            os.close(go)
        ran = [bench.finish(child, log) for child, _, log in children]
        succeeded = [one.status for one in ran].count(0)
        # The second waits for the cache, and uses what is there. A save that begins when the other
        # has ended replaces it, as it should.
        wanted = {"cache": (2,), "save": (1, 2)}.get(command.words[0], (1,))
        traced = any("Traceback" in one.errors and "BusyError" not in one.errors for one in ran)
        if succeeded not in wanted or traced:
            faults.append(" | ".join(f"{one.status} {one.errors[-200:]}" for one in ran))
        elif not is_whole(command, target, expected):
            faults.append("not whole")
        shutil.rmtree(target.parent)
    return rounds, faults


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--most", type=int, default=0, help="kill points a command; 0: all")
    parser.add_argument("--only", default="", help="commands whose name contains this")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    began, all_faults = time.perf_counter(), 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        bench = Bench(folder)
        make_inputs(bench.inputs)
        for command in COMMANDS[1], COMMANDS[7]:  # what later commands read
            ran = bench.run(command, bench.inputs / command.target)
            assert ran.status == 0, ran.errors
        headings = ("command", "kills", "faults", "unsynced renames", "full disks", "faults")
        print(f"| {' | '.join(headings)} | two at once | faults |")
        print("|---|---|---|---|---|---|---|---|")
        for command in COMMANDS:
            if arguments.only not in command.name:
                continue
            (folder / "work").mkdir()
            points, faults, order = try_kills(bench, command, folder / "work", arguments.most)
            shutil.rmtree(folder / "work")
            disks, disk_faults = try_full_disks(bench, command, folder / "work")
            shutil.rmtree(folder / "work")
            pairs, pair_faults = try_two(bench, command, folder / "work", 3)
            shutil.rmtree(folder / "work")
            print(
                f"| `{command.name}` | {points} | {len(faults)} | {len(order)} | {disks} |"
                f" {len(disk_faults)} | {pairs} | {len(pair_faults)} |",
                flush=True,
            )
            for fault in (*faults, *order, *disk_faults, *pair_faults):
                print(f"    {fault}", file=sys.stderr, flush=True)
            all_faults += len(faults) + len(order) + len(disk_faults) + len(pair_faults)
    print(f"{time.perf_counter() - began:.0f} s, {all_faults} faults", file=sys.stderr)
    return 1 if all_faults else 0


if __name__ == "__main__":
    sys.exit(main())

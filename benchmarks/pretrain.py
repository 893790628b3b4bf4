"""Pre-training: the small model by an earlier build and this one in turn; two cards; wide layers.

    git worktree add build/before 2753ff1
    python benchmarks/pretrain.py --before build/before --out benchmarks/results/pretrain.json

Each run is the command of a user (`plug pretrain stage1|stage2`), with its data loading, on the
same made-up corpus: both builds read the same batches. Rates leave out the first steps, which
compile. `--wide` adds what `pretrain_wide.py` measures of the 27B's layers on two cards. Prints one
JSON line, last. `--tiny` shows on a CPU that it works.

Both builds see the same batches and start from the same weights, and dropout is 0 in both. Still
their losses differ: they round bf16 in other places, and where losses fall fast a difference grows.
`--exact` says how much of it is that: it runs both builds in float32 too, on smaller batches. There
they must agree (`builds_apart`), and in bf16 each is as far from float32 as rounding takes it.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from launching import call, launched, run_part, torchrun
from machine import processor

from plug.pretraining.tokens import DomainCounts, write_json
from plug.tokenization import PlugTokenizer

HERE = Path(__file__).resolve().parent.parent
LOSSES = ("lm", "mlm", "word", "sentence")
WIDE_LIMIT = 400.0  # seconds
WARM = 0.3  # share of the steps that the rates leave out
TINY = [
    *("preset=test", "batch_tokens=2048", "micro_batch_tokens=1024", "compile=false"),
    *("workers=0", "precision=fp32", "learning_rate=1e-2"),
]
EXACT_TOKENS = 32768  # of a batch with `--exact`: float32 takes more memory, and longer
TINY_SHAPES = {1: "shapes=[[32,0.5],[64,0.5]]", 2: "shapes=[[16,24,0.5],[16,48,0.5]]"}


def write_corpus(directory: Path, documents: int, length: int, seed: int = 0) -> None:
    """Write ids in the format of `plug pretrain data`: chains in which each id has 32 successors.

    So there is something to learn, and builds that compute something else have other losses.
    """
    tokenizer = PlugTokenizer.load("plug-mini-zh")
    rng = np.random.default_rng(seed)
    first, size = max(tokenizer.special_ids) + 1, tokenizer.vocab_size
    # Successors are drawn by Zipf's law, so that some ids are frequent, as words are.
    shares = 1.0 / np.arange(1, size - first + 1)
    successors = rng.choice(
        np.arange(first, size, dtype=np.uint16), (size, 32), p=shares / shares.sum()
    )
    ids = np.empty((length, documents), dtype=np.uint16)
    ids[0] = rng.integers(first, size, documents)
    for position in range(1, length):
        ids[position] = successors[ids[position - 1], rng.integers(0, 32, documents)]
    directory.mkdir(parents=True)
    tokenizer.save(directory)
    total = documents * length
    np.save(directory / "chains.tokens.npy", np.ascontiguousarray(ids.T).ravel())
    np.save(directory / "chains.documents.npy", np.arange(0, total + 1, length))
    np.save(directory / "chains.sentences.npy", np.arange(0, total, length // 16))
    counts = DomainCounts("chains", documents, 0, total, total, 0)
    write_json(
        directory / "corpus.json",
        [{name: getattr(counts, name) for name in DomainCounts.__slots__}],
    )


def train(
    source: Path,
    stage: int,
    settings: Sequence[str],
    output: Path,
    cards: int = 1,
    limit: float | None = None,
) -> list[dict[str, float]]:
    """Run a stage with the code of ``source``, for so many seconds at most; the rows of its log."""
    launcher = torchrun(cards) if cards > 1 else [sys.executable]
    command = [*launcher, "-m", "plug", "pretrain", f"stage{stage}"]
    command += ["--config", str(source / "configs" / f"mini-stage{stage}.toml")]
    for setting in [*settings, f'output="{output}"']:
        command += ["--set", setting]
    environment = os.environ | {"PYTHONPATH": str(source / "src")}
    environment.pop("OMP_NUM_THREADS", None)
    call(command, limit, environment)
    with (output / "log.csv").open(encoding="utf-8") as file:
        rows = [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]
    shutil.rmtree(output)
    return rows


def rate(rows: list[dict[str, float]]) -> float:
    """Tokens a second from the first steps' end to the last step."""
    start = rows[int(WARM * len(rows))]
    if start is rows[-1]:
        raise SystemExit(f"{len(rows)} rows in the log are too few to time. Give more --steps.")
    return (rows[-1]["tokens"] - start["tokens"]) / (rows[-1]["seconds"] - start["seconds"])


def difference(ours: list[dict[str, float]], theirs: list[dict[str, float]]) -> dict[str, float]:
    """How far the losses of two runs are apart: at most, and at the end on average."""
    apart = [
        {name: one[name] - other[name] for name in LOSSES if name in one}
        for one, other in zip(ours, theirs, strict=True)
    ]
    last = apart[-len(apart) // 5 :]
    means = [statistics.mean(row[name] for row in last if name in row) for name in last[-1]]
    return {
        "most": max(abs(value) for row in apart for value in row.values()),
        "mean_of_last_fifth": max(abs(mean) for mean in means),
    }


def wide(folder: Path, *, tiny: bool) -> dict[str, Any]:
    """What `pretrain_wide.py` finds on two cards: `wide` and `checkpoint`."""
    options = ["--checkpoint", "--folder", str(folder)] + (["--tiny", "--steps=2"] if tiny else [])
    found = run_part("wide", launched(2, "pretrain_wide.py", *options), WIDE_LIMIT)
    return {name: found[name] for name in ("wide", "checkpoint", "error") if name in found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--before", type=Path, help="a checkout of the earlier build")
    parser.add_argument("--steps", type=int, nargs=2, default=[200, 200], help="of each stage")
    parser.add_argument("--stages", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--two-cards", action="store_true", help="also stage 2 on two cards")
    parser.add_argument("--wide", action="store_true", help="also the 27B's widths on two cards")
    parser.add_argument("--exact", action="store_true", help="also both builds in float32")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, on the CPU")
    parser.add_argument("--set", nargs="*", default=[], help="more settings of this build")
    parser.add_argument("--logs", type=Path, help="keep every run's log here")
    parser.add_argument("--out", type=Path, help="write the result here as well")
    arguments = parser.parse_args()
    result: dict[str, Any] = {
        "torch": torch.__version__,
        "machine": processor(),
        "steps": arguments.steps,
        "mini": {},
    }
    if torch.cuda.is_available() and not arguments.tiny:
        result["device"] = torch.cuda.get_device_name()
    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder) / "corpus"
        write_corpus(corpus, *((64, 256) if arguments.tiny else (16384, 2048)))
        settings = [f'corpus="{corpus}"', 'init_from=""']
        settings += ["checkpoint_every=1000000", "checkpoint_minutes=0.0"]
        settings += TINY if arguments.tiny else []

        def run(name: str, stage: int, source: Path, *more: str, cards: int = 1) -> Any:
            shapes = [TINY_SHAPES[stage]] if arguments.tiny else []
            given = [*settings, f"steps={arguments.steps[stage - 1]}", *shapes, *more]
            given += [] if source != HERE else arguments.set
            rows = train(source, stage, given, Path(folder) / name, cards)
            if arguments.logs:
                arguments.logs.mkdir(parents=True, exist_ok=True)
                (arguments.logs / f"{name}.json").write_text(json.dumps(rows))
            print(f"{name}: {rate(rows):,.0f} tokens/s", flush=True)
            return rows

        for stage in arguments.stages:
            before = run(f"before-{stage}", stage, arguments.before) if arguments.before else []
            rows = run(f"now-{stage}", stage, HERE)
            found: dict[str, Any] = {"tokens_per_s": round(rate(rows))}
            if before:
                found["tokens_per_s_before"] = round(rate(before))
                found["ratio_to_before"] = round(rate(rows) / rate(before), 3)
                found["losses_apart"] = difference(rows, before)
            if before and arguments.exact:
                small = [] if arguments.tiny else [f"batch_tokens={EXACT_TOKENS}"]
                logs = {
                    (build, precision): run(
                        f"{build}-{stage}-{precision}", stage, source, *small,
                        f"precision={precision}",
                    )
                    for build, source in (("before", arguments.before), ("now", HERE))
                    for precision in ("fp32", "bf16")
                }  # fmt: skip
                exact = logs["before", "fp32"]
                found["from_float32"] = {
                    "builds_apart": difference(logs["now", "fp32"], exact),
                    "before_apart": difference(logs["before", "bf16"], exact),
                    "now_apart": difference(logs["now", "bf16"], exact),
                }
            result["mini"][f"stage{stage}"] = found
            print(json.dumps(result), flush=True)
        if arguments.two_cards:
            one = result["mini"]["stage2"]["tokens_per_s"]
            batch = 2048 if arguments.tiny else 262144
            result["two_cards"] = {
                name: round(
                    rate(run(name, 2, HERE, f"batch_tokens={batch * times}", cards=2)) / one, 3
                )
                for name, times in (("same_batch", 1), ("double_batch", 2))
            }
        if arguments.wide:
            result |= wide(Path(folder), tiny=arguments.tiny)
    line = json.dumps(result)
    if arguments.out:
        arguments.out.write_text(line + "\n", encoding="utf-8")
    print(line)


if __name__ == "__main__":
    main()

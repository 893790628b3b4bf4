"""StructBERT's claim: stage 1 with and without the word and sentence objectives, equal compute.

    python experiments/ablation.py --corpus build/corpus --data tasks --folder build/ablation \
        --tasks afqmc ocnli cluener2020 --seeds 1 2 3 --jobs 8 --minutes 20

Encoders are pre-trained one after another from the same seed on batches of the same size: `full` as
--config says; `plain` with the masked-LM loss alone, for as many steps; `plain-longer` likewise,
for the steps that fit into the time of `full` at the rates measured. Then `finetune_all.py`
fine-tunes them; options that are not named here go to it. FOLDER holds pretraining.jsonl (a line an
encoder) and results.jsonl. The same command goes on after a stop: an encoder from its last
checkpoint, the fine-tuning with the runs that are missing. --minutes is for all of it; an encoder
that would not be finished is not waited for. --encoders-only leaves the fine-tuning to a call of
`finetune_all.py` that does other runs, too.
"""

from __future__ import annotations

import argparse
import csv
import json
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

MASKED_ALONE = ["shuffle_rate=0.0", "sentence_objective=false"]
CHANGES = {"full": [], "plain": MASKED_ALONE, "plain-longer": MASKED_ALONE}
CHECKPOINT_EVERY = 200  # steps lost at most by a stop


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--corpus", type=Path, required=True, help="what plug pretrain data wrote")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--config", type=Path, default=Path("configs/mini-stage1.toml"))
    parser.add_argument("--set", dest="sets", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--minutes", type=float, default=600.0)
    parser.add_argument("--device")
    parser.add_argument("--encoders-only", action="store_true")
    arguments, options = parser.parse_known_args()
    deadline = time.monotonic() + 60 * arguments.minutes
    device = ["--device", arguments.device] if arguments.device else []

    arguments.folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for name in CHANGES:
        _pretrain(name, arguments, device, deadline)
        line = json.dumps(_told(name, arguments)) + "\n"
        print(line, end="", flush=True)
        lines.append(line)
    (arguments.folder / "pretraining.jsonl").write_text("".join(lines), encoding="utf-8")

    if arguments.encoders_only:
        return
    starts = [f"{name}={arguments.folder / name / 'model'}" for name in CHANGES]
    left = (deadline - time.monotonic()) / 60
    words = ["--folder", str(arguments.folder), "--starts", *starts, "--minutes", f"{left:.3f}"]
    script = Path(__file__).with_name("finetune_all.py")
    subprocess.run([sys.executable, str(script), *words, *device, *options], check=True)


def _command(name: str, arguments: argparse.Namespace) -> list[str]:
    """`plug`'s words for one encoder."""
    output = arguments.folder / name
    sets = [f"corpus={arguments.corpus}", f"output={output}", *CHANGES[name], *arguments.sets]
    sets.append(f"checkpoint_every={CHECKPOINT_EVERY}")
    if name == "plain-longer":
        full, plain = (_log(each, arguments) for each in ("full", "plain"))
        steps = float(full[-1]["step"]) * _rate(plain) / _rate(full)
        sets = [each for each in sets if not each.startswith("steps=")]
        sets.append(f"steps={max(1, round(steps))}")
    return ["pretrain", "stage1", "--config", str(arguments.config),
            *(word for each in sets for word in ("--set", each))]  # fmt: skip


def _pretrain(name: str, arguments: argparse.Namespace, device: list[str], deadline: float) -> None:
    output = arguments.folder / name
    if (output / "model").is_dir():
        return
    resume = ["--resume"] if (output / "checkpoint").is_dir() else []
    if not resume:
        shutil.rmtree(output, ignore_errors=True)  # stopped before its first checkpoint
    words = [sys.executable, "-m", "plug", *_command(name, arguments), *device, *resume]
    try:
        subprocess.run(words, check=True, timeout=max(1.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        raise SystemExit(f"{name}: out of time. The same command goes on.") from None
    except KeyboardInterrupt:
        raise SystemExit(f"{name}: interrupted. The same command goes on.") from None
    except subprocess.CalledProcessError as error:
        raise SystemExit(f"{name}: plug pretrain ended with {error.returncode}.") from None


def _log(name: str, arguments: argparse.Namespace) -> list[dict[str, str]]:
    with (arguments.folder / name / "log.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _rate(log: list[dict[str, str]]) -> float:
    """Tokens a second; the median leaves out compilation and what else stopped it for a while."""
    return median(float(row["tokens_per_second"]) for row in log)


def _told(name: str, arguments: argparse.Namespace) -> dict[str, object]:
    """What an encoder cost and the losses it ended with."""
    log = _log(name, arguments)
    last = log[-1]
    return {
        "name": name,
        **{key: float(last[key]) for key in ("step", "tokens", "seconds")},
        "tokens_per_second": _rate(log),
        "losses": {key: float(last[key]) for key in ("mlm", "word", "sentence") if last.get(key)},
        "command": shlex.join(["plug", *_command(name, arguments)]),
    }


if __name__ == "__main__":
    main()

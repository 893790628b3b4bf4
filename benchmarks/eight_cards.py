"""The original's own setting, and all that fewer cards allow: writing, fine-tuning, pre-training.

    python benchmarks/eight_cards.py --cards 1 2 4 8 --output benchmarks/results/eight_cards.json
    python benchmarks/eight_cards.py --cards 1 2 --parts write finetune:lora ends
    python benchmarks/eight_cards.py --tiny --cards 1 2      # processes on a CPU, a tiny model

For each number of cards, each part in processes of its own with a time limit:

- `write`: `decode_27b.py` in bf16 and 8 bits at batch 1, 32 and 128; the likeliest ids of a few
  texts are compared with one card's, and where a text parts, the file has one card's lead there;
- `ends`: `torchrun -m plug generate` with the shipped model, from start to exit;
- `finetune:MODE`: a mode of `finetune_27b_cards.py`;
- `pretrain`: `plug pretrain stage2` on the 27B's shape, sharded, with a checkpoint on the way;
- `resume`: `plug finetune` killed by `kill -9`, resumed on half the cards, beside an unbroken run.

The file has a key for each number of cards and is written after each part. Prints it last.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from itertools import pairwise
from pathlib import Path

import pretrain
import torch
from launching import Found, call, end, launched, run_part, torchrun, write

from plug import __version__
from plug.checkpoints.directory import find_model_directory
from plug.model.accounting import training_flops
from plug.model.configuration import PRESETS

TEXTS = 4  # whose ids are compared
PARTS = ("write", "ends", "finetune:lora", "resume", "pretrain")
# Every parameter of the 27B, and the fewest cards of 80 GB that it goes on: 65 GB each on 2, 23 GB
# each on 8 at batch 32 (`plug info --memory finetune --cards 8`).
WHOLE = {"finetune:whole_bf16_batch32": 2, "finetune:whole_bf16_batch256": 8}
LIMITS = {"write": 240, "ends": 60, "resume": 200, "pretrain": 240}
TARGETS = {"lora": 120, "whole_bf16_batch32": 240, "whole_bf16_batch256": 300}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cards", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--parts", nargs="+", help=f"{', '.join((*PARTS, *WHOLE))}")
    parser.add_argument("--bits", type=int, nargs="+", default=[16, 8])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32, 128])
    parser.add_argument("--steps", type=int, default=5, help="of fine-tuning that are timed")
    parser.add_argument("--limit", type=float, help="seconds of a part, in place of its own")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    on_gpu = torch.cuda.is_available() and not arguments.tiny
    line: Found = {
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "preset": "tiny" if arguments.tiny else "27b",
        "date": date.today().isoformat(),
        "plug": __version__,
        "torch": torch.__version__,
        "cards": {},
    }
    alone: Found = {}  # ids of the smallest number of cards, by precision
    for count in arguments.cards:
        whole = [part for part, cards in WHOLE.items() if count >= cards]
        parts = arguments.parts or [*PARTS, *whole]
        line["cards"][str(count)] = {}
        for part in parts:
            line["cards"][str(count)][part] = measure(part, count, arguments, alone)
            write(arguments.output, line)
    print(json.dumps(line, ensure_ascii=False))


def measure(part: str, count: int, arguments: argparse.Namespace, alone: Found) -> Found:
    """Run a part on so many cards; ``alone`` has the ids to compare with, or gets them."""
    name = f"{part} on {count}"
    kind, _, mode = part.partition(":")
    limit = arguments.limit or (TARGETS.get(mode, 180) if mode else LIMITS[kind])
    tiny = ["--tiny"] if arguments.tiny else []
    if kind == "write":
        options = [*tiny, "--no-peer", "--rounds", "2", "--ids", str(TEXTS)]
        options += ["--bits", *map(str, arguments.bits)]
        options += ["--batches", *map(str, arguments.batches)]
        found = run_part(name, launched(count, "decode_27b.py", *options), limit)
        return found | {"ids": compare(found.get("results", {}), alone)}
    if kind == "finetune":
        options = [*tiny, "--modes", mode, "--steps", str(arguments.steps)]
        return run_part(name, launched(count, "finetune_27b_cards.py", *options), limit)
    run: Callable[[int, bool, float, Path], Found] = {
        "ends": write_and_end, "resume": kill_and_resume, "pretrain": pretrain_whole
    }[kind]  # fmt: skip
    print(f"== {name} (limit {limit:.0f} s)", flush=True)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        try:
            found = run(count, arguments.tiny, began + limit, Path(folder))
        except Exception as error:  # the other parts are measured all the same
            found = {"error": f"{type(error).__name__}: {error}"[:2000]}
    took = round(time.perf_counter() - began, 1)
    print(f"== {name}: {json.dumps(found)} after {took} s", flush=True)
    return found | {"wall_s": took}


def compare(results: Found, alone: Found) -> Found:
    """How many texts have the ids of the first run, and by how little those led that parted.

    Takes the ids out of ``results``.
    """
    found: Found = {}
    for name, result in results.items():
        texts = result.pop("ids", None)
        if texts is None:
            continue
        expected = alone.setdefault(name, texts)
        leads = []
        for ours, theirs in zip(texts, expected, strict=True):
            pairs = zip(ours["ids"], theirs["ids"], theirs["leads"], strict=True)
            leads += [lead for mine, other, lead in pairs if mine != other][:1]
        found[name] = {
            "texts": len(texts),
            "equal": len(texts) - len(leads),
            "leads_where_they_part": leads,
        }
    return found


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"}


def plug(count: int, *options: str) -> list[str]:
    """Return the command that runs `plug` in so many processes."""
    return [*torchrun(count), "-m", "plug", *options]


def left(until: float) -> float:
    """Return the seconds until then."""
    return max(1.0, until - time.perf_counter())


def write_and_end(count: int, tiny: bool, until: float, _folder: Path) -> Found:
    """The shipped model writes, and the command ends."""
    options = ["generate", "春天来了，", "--no-do-sample", "--out-length", "32"]
    began = time.perf_counter()
    options += ["--device", "cpu"] if tiny else []
    text = call(plug(count, *options), left(until), environment())
    return {"text": text.strip(), "seconds": round(time.perf_counter() - began, 1)}


def kill_and_resume(count: int, tiny: bool, until: float, folder: Path) -> Found:
    """An unbroken run, and one killed at a checkpoint and resumed on half the cards."""
    data = folder / "data.jsonl"
    number = 8 if tiny else 32
    rows = [
        {"src_txt": f"第{n}号[SEP]山上有{n}座庙。", "tgt_txt": f"{n}座？"} for n in range(number)
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    model = folder / "model"  # without dropout: two processes would draw other masks than one
    shutil.copytree(find_model_directory("plug-mini-zh"), model)
    config = json.loads((model / "config.json").read_text())
    config |= dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), 0.0)
    (model / "config.json").write_text(json.dumps(config))

    def command(processes: int, name: str, *more: str) -> list[str]:
        options = ["finetune", "generation", "--train", str(data), "--eval", str(data)]
        options += ["--model", str(model)]
        options += ["--output", str(folder / name), "--memory", "full"]
        options += ["--batch-size", str(8 // processes), "--set", "epochs=3"]
        options += ["--set", "parallel.sharding=fsdp", "--set", "target_length=8"]
        options += ["--device", "cpu"] if tiny else ["--set", "precision=fp32"]
        return plug(processes, *options, *more)

    call(command(count, "whole"), left(until), environment())
    killed = subprocess.Popen(command(count, "killed"), env=environment())
    try:
        while not list((folder / "killed").glob("checkpoints/checkpoint-*/synced")):
            if killed.poll() is not None or time.perf_counter() > until:
                raise RuntimeError("it ended, or time did, before there was a checkpoint")
            time.sleep(0.02)
    finally:
        end(killed, asks_for_stacks=False)
    half = max(1, count // 2)
    call(command(half, "killed", "--resume"), left(until), environment())
    losses = [
        [entry["loss"] for entry in map(json.loads, lines) if "loss" in entry]
        for name in ("whole", "killed")
        for lines in [(folder / name / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    ]
    apart = max(abs(a - b) for a, b in zip(*losses, strict=True))
    return {"resumed_on": half, "steps": len(losses[0]), "losses_apart": apart}


def pretrain_whole(count: int, tiny: bool, until: float, folder: Path) -> Found:
    """Stage 2 on the 27B's shape, or as many of its layers as go on fewer than 8 cards."""
    corpus = folder / "corpus"
    pretrain.write_corpus(corpus, *((64, 256) if tiny else (512, 2048)))
    shape = PRESETS["test" if tiny else "27b"]
    if not tiny:
        share = min(1.0, count / 8)
        layers = [max(1, round(each * share)) for each in (24, 6)]
        shape = replace(shape, num_hidden_layers=layers[0], num_decoder_layers=layers[1])
    source, target = (16, 24) if tiny else (384, 128)
    rows = 2 if tiny else 16  # a card
    settings = [f'corpus="{corpus}"', 'init_from=""', "steps=8", "checkpoint_every=6"]
    settings += [f"batch_tokens={rows * count * (source + target)}", "checkpoint_minutes=0.0"]
    settings += [f"micro_batch_tokens={rows * (source + target)}", "log_every=1"]
    settings += [f"shapes=[[{source},{target},1.0]]", "workers=1"]
    settings += [f'optimizer="{"adamw" if tiny else "adamw8bit"}"']
    settings += ["compile=false", "learning_rate=1e-5"]
    settings += [f'preset="{"test" if tiny else "27b"}"']
    settings += [
        f"model={{num_hidden_layers={shape.num_hidden_layers}, "
        f"num_decoder_layers={shape.num_decoder_layers}}}"
    ]
    settings += ['precision="fp32"'] if tiny else []
    settings += ['parallel.sharding="fsdp"'] if count > 1 else []
    log = pretrain.train(pretrain.HERE, 2, settings, folder / "run", count, left(until))
    seconds = [after["seconds"] - before["seconds"] for before, after in pairwise(log)]
    tokens, usual = rows * count * (source + target), statistics.median(seconds[1:])
    flops = training_flops(shape, source, target, every_parameter=True) / (source + target)
    return {
        "layers": [shape.num_hidden_layers, shape.num_decoder_layers],
        "tokens_per_s": round(tokens / usual, 1),
        "model_tflops_a_card": round(tokens / usual * flops / count / 1e12, 3),
        "peak_gb": max(row.get("memory_gb", 0.0) for row in log),
        "stall_s": round(max(seconds[1:]) - usual, 3),  # of the step with the checkpoint
        "seconds": [round(each, 3) for each in seconds],
    }


if __name__ == "__main__":
    main()

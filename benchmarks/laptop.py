"""What runs on a CPU without a GPU, beside its peers: the line of `benchmarks/results/laptop.json`.

    pip install ".[benchmark]" llama-cpp-python gguf
    python benchmarks/laptop.py mini --output benchmarks/results/laptop.json
    python benchmarks/laptop.py 27b --folder /tmp/laptop --output benchmarks/results/laptop.json
    python benchmarks/laptop.py llama --folder /tmp/laptop --output benchmarks/results/laptop.json

`mini`: plug-mini-zh, 64 source tokens in, 128 out, greedily. A pair is one run of ours and one of
the peer's, A B A B; a ratio is the median over the pairs, in seconds and in the seconds that the
process had the processor, with the least and the most. `first_character_s`: from the call of a
loaded `Generator` to the first character, after a source of 510 tokens. `27b`, `llama`: see
laptop_27b.py and laptop_llama.py. Each part replaces its own keys of the line.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from machine import processor

import plug
from plug.checkpoints.directory import find_model_directory
from plug.generation.async_engine import AsyncEngine
from plug.generation.generator import Generator
from plug.jsonfiles import read_json
from plug.kernels.cpu.build import instructions

PARTS = ("mini", "27b", "llama")
SOURCE, TARGET, BATCH, LONG_SOURCE = 64, 128, 32, 510
Run = Callable[[], object]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("parts", nargs="+", choices=PARTS)
    parser.add_argument("--folder", type=Path, help="of the large models, written once")
    parser.add_argument("--preset", default="27b", help="of the large models")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    line: dict[str, Any] = {}
    if arguments.output and arguments.output.exists():
        line = read_json(arguments.output)
    for part in arguments.parts:
        line |= {"mini": mini, "27b": large, "llama": llama}[part](arguments)
        line |= {
            "processor": processor(),
            "instructions": instructions(),
            "threads": arguments.threads,
            "date": time.strftime("%Y-%m-%d"),
            "torch": torch.__version__,
        }
        text = json.dumps(line, ensure_ascii=False)
        if arguments.output:
            arguments.output.write_text(text + "\n", encoding="utf-8")
        print(text, flush=True)


def large(arguments: argparse.Namespace) -> dict[str, Any]:
    """The 27B's shape in 4 bits; see laptop_27b.py."""
    import laptop_27b

    folder = arguments.folder / f"{arguments.preset}-int4"
    if not folder.exists():
        laptop_27b.write_random(folder, laptop_27b.PRESETS[arguments.preset])
    return {"laptop_27b": laptop_27b.measure_directory(folder)}


def llama(arguments: argparse.Namespace) -> dict[str, Any]:
    """Beside llama.cpp; see laptop_llama.py."""
    import laptop_llama

    return {"llama_cpp": laptop_llama.measure(arguments)}


def mini(arguments: argparse.Namespace) -> dict[str, Any]:
    """Ours against the peers, pair by pair."""
    import decode_cpu

    def pairs(ours: Run, theirs: Run) -> dict[str, Any]:
        return in_turn(ours, theirs, arguments.pairs)

    generator = torch.Generator().manual_seed(0)
    model = plug.load()
    prompts = torch.randint(300, model.config.vocab_size, (BATCH, SOURCE - 2), generator=generator)
    sources = [[model.config.decoder_start_token_id, *ids, model.config.eos_token_id]
               for ids in prompts.tolist()]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        runs = decode_cpu._runs(Path(folder), sources[0], arguments.threads)
        shipped = pairs(runs["plug_fp32"], runs["transformers_fp32"])
        eight = pairs(runs["plug_int8"], runs["ctranslate2_int8"])
        four = pairs(runs["plug_int4"], runs["ctranslate2_int8"])
        four_to_eight = pairs(runs["plug_int4"], runs["plug_int8"])
    ours, theirs = Generator(reuse_bytes=0), _transformers(sources)
    length = {"out_length": TARGET, "min_length": TARGET, "do_sample": False}
    batch = pairs(lambda: ours(prompts.tolist(), batch_size=BATCH, **length), theirs)
    with AsyncEngine(ours, rows=BATCH, capacity=TARGET) as engine:

        def in_flight() -> None:
            requests = [engine.submit(ids, **length) for ids in prompts.tolist()]
            assert all(len(request.result().token_ids) == TARGET for request in requests)

        flight = pairs(in_flight, theirs)
    long = torch.randint(300, model.config.vocab_size, (LONG_SOURCE - 2,), generator=generator)
    first = [_first_character(ours, long.tolist()) for _ in range(2 * arguments.pairs)]
    return {
        "mini": {
            "shipped_ratio_to_transformers": shipped["ratio"],
            "int8_ratio_to_ctranslate2": eight["ratio"],
            "int4_ratio_to_ctranslate2": four["ratio"],
            "int4_ratio_to_int8": four_to_eight["ratio"],
            "batch32_ratio_to_transformers": batch["ratio"],
            "in_flight32_ratio_to_transformers": flight["ratio"],
            "first_character_s": round(median(first), 3),
        },
        "mini_pairs": {
            "shipped": shipped,
            "int8": eight,
            "int4": four,
            "int4_to_int8": four_to_eight,
            "batch32": batch,
            "in_flight32": flight,
            "first_character_s_least_and_most": [round(min(first), 3), round(max(first), 3)],
            "source_tokens": SOURCE,
            "tokens": TARGET,
            "pairs": arguments.pairs,
        },
    }


def in_turn(ours: Run, theirs: Run, pairs: int) -> dict[str, Any]:
    """Times of both, A B A B, and theirs over ours pair by pair."""
    times: dict[str, list[tuple[float, float]]] = {"plug": [], "peer": []}
    for number in range(pairs + 1):
        for name, run in (("plug", ours), ("peer", theirs)):
            began, cpu_began = time.perf_counter(), time.process_time()
            run()
            spent = time.perf_counter() - began, time.process_time() - cpu_began
            if number:  # the first pair warms up
                times[name].append(spent)
    ratios, cpu_ratios = (
        [b[kind] / a[kind] for a, b in zip(times["plug"], times["peer"], strict=True)]
        for kind in (0, 1)
    )
    return {
        "ratio": round(median(ratios), 2),
        "ratio_least_and_most": [round(min(ratios), 2), round(max(ratios), 2)],
        "ratio_of_cpu_seconds": round(median(cpu_ratios), 2),
        "seconds": {name: round(median(x[0] for x in each), 3) for name, each in times.items()},
    }


def _transformers(sources: list[list[int]]) -> Run:
    """`generate` over all sources at once."""
    model = plug.PlugForConditionalGeneration.from_pretrained(
        find_model_directory(), dtype=torch.float32
    ).eval()
    input_ids = torch.tensor(sources)
    options = {"do_sample": False, "repetition_penalty": 1.0}
    options |= {"max_new_tokens": TARGET, "min_new_tokens": TARGET}
    mask = torch.ones_like(input_ids)
    return lambda: model.generate(input_ids, attention_mask=mask, **options)


def _first_character(generator: Generator, ids: list[int]) -> float:
    began = time.perf_counter()
    for piece in generator.stream([ids], out_length=8, min_length=8, do_sample=False):
        if piece.text:
            return time.perf_counter() - began
    raise AssertionError("nothing was written")


if __name__ == "__main__":
    main()

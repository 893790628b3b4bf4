"""What keeping the encoder's work gains where a prompt is continued again (another seed).

    python benchmarks/reuse.py --threads 1

plug-mini-zh, a prompt of 510 and one of 64 tokens, 64 tokens written: seconds until the first
piece of text and for the whole, with and without. The runs take turns; medians. The last line is
JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import torch
from machine import processor

import plug
from plug.generation.settings import GenerationSettings

TOKENS = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    generators = {"without": plug.Generator(reuse_bytes=0), "with": plug.Generator()}
    results = {}
    for length in (64, 510):
        draws = torch.Generator().manual_seed(length)
        prompt = torch.randint(300, 12000, (length,), generator=draws).tolist()
        runs = {name: [_run(each, prompt, 0)] for name, each in generators.items()}
        for seed in range(1, arguments.rounds + 1):
            for name, generator in generators.items():
                runs[name].append(_run(generator, prompt, seed))
        kinds = ("first_text_s", "whole_s", "whole_cpu_s")
        medians = {
            name: {
                kind: round(statistics.median(times[kind] for times in found[1:]), 4)
                for kind in kinds
            }
            for name, found in runs.items()
        }
        ratios = {
            kind: round(medians["without"][kind] / medians["with"][kind], 2) for kind in kinds
        }
        results[str(length)] = {**medians, "ratio": ratios}
    print(
        json.dumps(
            {
                "prompt_tokens": results,
                "tokens": TOKENS,
                "threads": arguments.threads,
                "rounds": arguments.rounds,
                "processor": processor(),
                "date": time.strftime("%Y-%m-%d"),
                "plug": plug.__version__,
                "torch": torch.__version__,
            }
        )
    )


def _run(generator: plug.Generator, prompt: list[int], seed: int) -> dict[str, float]:
    settings = GenerationSettings(out_length=TOKENS, min_length=TOKENS)
    first: list[float] = []
    start, cpu_start = time.perf_counter(), time.process_time()
    generator(
        [prompt], settings, seed=seed, on_text=lambda *_: first.append(time.perf_counter() - start)
    )
    return {
        "first_text_s": first[0],
        "whole_s": time.perf_counter() - start,
        "whole_cpu_s": time.process_time() - cpu_start,
    }


if __name__ == "__main__":
    main()

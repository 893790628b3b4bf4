"""What prompt lookup gains: tokens a step, and tokens a second beside plain steps, in one run.

    python benchmarks/prompt_lookup.py --threads 1
    python benchmarks/prompt_lookup.py --threads 1 --questions DEV.jsonl --questions-model DIR

On a CPU, batch 1, encoder included unless said. Free text is the shipped model's continuation of
the prompts of `continuations.py`, greedy (where a small model repeats itself) and drawn by the
default settings (where it does not). Questions are greedy too: JSON lines with `src_txt`
(`answer[SEP]context`), and a model that `plug finetune generation` made. Plain and drafting runs
take turns; the texts must be the same. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from continuations import PROMPTS
from machine import processor

import plug
from plug.generation.model_runner import ModelRunner, PreparedModel
from plug.generation.scheduler import StepPlan

Case = tuple[plug.Generator, list[str], dict[str, Any]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, nargs="+", default=[4, 10])
    parser.add_argument("--questions", type=Path, action="append", default=[])
    parser.add_argument("--questions-model", default="plug-mini-zh")
    parser.add_argument("--number", type=int, default=32, help="questions of a file")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    shipped = plug.Generator(reuse_bytes=0)
    prompts = [prompt for kind in PROMPTS.values() for prompt in kind]
    cases: dict[str, Case] = {
        "free_greedy": (shipped, prompts, {"do_sample": False, "out_length": 128}),
        "free_sampled": (shipped, prompts, {"seed": 1, "out_length": 128}),
    }
    if arguments.questions:
        asking = plug.Generator(arguments.questions_model, reuse_bytes=0)
        for path in arguments.questions:
            lines = path.read_text(encoding="utf-8").splitlines()[: arguments.number]
            sources = [json.loads(line)["src_txt"] for line in lines]
            options = {"do_sample": False, "out_length": 64, "allow_special_tokens": True}
            cases[f"questions_{path.stem}"] = asking, sources, options
    print(
        json.dumps(
            {
                "results": {
                    name: _measure(*case, arguments.tokens) for name, case in cases.items()
                },
                "threads": arguments.threads,
                "processor": processor(),
                "date": time.strftime("%Y-%m-%d"),
                "plug": plug.__version__,
                "torch": torch.__version__,
            }
        )
    )


def _measure(
    generator: plug.Generator, texts: list[str], options: dict[str, Any], tokens: list[int]
) -> dict[str, Any]:
    """By the number of tokens of a draft at most, "0" without."""
    settings = [0, *tokens]
    count = _count_steps(generator.prepared)
    totals: dict[int, Counter[str]] = {each: Counter() for each in settings}
    written = 0
    for index, text in enumerate([texts[0], *texts]):
        found = []
        for each in settings:
            before = dict(count)
            start, cpu_start = time.perf_counter(), time.process_time()
            result = plug.generate(
                text, model=generator, prompt_lookup_num_tokens=each or None, **options
            )
            spent = {
                "cpu": time.process_time() - cpu_start,
                "wall": time.perf_counter() - start,
                **{name: count[name] - before[name] for name in count},
            }
            if index:  # the first warms up
                totals[each].update(spent)
            found.append(result)
        if len({result.token_ids for result in found}) > 1:
            raise SystemExit(f"not the same text with and without drafts after {text}")
        if index:
            written += len(result.token_ids) + (result.finish_reason == "stop")
    plain = totals[0]
    return {
        str(most): {
            "tokens_per_step": round(written / spent["steps"], 2),
            "share_of_steps_with_draft": round(spent["with_draft"] / spent["steps"], 2),
            "accepted_per_draft": round(
                (written - spent["steps"]) / max(1, spent["with_draft"]), 2
            ),
            "tokens_per_s": round(written / spent["wall"], 1),
            "ratio_of_tokens_per_s": round(plain["wall"] / spent["wall"], 2),
            "ratio_of_tokens_per_cpu_s": round(plain["cpu"] / spent["cpu"], 2),
            "ratio_without_the_encoder": round(
                (plain["wall"] - plain["encoder"]) / (spent["wall"] - spent["encoder"]), 2
            ),
        }
        for most, spent in totals.items()
    }


def _count_steps(prepared: PreparedModel) -> dict[str, float]:
    """Steps that runners take from now on, those that check a draft, the encoder's seconds."""
    count = {"steps": 0.0, "with_draft": 0.0, "encoder": 0.0}
    step, encode = ModelRunner.step, prepared.encode

    def counted(runner: ModelRunner, plan: StepPlan) -> Any:
        count["steps"] += 1
        count["with_draft"] += plan.drafted > 0
        return step(runner, plan)

    def timed(*arguments: Any) -> Any:
        start = time.perf_counter()
        encoded = encode(*arguments)
        count["encoder"] += time.perf_counter() - start
        return encoded

    ModelRunner.step, prepared.encode = counted, timed
    return count


if __name__ == "__main__":
    main()

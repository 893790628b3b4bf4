"""The 27B fine-tuned on several GPUs by FSDP2, and by ZeRO-3 with offload: tokens a second, memory.

    python benchmarks/finetune_27b_cards.py --output benchmarks/results/finetune_27b_two.json
    python benchmarks/finetune_27b_cards.py --cards 8 --modes lora whole_bf16_batch32
    python benchmarks/finetune_27b_cards.py --tiny --steps 1            # two processes on a CPU

As `finetune_27b.py`, which has the modes of one GPU; a batch here is that of each GPU, and tokens
are those of all. `one` is LoRA on a single GPU. `full…` and `zero3` train every parameter of 4
encoder layers and 1 decoder layer of the 27B's widths; `whole…` of all layers, with so many
examples a step of all GPUs together, and all layers recomputed (`kept` and batch 256 in bfloat16:
as few as 80 GB allow). Weights are float32, by AdamW; `8`: its states have 8 bits (torchao);
`bf16`: the weights are bfloat16 besides, and steps are taken in the backward pass
(`adamw8bit_fused`), so that all layers go on two GPUs of 80 GB. `zero3` needs deepspeed. Memory is
of the GPU that had most. Each mode runs in processes of its own, so that one that fails or exceeds
its limit takes no other along. Prints one JSON line, last.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import finetune_27b as one
import torch
import torch.distributed as dist
from launching import launched, run_part, write
from torch import nn
from torch.distributed.tensor import DTensor

from plug.distributed.fully_sharded import as_shard, own_region
from plug.distributed.tensor_parallel import shard_shape
from plug.finetuning.kind import Collator
from plug.finetuning.memory import Case, Mode, best_way, training_of
from plug.finetuning.run import training_arguments
from plug.finetuning.settings import FinetuneSettings
from plug.finetuning.sharding import (
    Layout,
    find_layout,
    keeps_half,
    shard_for_training,
    without_wrapper,
)
from plug.finetuning.tasks import find_task
from plug.finetuning.trainer import FinetuneTrainer
from plug.hf import PlugForConditionalGeneration, PlugTransformersConfig
from plug.loading.estimate import Training, training_need
from plug.model.accounting import training_flops
from plug.model.configuration import PlugConfig

ZERO3 = Path(__file__).parents[1] / "configs" / "zero3-offload.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--modes", nargs="*", default=list(LIMITS), choices=[ONE, *MODES])
    parser.add_argument("--cards", type=int, default=2, help="where torchrun does not start it")
    parser.add_argument("--limit", type=float, help="seconds of a mode, in place of its own")
    parser.add_argument("--steps", type=int, default=5, help="timed; two more come before them")
    parser.add_argument("--layers", type=int, nargs=2, help="of encoder and decoder, for trials")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="settings")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    arguments.profile = None
    if "LOCAL_RANK" in os.environ:
        (mode,) = arguments.modes
        work(mode, arguments)
    else:
        print(json.dumps(measure_all(arguments), ensure_ascii=False))


def measure_all(arguments: argparse.Namespace) -> one.Found:
    """Run each mode by `torchrun`; the file is written after each."""
    line: one.Found = {"cards": arguments.cards, "modes": {}}
    for mode in arguments.modes:
        found = run_part(mode, command(mode, arguments), arguments.limit or LIMITS.get(mode, 120))
        line |= found.pop("facts", {})
        if mode == ONE:
            found = found.get("results", {}).get("lora", {}) | {
                name: found[name] for name in ("wall_s", "error") if name in found
            }
        line["modes"][mode] = found
        write(arguments.output, line)
    several = [
        mode for mode in ("lora", "lora_kept") if "tokens_per_s" in line["modes"].get(mode, {})
    ]
    alone = line["modes"].get(ONE, {}).get("tokens_per_s")
    if alone:
        rates = {mode: line["modes"][mode]["tokens_per_s"] for mode in several}
        line["ratio_to_one"] = {mode: round(rate / alone, 3) for mode, rate in rates.items()}
    write(arguments.output, line)
    return line


def command(mode: str, arguments: argparse.Namespace) -> list[str]:
    """Return what runs a mode; no launcher where one card works alone."""
    options = ["--modes", "lora" if mode == ONE else mode, "--steps", str(arguments.steps)]
    options += ["--tiny"] if arguments.tiny else []
    options += ["--layers", *map(str, arguments.layers)] if arguments.layers else []
    options += ["--set", *arguments.set] if arguments.set else []
    if mode == ONE:
        return [sys.executable, one.__file__, "--no-peers", *options]
    return launched(arguments.cards, Path(__file__).name, *options)


def work(mode: str, arguments: argparse.Namespace) -> None:
    """What one of the processes does."""
    one.say(f"{mode}: imported")
    found = MODES[mode](arguments)
    if os.environ["RANK"] == "0":
        text = json.dumps(found | {"facts": one.facts(arguments)}, ensure_ascii=False)
        if arguments.output:
            arguments.output.write_text(text + "\n", encoding="utf-8")
        print(text, flush=True)
    if dist.is_initialized():
        dist.destroy_process_group()


def measure(arguments: argparse.Namespace, *, layers: Any, settings: one.Found) -> one.Found:
    """Train a random model over all processes by the Trainer of `plug finetune`; time its steps."""
    given = argparse.Namespace(**{**vars(arguments), "layers": arguments.layers or layers})
    config = one.shape(given)
    run = FinetuneSettings(
        task=one.TASK, train="", eval="", output="", source_length=one.SOURCE,
        target_length=one.TARGET, **{**settings, **one.overrides(arguments)},
    )  # fmt: skip
    first = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    case = Case(
        config=config, bits=None, source_length=one.SOURCE, target_length=one.TARGET, room=None,
        on_gpu=first.type == "cuda",
    )  # fmt: skip
    layout = find_layout(run, case, first)
    device = layout.device
    one.say(f"{layout.processes} processes on {device.type} have joined")
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        told = training_arguments(run, find_task(one.TASK), Path(folder), first, False, layout)
        values = PlugTransformersConfig(**{**config.to_dict(), "tie_word_embeddings": True})
        model = random_shards(values, run, layout) if layout.is_fsdp else partitioned(values, told)
        one.say(f"random weights are there: {resident_gb(device)} GB on this device")
        count = run.batch_size * layout.processes * (arguments.steps + 2)
        trainer = FinetuneTrainer(
            score=lambda _: {},
            settings=run,
            model=model,
            args=one.for_timing(told, arguments.steps),
            train_dataset=one.examples(config, count),
            data_collator=Collator(config.pad_token_id),
        )
        timed = one.time_steps(trainer, arguments, device)
        trainer.accelerator.free_memory()
    del trainer, model
    flops = training_flops(config, one.SOURCE, one.TARGET, every_parameter=run.memory == "full")
    found = one.report(run.batch_size, timed, flops, 0, device)
    found["tokens_per_s"] = round(found["tokens_per_s"] * layout.processes, 1)
    del found["hardware_tflops"]
    peak = torch.tensor(found["peak_gb"], device=device)
    dist.all_reduce(peak, dist.ReduceOp.MAX)
    found["peak_gb"] = round(float(peak), 2)
    one.say("measured")
    return found | {
        "cards": layout.processes,
        "layers": [config.num_hidden_layers, config.num_decoder_layers],
        "recomputed_layers": run.recomputed_layers or run.gradient_checkpointing,
        "predicted_gb": predicted_gb(config, run, layout),
    }


def predicted_gb(config: PlugConfig, run: FinetuneSettings, layout: Layout) -> float | None:
    """What the estimator of `plug info` says of the peak; None with DeepSpeed, which it omits."""
    if layout.deepspeed is not None:
        return None
    case = Case(
        config=config, bits=None, source_length=one.SOURCE, target_length=one.TARGET, room=None,
        on_gpu=True, cards=layout.processes, offload=run.parallel.cpu_offload,
    )  # fmt: skip
    kept = 16 if keeps_half(run, layout.device) else 32
    training = replace(
        training_of(run, case), memory=run.memory, optimizer=run.optimizer, bits=kept
    )
    return round(training_need(config, training).total / 1e9, 2)


def resident_gb(device: torch.device) -> float:
    return round(torch.cuda.memory_allocated() / 1e9, 2) if device.type == "cuda" else 0.0


def random_shards(values: Any, run: FinetuneSettings, layout: Layout) -> Any:
    """A model of `plug.hf` of which each process draws its own shards."""
    half = keeps_half(run, layout.device)
    with torch.device("meta"):
        model: Any = PlugForConditionalGeneration(values)
    model = shard_for_training(model.to(torch.bfloat16 if half else torch.float32), run, layout)
    bare: nn.Module = without_wrapper(model)
    state = {}
    for name, parameter in bare.named_parameters():
        if not parameter.is_meta or not isinstance(parameter, DTensor):
            continue
        size = shard_shape(own_region(parameter), tuple(parameter.shape))
        tensor = torch.empty(size, dtype=parameter.dtype, device=layout.device)
        if "norm" in name:
            tensor.fill_(1.0 if name.endswith("weight") else 0.0)
        elif parameter.ndim == 1:
            tensor.zero_()
        else:
            tensor.normal_(std=values.initializer_range)
        state[name] = as_shard(tensor, parameter)
    bare.load_state_dict(state, strict=False, assign=True)
    return model


def partitioned(values: Any, told: Any) -> Any:
    """A model of `plug.hf` that ZeRO-3 partitions while it is made, with random weights."""
    import deepspeed

    assert told.hf_deepspeed_config is not None
    with deepspeed.zero.Init(config_dict_or_path=told.hf_deepspeed_config.config):
        model: Any = PlugForConditionalGeneration(values)
    return model


ONE = "one"  # LoRA on a single GPU, to compare with
FSDP = {"sharding": "fsdp"}
LORA: one.Found = {
    "memory": "lora", "lora_rank": one.RANK, "batch_size": 16, "recomputed_layers": 17,
    "parallel": FSDP,
}  # fmt: skip
FULL: one.Found = {"memory": "full", "batch_size": 16}
BF16: one.Found = {"optimizer": "adamw8bit_fused", "parallel": FSDP}
FEW = [4, 1]  # layers
ROOM = 76 * 10**9  # bytes of a GPU of 80 GB that a prediction may take


def measure_whole(
    arguments: argparse.Namespace, examples: int, optimizer: str, room: int = 0
) -> one.Found:
    """Every parameter of all layers; a step has so many examples on all GPUs together.

    All layers are recomputed, or as few as go into ``room`` bytes of a GPU.
    """
    processes = int(os.environ["WORLD_SIZE"])
    batch = max(1, examples // processes)
    settings = {"memory": "full", "optimizer": optimizer, "batch_size": batch, "parallel": FSDP}
    training = Training(
        batch_size=batch, source_length=one.SOURCE, target_length=one.TARGET, cards=processes
    )
    mode = Mode(memory="full", optimizer=optimizer, bits=16)
    way = best_way(one.shape(arguments), mode, training, room) if room else None
    if way is None:
        settings["gradient_checkpointing"] = True
    else:
        settings["recomputed_layers"] = way.training.recomputed
    return measure(arguments, layers=None, settings=settings)


MODES: dict[str, Callable[[argparse.Namespace], one.Found]] = {
    "lora": lambda a: measure(a, layers=None, settings=LORA),
    "lora_kept": lambda a: measure(a, layers=None, settings=LORA | {"recomputed_layers": 0}),
    "full": lambda a: measure(a, layers=FEW, settings=FULL | {"parallel": FSDP}),
    "full8": lambda a: measure(
        a, layers=FEW, settings=FULL | {"optimizer": "adamw8bit", "parallel": FSDP}
    ),
    "zero3": lambda a: measure(
        a, layers=FEW, settings=FULL | {"parallel": {"deepspeed": str(ZERO3)}}
    ),
    "full_bf16": lambda a: measure(a, layers=FEW, settings=FULL | BF16),
    "full_bf16_batch4": lambda a: measure(a, layers=FEW, settings=FULL | BF16 | {"batch_size": 4}),
    "whole8_batch32": lambda a: measure_whole(a, 32, "adamw8bit"),
    "whole8_batch256": lambda a: measure_whole(a, 256, "adamw8bit"),
    "whole_bf16_batch32": lambda a: measure_whole(a, 32, "adamw8bit_fused"),
    "whole_bf16_batch32_kept": lambda a: measure_whole(a, 32, "adamw8bit_fused", ROOM),
    "whole_bf16_batch256": lambda a: measure_whole(a, 256, "adamw8bit_fused", ROOM),
}
# Seconds of what two cards are measured with, the most wanted first.
# `zero3` may compile DeepSpeed's AdamW first.
LIMITS = {ONE: 110, "lora": 120, "full": 90, "lora_kept": 90, "zero3": 180}
LIMITS |= {"full_bf16": 90, "whole_bf16_batch32": 150}


if __name__ == "__main__":
    main()

"""The 27B fine-tuned on two GPUs by FSDP2, and by ZeRO-3 with offload: tokens a second, memory.

    torchrun --nproc-per-node 2 benchmarks/finetune_27b_two.py --modes lora full
    torchrun --nproc-per-node 2 benchmarks/finetune_27b_two.py --modes zero3     # needs deepspeed
    torchrun --nproc-per-node 2 benchmarks/finetune_27b_two.py --tiny            # on a CPU

As `finetune_27b.py`, which has the modes of one GPU; a batch here is that of each GPU, and tokens
are those of both. `full` and `zero3` train every parameter of 4 encoder layers and 1 decoder layer
of the 27B's widths. Memory is of the GPU that had most. Prints one JSON line, last.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import finetune_27b as one
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from plug.distributed.fully_sharded import as_shard, own_region
from plug.distributed.tensor_parallel import shard_shape
from plug.finetuning.kind import Collator
from plug.finetuning.memory import Case
from plug.finetuning.run import training_arguments
from plug.finetuning.settings import FinetuneSettings
from plug.finetuning.sharding import Layout, find_layout, shard_for_training, without_wrapper
from plug.finetuning.tasks import find_task
from plug.finetuning.trainer import FinetuneTrainer
from plug.hf import PlugForConditionalGeneration, PlugTransformersConfig
from plug.model.accounting import training_flops

ZERO3 = Path(__file__).parents[1] / "configs" / "zero3-offload.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--modes", nargs="*", default=["lora", "full"], choices=list(MODES))
    parser.add_argument("--steps", type=int, default=5, help="timed; two more come before them")
    parser.add_argument("--layers", type=int, nargs=2, help="of encoder and decoder, for trials")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="settings")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    arguments.profile = None
    line: one.Found = {"two_cards": {}, "cards": int(os.environ["WORLD_SIZE"])}
    for name in arguments.modes:
        one.free()
        try:
            line["two_cards"][name] = MODES[name](arguments)
        except Exception as error:  # the others are measured all the same
            traceback.print_exc(limit=8)
            line["two_cards"][name] = {"error": f"{type(error).__name__}: {error}"[:300]}
        if os.environ["RANK"] == "0":
            print(name, json.dumps(line["two_cards"][name]), flush=True)
    line |= one.facts(arguments)
    if os.environ["RANK"] == "0":
        text = json.dumps(line, ensure_ascii=False)
        if arguments.output:
            arguments.output.write_text(text + "\n", encoding="utf-8")
        print(text)
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
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        told = training_arguments(run, find_task(one.TASK), Path(folder), first, False, layout)
        values = PlugTransformersConfig(**{**config.to_dict(), "tie_word_embeddings": True})
        model = random_shards(values, run, layout) if layout.is_fsdp else partitioned(values, told)
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
    return found | {"recomputed_layers": run.recomputed_layers}


def random_shards(values: Any, run: FinetuneSettings, layout: Layout) -> Any:
    """A model of `plug.hf` of which each process draws its own shards."""
    half = layout.device.type == "cuda" and run.is_adapter
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


FSDP = {"sharding": "fsdp"}
LORA: one.Found = {
    "memory": "lora", "lora_rank": one.RANK, "batch_size": 16, "recomputed_layers": 17,
    "parallel": FSDP,
}  # fmt: skip
FULL: one.Found = {"memory": "full", "batch_size": 16}
MODES: dict[str, Callable[[argparse.Namespace], one.Found]] = {
    "lora": lambda a: measure(a, layers=None, settings=LORA),
    "lora_kept": lambda a: measure(a, layers=None, settings=LORA | {"recomputed_layers": 0}),
    "full": lambda a: measure(a, layers=[4, 1], settings=FULL | {"parallel": FSDP}),
    "zero3": lambda a: measure(
        a, layers=[4, 1], settings=FULL | {"parallel": {"deepspeed": str(ZERO3)}}
    ),
}


if __name__ == "__main__":
    main()

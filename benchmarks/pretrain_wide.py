"""Sharded pre-training at the 27B's widths: model TFLOP/s of a card, memory, a checkpoint's cost.

    torchrun --nproc-per-node 2 benchmarks/pretrain_wide.py --output wide.json
    torchrun --nproc-per-node 2 benchmarks/pretrain_wide.py --tiny          # on a CPU

`benchmarks/pretrain.py --wide` runs it. 4 encoder layers and 1 decoder layer, random weights;
stage 2 (PALM) with sources and targets of 512 random tokens, made before: reading a corpus is not
timed. Steps are those of `plug pretrain`: losses, FSDP2, clipping, AdamW with states in 8 bits.
Operations are those of three forward passes (`plug.pretraining.watching.batch_flops`), whatever is
recomputed. Memory is of the card that had most, in GB of 10^9 bytes, beside the prediction.

A checkpoint's `stall_s` is what the step after it takes longer than one without; `slowdown` is that
of the following steps, while it is written. Prints one JSON line, last.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from launching import write
from torch import Tensor

from plug.distributed.processes import Processes, Vote, start_processes
from plug.distributed.settings import ParallelSettings
from plug.finetuning.recomputation import recompute_layers
from plug.model.configuration import PRESETS, PlugConfig
from plug.model.plug import Plug
from plug.pretraining import sharded
from plug.pretraining.batches import Batch
from plug.pretraining.compiled import keep_bf16
from plug.pretraining.fp8 import check_fp8, multiply_in_fp8
from plug.pretraining.loop import take_step
from plug.pretraining.memory import need_of, recomputed_layers
from plug.pretraining.optimization import build_optimizers
from plug.pretraining.settings import RunConfig
from plug.pretraining.sharded import ShardedCheckpoints, ShardedGradients, shard_new
from plug.pretraining.state import State
from plug.pretraining.watching import batch_flops
from plug.tokenization import PlugTokenizer

Found = dict[str, Any]
WARM = 2  # steps that are not timed: memory is found, kernels are compiled


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--modes", nargs="*", default=["bf16", "fp8"], choices=["bf16", "fp8"])
    parser.add_argument("--checkpoint", action="store_true", help="also the cost of one")
    parser.add_argument("--folder", type=Path, help="where checkpoints go")
    parser.add_argument("--layers", type=int, nargs=2, default=[4, 1])
    parser.add_argument("--tokens", type=int, default=131_072, help="of a card and step")
    parser.add_argument("--micro", type=int, default=32_768, help="tokens of a card at once")
    parser.add_argument("--length", type=int, default=512, help="of a source and of a target")
    parser.add_argument("--recomputation", default="auto", help="layers, or auto")
    parser.add_argument("--optimizer", default="adamw8bit")
    parser.add_argument("--steps", type=int, default=5, help="timed")
    parser.add_argument("--tensor", type=int, default=1, help="cards that share each layer")
    parser.add_argument("--profile", type=Path, help="write where a step's time goes, to here")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, on the CPU")
    parser.add_argument("--output", type=Path, help="write the result here as well")
    arguments = parser.parse_args()
    if arguments.tiny:
        arguments.tokens, arguments.micro, arguments.length = 512, 256, 32
    line: Found = {"wide": {}, "layers": arguments.layers, "tokens": arguments.tokens}
    line |= {"torch": torch.__version__, "device": "cpu"}
    with start_processes("cpu" if arguments.tiny else None) as joined:
        processes = replace(joined, tensor=arguments.tensor)
        line["cards"] = processes.world_size
        if processes.device.type == "cuda":
            line["device"] = torch.cuda.get_device_name()
        for mode in arguments.modes:
            try:
                line["wide"][mode] = measure(arguments, mode, processes, line)
            except Exception as error:  # the others are measured all the same
                traceback.print_exc(limit=8)
                line["wide"][mode] = {"error": f"{type(error).__name__}: {error}"[:300]}
            gc.collect()
            if processes.device.type == "cuda":
                torch.cuda.empty_cache()
            if processes.is_first:
                write(arguments.output, line)
                print(json.dumps(line), flush=True)


def measure(arguments: argparse.Namespace, mode: str, processes: Processes, line: Found) -> Found:
    """Train a random model over all processes and time its steps; in the last mode a save too."""
    config = replace(
        PRESETS["test" if arguments.tiny else "27b"],
        num_hidden_layers=arguments.layers[0],
        num_decoder_layers=arguments.layers[1],
    )
    run = settings_of(arguments, mode, processes)
    if mode == "fp8" and not arguments.tiny:
        check_fp8(processes.device)
    began = time.perf_counter()
    state = build(config, run, processes)
    run = state.config
    gradients = ShardedGradients(state.model, processes)
    batches = [random_batch(config, run, processes, seed) for seed in range(3)]
    vote, number = Vote(processes.world_size), 0

    def step() -> None:
        nonlocal number
        batch = batches[number % len(batches)]
        take_step(state, gradients, batch, processes, vote, number)
        number += 1

    timed(step, processes)  # the first one, which compiles
    first = time.perf_counter() - began
    for _ in range(WARM - 1):
        step()
    synchronize(processes)
    if processes.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = timed(lambda: [step() for _ in range(arguments.steps)], processes) / arguments.steps
    flops = batch_flops(config, batches[0]) / processes.tensor
    found: Found = {
        "model_tflops": round(flops / seconds / 1e12, 1),
        "tokens_per_s": round(run.batch_tokens / seconds),
        "seconds": round(seconds, 3),
        "recomputed_layers": int(run.recomputation),
        "seconds_until_first_step": round(first, 1),
    }
    if processes.device.type == "cuda":
        peak = most(torch.cuda.max_memory_allocated() / 1e9, processes)
        cards = processes.world_size
        again = int(run.recomputation)
        predicted = need_of(config, run, 2, processes.data_size, cards, again) / 1e9
        found |= {"peak_gb": round(peak, 2), "predicted_gb": round(predicted, 2)}
    if processes.is_first:  # the rest may take longer than there is time
        print(json.dumps({mode: found}), flush=True)
    if arguments.profile:
        profile(step, processes, arguments.profile.with_suffix(f".{mode}.txt"))
    if arguments.checkpoint and mode == arguments.modes[-1]:
        line["checkpoint"] = checkpoint(arguments, state, step, processes)
    gradients.close()
    return found


def settings_of(arguments: argparse.Namespace, mode: str, processes: Processes) -> RunConfig:
    """The settings of `plug pretrain` for this; layers to recompute are filled in."""
    asked = arguments.recomputation
    return RunConfig(
        corpus="",
        output="",
        steps=1000,
        shapes=[[arguments.length, arguments.length, 1.0]],
        batch_tokens=arguments.tokens * processes.world_size,
        micro_batch_tokens=arguments.micro,
        learning_rate=1e-4,
        optimizer=arguments.optimizer,
        dropout=0.0,
        precision="bf16",
        fp8_products=mode == "fp8",
        recomputation=asked if asked == "auto" else int(asked),
        parallel=ParallelSettings(sharding="fsdp", tensor=processes.tensor),
    )


def build(config: PlugConfig, run: RunConfig, processes: Processes) -> State:
    """What `plug pretrain stage2` trains, with weights drawn on the device, where it takes no time.

    Its settings have the number of layers that are recomputed.
    """
    again = recomputed_layers(
        config,
        run,
        2,
        processes.device,
        world_size=processes.data_size,
        cards=processes.world_size,
    )
    run = replace(run, recomputation=again)
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    with torch.device("meta"):
        model = Plug(replace(config, **no_dropout)).train()
    model.sentence_head.requires_grad_(False)
    keep_bf16(model)
    recompute_layers(model, again)
    if run.fp8_products:
        multiply_in_fp8(model)
    sharded._drawn = drawn_on(processes.device)
    shard_new(model, run.parallel, processes, seed=1, source=None, compute_dtype=torch.bfloat16)
    optimizers = build_optimizers(
        model,
        name=run.optimizer,
        learning_rate=run.learning_rate,
        betas=(run.betas[0], run.betas[1]),
        weight_decay=run.weight_decay,
        rank=processes.rank,
        world_size=processes.world_size,
        is_sharded=True,
    )
    return State(2, run, model, PlugTokenizer.load("plug-mini-zh"), optimizers)


def drawn_on(device: torch.device) -> Callable[..., Tensor]:
    def drawn(model: Plug, name: str, shape: tuple[int, ...], seed: int) -> Tensor:
        if len(shape) == 1:
            is_scale = "norm" in name and name.endswith("weight")
            return torch.full(shape, float(is_scale), device=device)
        generator = torch.Generator(device).manual_seed(seed + len(name))
        std = model.config.initializer_range
        return torch.empty(shape, device=device).normal_(std=std, generator=generator)

    return drawn


def random_batch(config: PlugConfig, run: RunConfig, processes: Processes, seed: int) -> Batch:
    """This process's share of a batch of stage 2; 15% of the source are predicted."""
    generator = torch.Generator().manual_seed(seed * 1000 + processes.data_rank)
    ((shape, _),) = run.parsed_shapes(dimensions=2)
    source, target = shape
    rows = run.batch_tokens // processes.data_size // (source + target)
    predicted = round(source * run.mlm_rate)

    def ids(length: int) -> Tensor:
        return torch.randint(5, config.num_emitted_tokens, (rows, length), generator=generator)

    batch = {
        "input_ids": ids(source),
        "decoder_input_ids": ids(target),
        "labels": ids(target),
        "mlm_labels": ids(predicted),
        "mlm_positions": torch.randint(0, source, (rows, predicted), generator=generator),
    }
    if processes.device.type == "cuda":
        batch = {name: tensor.pin_memory() for name, tensor in batch.items()}
    return batch


def checkpoint(
    arguments: argparse.Namespace, state: State, step: Callable[[], None], processes: Processes
) -> Found:
    """Write a checkpoint while steps are taken, all of them timed one by one."""
    with tempfile.TemporaryDirectory(dir=arguments.folder) as own:
        place = [own]
        dist.broadcast_object_list(place, src=0)
        checkpoints = ShardedCheckpoints(Path(place[0]), processes, 1, state.tokenizer)
        checkpoints.watch(state.optimizers)
        # The copies' memory is reserved beside a run's first steps.
        if (reserved := checkpoints.prepare(state.model, state.optimizers)) is not None:
            reserved.result()
        step()
        before = [timed(step, processes) for _ in range(arguments.steps)]
        began = time.perf_counter()

        def save_and_step() -> None:
            checkpoints.save(state.model, state.optimizers, state.to_dict(processes))
            step()

        stalled = timed(save_and_step, processes)
        during = []
        while not all_have(checkpoints._end, processes) and len(during) < 30:
            during.append(timed(step, processes))
        checkpoints.finish()
        written = time.perf_counter() - began
        files = [path for path in Path(place[0]).rglob("*") if path.is_file()]
        size = sum(path.stat().st_size for path in files)
        checkpoints.close()
        dist.barrier()  # the folder goes with the first process's block
    usual = statistics.median(before)
    return {
        "stall_s": round(max(0.0, stalled - usual), 3),
        "slowdown": round(statistics.mean(during) / usual - 1, 4) if during else None,
        "step_s": round(usual, 3),
        "steps_while_writing": len(during),
        "written_s": round(written, 1),
        "gb": round(size / 1e9, 3),
    }


def all_have(end: Any, processes: Processes) -> bool:
    """Whether the writing has ended in every process."""
    return most(0.0 if end is None or end.done() else 1.0, processes) == 0.0


def most(value: float, processes: Processes) -> float:
    """The largest that any process has."""
    largest = torch.tensor(value, device=processes.device)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return float(largest)


def synchronize(processes: Processes) -> None:
    if processes.device.type == "cuda":
        torch.cuda.synchronize()
    dist.barrier()


def timed(work: Callable[[], Any], processes: Processes) -> float:
    """Seconds, from when all processes begin until all have ended."""
    synchronize(processes)
    began = time.perf_counter()
    work()
    synchronize(processes)
    return time.perf_counter() - began


def profile(step: Callable[[], None], processes: Processes, path: Path) -> None:
    """Write where the time of a step goes, by kernel; the first process's."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        timed(step, processes)
    if processes.is_first:
        order = "self_device_time_total"
        path.write_text(profiler.key_averages().table(sort_by=order, row_limit=60))


if __name__ == "__main__":
    main()

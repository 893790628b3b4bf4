"""The 27B fine-tuned on one GPU: tokens a second and memory of each mode, beside peft's.

    python benchmarks/finetune_27b.py --output benchmarks/results/finetune_27b.json
    python benchmarks/finetune_27b.py --modes lora qlora --no-peers
    python benchmarks/finetune_27b.py --tiny            # another shape, on a CPU, in seconds

Random weights of the 27B's shape, sources of 384 tokens and targets of 32, the Trainer of
`plug finetune` with all its steps: batches, loss, gradients, AdamW. The peers are `transformers`'
MBart of the same shape under `peft` LoRA of the same rank, in bf16 and on `bitsandbytes` nf4,
with gradient checkpointing. Memory is what PyTorch had allocated at most, in GB of 10^9 bytes.
Operations are those of `plug.model.accounting.training_flops`. Prints one JSON line, last.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import date
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PrinterCallback, Trainer, TrainerCallback

from plug import __version__
from plug.finetuning.kind import Collator
from plug.finetuning.recomputation import is_recomputed, layers_of
from plug.finetuning.run import prepare, training_arguments
from plug.finetuning.settings import FinetuneSettings
from plug.finetuning.tasks import find_task
from plug.finetuning.trainer import FinetuneTrainer
from plug.hf import PlugForConditionalGeneration, PlugTransformersConfig
from plug.loading.estimate import Training, training_need
from plug.model.accounting import encoder_flops, training_flops
from plug.model.configuration import PRESETS, PlugConfig
from plug.quantization.linear import QuantizedLinear
from plug.quantization.scheme import Scheme

SOURCE, TARGET = 384, 32
RANK = 16
TASK = "cmrc2018_qg"
Found = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--modes", nargs="*", default=list(MODES), choices=list(MODES))
    parser.add_argument("--peers", nargs="*", default=list(PEERS), choices=list(PEERS))
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--steps", type=int, default=5, help="timed; two more come before them")
    parser.add_argument("--layers", type=int, nargs=2, help="of encoder and decoder, for trials")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="settings")
    parser.add_argument("--profile", type=Path, help="write where a step's time goes, to here")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    if arguments.no_peers:
        arguments.peers = []
    torch.manual_seed(0)
    line: Found = {"results": {}, "peer": {}}
    for group, names, modes in (
        ("results", arguments.modes, MODES),
        ("peer", arguments.peers, PEERS),
    ):
        for name in names:
            free()
            try:
                line[group][name] = modes[name](arguments)
            except Exception as error:  # the others are measured all the same
                traceback.print_exc(limit=8)
                line[group][name] = {"error": f"{type(error).__name__}: {error}"[:300]}
            print(group, name, json.dumps(line[group][name]), flush=True)
            if arguments.output:  # what is known so far
                arguments.output.write_text(json.dumps(line | facts(arguments)) + "\n")
    line |= facts(arguments)
    text = json.dumps(line, ensure_ascii=False)
    if arguments.output:
        arguments.output.write_text(text + "\n", encoding="utf-8")
    print(text)


def facts(arguments: argparse.Namespace) -> Found:
    """Return the device, the sizes and the versions."""
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "preset": "tiny" if arguments.tiny else "27b",
        "source": SOURCE,
        "target": TARGET,
        "rank": RANK,
        "date": date.today().isoformat(),
        "plug": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


# The modes -------------------------------------------------------------------------------------


def measure_adapters(
    arguments: argparse.Namespace, *, bits: int, batch: int, **settings: Any
) -> Found:
    """LoRA on weights of so many bits, as `plug finetune --memory lora|qlora` trains it."""
    memory = "lora" if bits == 16 else "qlora"
    settings = {"memory": memory, "lora_rank": RANK, "batch_size": batch, **settings}
    return measure(arguments, bits=bits, settings=settings, every_parameter=False)


def measure(
    arguments: argparse.Namespace, *, bits: int, settings: Found, every_parameter: bool
) -> Found:
    """Train a random model by the Trainer of `plug finetune`, and time its steps.

    Args:
        arguments: of the command line.
        bits: of the layers' weights.
        settings: of the run, by name.
        every_parameter: whether all of them are trained, for the count of operations.
    """
    config = shape(arguments)
    run = FinetuneSettings(
        task=TASK, train="", eval="", output="", source_length=SOURCE, target_length=TARGET,
        **{**settings, **overrides(arguments)},
    )  # fmt: skip
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    say(f"random weights in {bits} bits")
    model = prepare(random_model(config, bits, device, dtype), run, device)
    say("the model is there")
    with tempfile.TemporaryDirectory() as folder:
        told = training_arguments(run, find_task(TASK), Path(folder), device, False)
        trainer = FinetuneTrainer(
            score=lambda _: {},
            settings=run,
            model=model,
            args=for_timing(told, arguments.steps),
            train_dataset=examples(config, run.batch_size * (arguments.steps + 2)),
            data_collator=Collator(config.pad_token_id),
        )
        timed = time_steps(trainer, arguments, device)
    flops = training_flops(config, SOURCE, TARGET, every_parameter=every_parameter)
    again = recomputed_flops(config, model)
    found = report(run.batch_size, timed, flops, again, device)
    return found | {"predicted_gb": predicted_gb(config, run, bits, model)}


def predicted_gb(config: PlugConfig, run: FinetuneSettings, bits: int, model: nn.Module) -> float:
    """What the estimator of `--memory auto` and `plug info` says of the peak."""
    training = Training(
        batch_size=run.batch_size,
        source_length=SOURCE,
        target_length=TARGET,
        memory=run.memory,
        optimizer=run.optimizer,
        bits=bits,
        rank=RANK,
        recomputed=sum(map(is_recomputed, layers_of(model))),
    )
    return round(training_need(config, training).total / 1e9, 2)


def recomputed_flops(config: PlugConfig, model: nn.Module) -> int:
    """Operations that the encoder's recomputed layers do twice for one example, without fc2's."""
    layers = layers_of(model)[: config.num_hidden_layers]
    share = sum(map(is_recomputed, layers))
    fc2 = 2 * SOURCE * config.hidden_size * config.intermediate_size
    return share * (encoder_flops(config, SOURCE) // config.num_hidden_layers - fc2)


def report(batch: int, timed: Found, flops: int, recomputed: int, device: torch.device) -> Found:
    """The keys of a mode, from seconds a step and operations of an example."""
    seconds = timed["seconds"]
    return {
        "batch": batch,
        "tokens_per_s": round(batch * (SOURCE + TARGET) / seconds, 1),
        "peak_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2)
        if device.type == "cuda"
        else 0,
        "model_tflops": round(batch * flops / seconds / 1e12, 1),
        "hardware_tflops": round(batch * (flops + recomputed) / seconds / 1e12, 1),
        "seconds": [round(each, 4) for each in timed["all"]],
        "resident_gb": timed["resident_gb"],
    }


def measure_every_parameter(arguments: argparse.Namespace, **settings: Any) -> Found:
    """Every parameter, as `plug finetune --optimizer adafactor` trains it."""
    settings = {"memory": "full", "optimizer": "adafactor", **settings}
    return measure(arguments, bits=16, settings=settings, every_parameter=True)


MODES: dict[str, Callable[[argparse.Namespace], Found]] = {
    "full": lambda a: measure_every_parameter(a, batch_size=12),
    "full_batch16": lambda a: measure_every_parameter(a, batch_size=16, recomputed_layers=20),
    "lora": lambda a: measure_adapters(a, bits=16, batch=16, recomputed_layers=16),
    "lora_batch4": lambda a: measure_adapters(a, bits=16, batch=4),
    "lora8": lambda a: measure_adapters(a, bits=8, batch=16),
    "lora8_recomputed": lambda a: measure_adapters(
        a, bits=8, batch=16, gradient_checkpointing=True
    ),
    "qlora": lambda a: measure_adapters(a, bits=4, batch=16, gradient_checkpointing=True),
    "qlora_bf16": lambda a: measure_adapters(
        a, bits=4, batch=16, gradient_checkpointing=True, quantized_products="bf16"
    ),
    "qlora_batch4": lambda a: measure_adapters(a, bits=4, batch=4, gradient_checkpointing=True),
}


# The peers -------------------------------------------------------------------------------------


def measure_peer(arguments: argparse.Namespace, *, nf4: bool, batch: int) -> Found:
    """`transformers`' MBart under `peft` LoRA, by its Trainer, with gradient checkpointing."""
    import peft

    ours = shape(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = random_mbart(ours, nf4, device)
    config = peft.LoraConfig(
        r=RANK,
        lora_alpha=2 * RANK,
        target_modules=["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
    )
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    adapted: Any = peft.get_peft_model(model, config)
    run = FinetuneSettings(
        task=TASK, train="", eval="", output="", source_length=SOURCE, target_length=TARGET,
        batch_size=batch, memory="lora",
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        told = training_arguments(run, find_task(TASK), Path(folder), device, False)
        trainer = Trainer(
            model=adapted,
            args=for_timing(told, arguments.steps),
            train_dataset=examples(ours, batch * (arguments.steps + 2)),
            data_collator=Collator(ours.pad_token_id),
        )
        timed = time_steps(trainer, arguments, device)
    flops = training_flops(ours, SOURCE, TARGET, every_parameter=False)
    found = report(batch, timed, flops, flops // 2, device)
    return found | {"peft": peft.__version__}


def random_mbart(ours: PlugConfig, nf4: bool, device: torch.device) -> Any:
    """The peer of the shape ``ours``, with random weights made on the device."""
    from transformers import MBartConfig, MBartForConditionalGeneration

    config = MBartConfig(
        vocab_size=ours.vocab_size,
        d_model=ours.hidden_size,
        encoder_layers=ours.num_hidden_layers,
        decoder_layers=ours.num_decoder_layers,
        encoder_attention_heads=ours.num_attention_heads,
        decoder_attention_heads=ours.num_attention_heads,
        encoder_ffn_dim=ours.intermediate_size,
        decoder_ffn_dim=ours.intermediate_size,
        max_position_embeddings=ours.max_position_embeddings,
        decoder_start_token_id=2,
        forced_eos_token_id=None,
        use_cache=False,
    )
    config._attn_implementation = "sdpa"
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with torch.device("meta"):
        model = MBartForConditionalGeneration(config)
    model.to(dtype)
    if nf4:
        quantize_nf4(model, device)
    for module in list(model.modules()):
        for tensor in [*module._parameters.values(), *module._buffers.values()]:
            if tensor is not None and tensor.is_meta:
                break
        else:
            continue
        module.to_empty(device=device, recurse=False)
    model.tie_weights()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.dtype == torch.uint8:
            continue
        if tensor.ndim == 1 or name.endswith("final_logits_bias"):
            nn.init.constant_(tensor, 1.0 if "norm" in name and name.endswith("weight") else 0.0)
        elif tensor.is_floating_point() and "embed_positions" not in name:
            nn.init.normal_(tensor, std=0.01)
        elif tensor.is_floating_point():
            nn.init.zeros_(tensor)
    model.requires_grad_(False)
    return model


def quantize_nf4(model: Any, device: torch.device) -> None:
    """Put `bitsandbytes` layers in the place of the linear layers of encoder and decoder."""
    import bitsandbytes as bnb

    for name, linear in list(model.named_modules()):
        if not isinstance(linear, nn.Linear) or ".layers." not in name:
            continue
        layer = bnb.nn.Linear4bit(
            linear.in_features,
            linear.out_features,
            compute_dtype=torch.bfloat16,
            compress_statistics=True,  # double quantisation
            quant_type="nf4",
            device="meta",
        )
        weight = torch.empty(linear.weight.shape, dtype=torch.bfloat16, device=device)
        layer.weight = bnb.nn.Params4bit(
            weight.normal_(std=0.01), requires_grad=False, compress_statistics=True,
            quant_type="nf4",
        ).to(device)  # fmt: skip
        layer.bias = nn.Parameter(torch.zeros(linear.out_features, dtype=torch.bfloat16).to(device))
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, layer)
    model.is_loaded_in_4bit = True
    model.is_quantized = False  # else the Trainer asks for transformers' own configuration


PEERS: dict[str, Callable[[argparse.Namespace], Found]] = {
    "lora": lambda a: measure_peer(a, nf4=False, batch=16),
    "lora_batch4": lambda a: measure_peer(a, nf4=False, batch=4),
    "qlora": lambda a: measure_peer(a, nf4=True, batch=16),
    "qlora_batch4": lambda a: measure_peer(a, nf4=True, batch=4),
}


# What they share -------------------------------------------------------------------------------


def shape(arguments: argparse.Namespace) -> PlugConfig:
    """The 27B, or a tiny model whose widths every format takes."""
    if arguments.tiny:
        return replace(
            PRESETS["test"], hidden_size=128, num_attention_heads=2, intermediate_size=512,
            max_position_embeddings=SOURCE,
        )  # fmt: skip
    config = PRESETS["27b"]
    if arguments.layers:
        encoder, decoder = arguments.layers
        config = replace(config, num_hidden_layers=encoder, num_decoder_layers=decoder)
    return config


def overrides(arguments: argparse.Namespace) -> Found:
    """Settings from the command line, in place of a mode's."""
    pairs = (each.split("=", 1) for each in arguments.set)
    return {name: json.loads(value) for name, value in pairs}


def random_model(config: PlugConfig, bits: int, device: torch.device, dtype: torch.dtype) -> Any:
    """A model of `plug.hf` with random weights in 16, 8 or 4 bits, made on the device."""
    values: Found = {**config.to_dict(), "tie_word_embeddings": True}
    if bits < 16:
        values["quantization"] = Scheme.of(bits).to_dict()
    with torch.device("meta"):
        model: Any = PlugForConditionalGeneration(PlugTransformersConfig(**values))
    model.to(dtype)  # the scales of 8 bits are float32 all the same, see below
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            fill(module, device, dtype)
        else:
            module.to_empty(device=device, recurse=False)
    model.tie_weights()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.fill_(1.0 if name.endswith("weight") else 0.0)
            elif parameter.ndim == 1:
                parameter.zero_()
            else:
                parameter.normal_(std=config.initializer_range)
    return model


def fill(module: QuantizedLinear, device: torch.device, dtype: torch.dtype) -> None:
    """Random integers that stand for weights of standard deviation 0.007."""
    for name, (kind, size) in module.scheme.tensors(
        module.out_features, module.in_features
    ).items():
        tensor = torch.empty(size, dtype=kind, device=device)
        if not kind.is_floating_point:
            tensor.random_(*((-127, 128) if kind == torch.int8 else (0, 256)))
        else:
            tensor.fill_(
                {"scale": 0.007 / 73.6 if module.scheme.bits == 8 else 0.007 / 4.61}.get(
                    name, 0.007 / 9.22
                )
            )
        setattr(module, name, tensor)
    module.bias = torch.zeros(module.out_features, dtype=dtype, device=device)


def examples(config: PlugConfig, count: int) -> list[dict[str, list[int]]]:
    """Random ids: every source and target as long as it may be."""
    generator = torch.Generator().manual_seed(1)
    most = config.num_emitted_tokens
    sources = torch.randint(5, most, (count, SOURCE), generator=generator).tolist()
    targets = torch.randint(5, most, (count, TARGET), generator=generator).tolist()
    return [
        {"input_ids": source, "labels": target}
        for source, target in zip(sources, targets, strict=True)
    ]


def for_timing(told: Any, steps: int) -> Any:
    """Change arguments of the Trainer: so many steps after two, nothing evaluated or saved."""
    told.max_steps = steps + 2
    told.eval_strategy = told.save_strategy = "no"
    told.load_best_model_at_end = False
    told.logging_strategy = "no"
    return told


_BEGAN = time.perf_counter()


def say(what: str) -> None:
    """Print how far the run is, after how many seconds; of several processes, the first does."""
    if os.environ.get("RANK", "0") == "0":
        print(f"{time.perf_counter() - _BEGAN:7.1f} s  {what}", flush=True)


class Clock(TrainerCallback):
    """Keeps the time at which each step ended, on the device: nobody waits for it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.ends: list[Any] = []

    def on_step_end(self, *_args: Any, **_options: Any) -> None:
        say(f"step {len(self.ends) + 1} is queued")
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.ends.append(event)
        else:
            self.ends.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """Return how long each step took that came after another."""
        if self.device.type != "cuda":
            return [after - before for before, after in pairwise(self.ends)]
        torch.cuda.synchronize()
        return [before.elapsed_time(after) / 1000 for before, after in pairwise(self.ends)]


def time_steps(trainer: Any, arguments: argparse.Namespace, device: torch.device) -> Found:
    """Train; the median seconds of a step without the first two, which compile and reserve."""
    clock = Clock(device)
    trainer.add_callback(clock)
    trainer.remove_callback(PrinterCallback)
    resident = 0
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        resident = torch.cuda.memory_allocated()
    with profiled(arguments.profile):
        trainer.train()
    took = clock.seconds()[1:]
    return {
        "seconds": statistics.median(took),
        "all": took,
        "resident_gb": round(resident / 1e9, 2),
    }


@contextmanager
def profiled(path: Path | None) -> Iterator[None]:
    """Add a table of the kernels' times to the file ``path``, where there is one."""
    if path is None:
        yield
        return
    from torch.profiler import ProfilerActivity, profile

    kinds = [ProfilerActivity.CUDA] if torch.cuda.is_available() else [ProfilerActivity.CPU]
    with profile(activities=kinds) as seen:
        yield
    key = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    table = seen.key_averages().table(sort_by=key, row_limit=40, max_name_column_width=90)
    with path.open("a", encoding="utf-8") as file:
        file.write(table + "\n")


def free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()

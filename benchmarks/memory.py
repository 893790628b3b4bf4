"""The peak of a GPU's memory beside the prediction of `plug info --memory`, for many ways to work.

    python benchmarks/memory.py --output benchmarks/results/memory.json
    python benchmarks/memory.py --tiny          # other shapes, on a CPU: that everything runs
    python benchmarks/memory.py --cases generate finetune

Layers of the 27B's widths, fewer of them, so that many cases take minutes; the small model's
pre-training as it is. Random weights. Memory is what PyTorch had allocated at most, in GB of 10^9
bytes. Prints a line a case and one JSON line, last.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import traceback
from dataclasses import replace
from datetime import date
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from finetune_27b import examples, for_timing, free, random_model, time_steps

from plug import __version__
from plug.finetuning.generation import as_plug
from plug.finetuning.kind import Collator
from plug.finetuning.memory import Case, training_of
from plug.finetuning.recomputation import recompute_layers
from plug.finetuning.run import prepare, training_arguments
from plug.finetuning.settings import FinetuneSettings
from plug.finetuning.tasks import find_task
from plug.finetuning.trainer import FinetuneTrainer
from plug.generation.generator import Generator
from plug.generation.settings import GenerationSettings
from plug.kernels.packed_linear import has_fp8
from plug.loading.estimate import Training, generation_need, training_need, weight_bytes
from plug.model.configuration import PRESETS, PlugConfig
from plug.model.plug import Plug
from plug.pretraining.compiled import compile_model, keep_bf16
from plug.pretraining.fp8 import multiply_in_fp8
from plug.pretraining.gradients import Gradients
from plug.pretraining.loop import take_step
from plug.pretraining.optimization import build_optimizers
from plug.tokenization import PlugTokenizer

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HALF = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
Found = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cases", nargs="*", default=list(CASES), choices=list(CASES))
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    rows: list[Found] = []
    for group in arguments.cases:
        for name, run, options in CASES[group](arguments.tiny):
            free()
            row: Found = {"use": group, "name": name}
            try:
                row |= run(**options)
            except Exception as error:  # the others are measured all the same
                traceback.print_exc(limit=6)
                row["error"] = f"{type(error).__name__}: {error}"[:300]
            rows.append(row)
            print(json.dumps(row, ensure_ascii=False), flush=True)
    line = {
        "device": torch.cuda.get_device_name() if DEVICE.type == "cuda" else "cpu",
        "date": date.today().isoformat(),
        "plug": __version__,
        "torch": torch.__version__,
        "rows": rows,
    }
    text = json.dumps(line, ensure_ascii=False)
    if arguments.output:
        arguments.output.write_text(text + "\n", encoding="utf-8")
    print(text)


def shape(tiny: bool, encoder: int, decoder: int) -> PlugConfig:
    """Layers of the 27B's widths, or tiny ones that every format takes."""
    config = PRESETS["27b"]
    if tiny:
        config = replace(
            PRESETS["test"],
            hidden_size=128,
            num_attention_heads=2,
            intermediate_size=512,
            max_position_embeddings=512,
            num_emitted_tokens=310,
        )
    return replace(config, num_hidden_layers=encoder, num_decoder_layers=decoder)


def report(predicted: int) -> Found:
    measured = torch.cuda.max_memory_allocated() if DEVICE.type == "cuda" else 0
    found = {"predicted_gb": round(predicted / 1e9, 3), "measured_gb": round(measured / 1e9, 3)}
    return found | ({"ratio": round(predicted / measured, 3)} if measured else {})


def reset() -> None:
    free()
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()


# --- writing --------------------------------------------------------------------------------------


def generate_cases(tiny: bool) -> list[tuple[str, Any, Found]]:
    sizes = [(2, 48, 16)] if tiny else [(1, 512, 128), (8, 256, 64), (32, 512, 128)]
    return [
        (f"{bits} bits, {rows} texts, {source} + {capacity}", generate, {
            "config": shape(tiny, 4, 2), "bits": bits, "rows": rows, "source": source,
            "capacity": capacity,
        })
        for bits in (16, 8, 4)
        for rows, source, capacity in sizes
    ]  # fmt: skip


def generate(config: PlugConfig, bits: int, rows: int, source: int, capacity: int) -> Found:
    reset()
    model = as_plug(random_model(config, bits, DEVICE, HALF)).eval()
    generator = Generator(model, tokenizer_for(config))
    settings = GenerationSettings(out_length=capacity, ignore_eos=True)
    texts = [torch.randint(10, 300, (source - 2,)).tolist() for _ in range(rows)]
    generator(texts, settings, seed=1, batch_size=rows)
    reset()
    generator(texts, settings, seed=1, batch_size=rows)  # beside the caches of the call before
    need = generation_need(
        config,
        weights=weight_bytes(config, bits),
        batch_size=rows,
        source_length=source,
        capacity=capacity,
        bits=bits,
    )
    return report(need.total)


def tokenizer_for(config: PlugConfig) -> PlugTokenizer:
    """Any will do that has the model's special tokens: texts are ids here."""
    pieces = [f"word{index}" for index in range(config.num_emitted_tokens)]
    ids = {"[PAD]": config.pad_token_id, "[UNK]": config.unk_token_id}
    ids |= {"[CLS]": config.decoder_start_token_id, "[SEP]": config.eos_token_id}
    for piece, index in (ids | {"[MASK]": config.mask_token_id}).items():
        pieces[index] = piece
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "vocab.txt"
        path.write_text("\n".join(pieces) + "\n", encoding="utf-8")
        return PlugTokenizer.from_vocabulary_file(path)


# --- fine-tuning ----------------------------------------------------------------------------------


def finetune_cases(tiny: bool) -> list[tuple[str, Any, Found]]:
    found: list[tuple[str, Any, Found]] = []
    adapted, whole = shape(tiny, 4, 2), shape(tiny, 2, 1)
    for batch in (2, 4) if tiny else (4, 16):
        for recomputed in (0, 3):
            for bits, memory in ((16, "lora"), (8, "qlora"), (4, "qlora")):
                options = {"memory": memory, "recomputed_layers": recomputed, "batch_size": batch}
                found.append(case(adapted, bits, options))
            options = {"memory": "full", "recomputed_layers": recomputed, "batch_size": batch}
            for optimizer in ("adafactor", "adamw8bit_fused"):
                found.append(case(adapted, 16, options | {"optimizer": optimizer}))
            found.append(case(whole, 32, options))
    options = {"memory": "qlora", "recomputed_layers": 6, "quantized_products": "bf16"}
    found.append(case(adapted, 4, options | {"batch_size": 4 if tiny else 16}))
    options = {"memory": "full", "gradient_accumulation_steps": 2, "batch_size": 4}
    found.append(case(whole, 32, options))
    found.append(case(whole, 32, {"memory": "full", "precision": "fp32", "batch_size": 4}))
    return found


def case(config: PlugConfig, bits: int, options: Found) -> tuple[str, Any, Found]:
    told = ", ".join(f"{name}={value}" for name, value in options.items())
    layers = f"{config.num_hidden_layers} + {config.num_decoder_layers} layers"
    return f"{layers}, {bits} bits, {told}", finetune, {"config": config, "bits": bits, **options}


def finetune(config: PlugConfig, bits: int, **options: Any) -> Found:
    source, target = 384, 32
    reset()
    run = FinetuneSettings(
        task="cmrc2018_qg",
        train="",
        eval="",
        output="",
        source_length=source,
        target_length=target,
        **options,
    )
    dtype = torch.float32 if bits == 32 else HALF
    model = prepare(random_model(config, bits, DEVICE, dtype), run, DEVICE)
    steps = 1
    with tempfile.TemporaryDirectory() as folder:
        told = training_arguments(run, find_task(run.task), Path(folder), DEVICE, False)
        trainer = FinetuneTrainer(
            score=lambda _: {},
            settings=run,
            model=model,
            args=for_timing(told, steps),
            train_dataset=examples(
                config, run.batch_size * run.gradient_accumulation_steps * (steps + 2)
            ),
            data_collator=Collator(config.pad_token_id),
        )
        time_steps(trainer, argparse.Namespace(profile=None), DEVICE)
    known = Case(
        config=config,
        bits=bits if bits < 16 else None,
        source_length=source,
        target_length=target,
        room=None,
        on_gpu=True,
    )
    training = replace(
        training_of(run, known), memory=run.memory, optimizer=run.optimizer, bits=bits
    )
    return report(training_need(config, training).total)


# --- pre-training ---------------------------------------------------------------------------------


def pretrain_cases(tiny: bool) -> list[tuple[str, Any, Found]]:
    found: list[tuple[str, Any, Found]] = []
    shapes = [(1, 4, 32, 0), (2, 4, 24, 16)]
    if not tiny:
        shapes = [(1, 256, 512, 0), (2, 256, 128, 384), (2, 64, 512, 512)]
    for compiled in (False, True):
        for optimizer in ("adamw", "muon"):
            for stage, rows, source, target in shapes:
                options = {
                    "stage": stage, "rows": rows, "source": source, "target": target,
                    "optimizer": optimizer, "compiled": compiled,
                }  # fmt: skip
                if tiny:
                    options["preset"] = "test"
                name = f"stage {stage}, {rows} x ({source} + {target}), {optimizer}"
                found.append((name + (", compiled" if compiled else ""), pretrain, options))
    stage, rows, source, target = shapes[1]
    plain = {
        "stage": stage, "rows": rows, "source": source, "target": target, "optimizer": "adamw",
        "compiled": False,
    } | ({"preset": "test"} if tiny else {})  # fmt: skip
    more: list[Found] = [{"recomputed": 3}, {"recomputed": 14}]
    if find_spec("torchao"):
        more.append({"optimizer": "adamw8bit"})
    if has_fp8(DEVICE) or tiny:
        more.append({"fp8": True})
    for changes in more:
        told = ", ".join(f"{name}={value}" for name, value in changes.items())
        found.append(
            (f"stage 2, {rows} x ({source} + {target}), {told}", pretrain, plain | changes)
        )
    return found


def pretrain(
    stage: int,
    rows: int,
    source: int,
    target: int,
    optimizer: str,
    compiled: bool,
    preset: str = "mini",
    recomputed: int = 0,
    fp8: bool = False,
) -> Found:
    reset()
    config = PRESETS[preset]
    if stage == 1:
        config = replace(config, num_decoder_layers=0)
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    with DEVICE:
        model = Plug(replace(config, **no_dropout)).train()
    if stage == 2:
        model.sentence_head.requires_grad_(False)
    keep_bf16(model)
    recompute_layers(model, recomputed)
    if fp8:
        multiply_in_fp8(model)
    if compiled:
        compile_model(model)
    optimizers = build_optimizers(
        model, name=optimizer, learning_rate=1e-4, betas=(0.9, 0.99), weight_decay=0.01
    )
    settings = SimpleNamespace(
        seed=1, skip_spikes=0.0, micro_batch_tokens=2**40, precision="bf16", clip_grad_norm=1.0,
        steps=10, warmup_fraction=0.1, schedule="linear", learning_rate=1e-4,
    )  # fmt: skip
    state: Any = SimpleNamespace(config=settings, stage=stage, model=model, optimizers=optimizers)
    processes: Any = SimpleNamespace(rank=0, world_size=1, device=DEVICE)
    share = 0.2 if stage == 1 else 0.15  # masked, and shuffled in stage 1
    predicted = round(source * 0.15)
    most = config.num_emitted_tokens
    batch = {
        "input_ids": torch.randint(5, most, (rows, source)),
        "mlm_positions": torch.randint(0, source, (rows, predicted)),
        "mlm_labels": torch.randint(5, most, (rows, predicted)),
    }
    if stage == 1:
        shuffled = round(source * 0.05)
        batch |= {
            "token_type_ids": torch.zeros(rows, source, dtype=torch.long),
            "word_positions": torch.randint(0, source, (rows, shuffled)),
            "word_labels": torch.randint(5, most, (rows, shuffled)),
            "sentence_label": torch.randint(0, 3, (rows,)),
        }
    else:
        batch |= {
            "decoder_input_ids": torch.randint(5, most, (rows, target)),
            "labels": torch.randint(5, most, (rows, target)),
        }
    gradients = Gradients(model.named_parameters(), 1)
    for step in range(3):
        take_step(state, gradients, batch, processes, lambda number: number, step)
        if step == 0:
            reset()
    training = Training(
        batch_size=rows,
        source_length=source,
        target_length=target,
        optimizer=optimizer,
        accumulates=True,
        dropout=False,
        masked_share=share,
        half_stream=True,
        recomputed=recomputed,
        fp8=fp8,
    )
    return report(training_need(config, training).total)


CASES = {"generate": generate_cases, "finetune": finetune_cases, "pretrain": pretrain_cases}


if __name__ == "__main__":
    main()

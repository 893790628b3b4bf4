"""The 27B on one GPU or several: tokens a second, memory and bandwidth in 16, 8 and 4 bits.

    python benchmarks/decode_27b.py --output benchmarks/results/decode_27b.json
    torchrun --standalone --nproc-per-node 2 benchmarks/decode_27b.py --bits 16 --no-peer
    python benchmarks/decode_27b.py --tiny      # another shape, on a CPU, in seconds

Random weights of the 27B's shape, a 512-token prompt, 128 tokens drawn (top-k 20, temperature 0.9),
end to end: the encoder, every step and the sampling. The peer is `transformers`' MBart (pre-norm,
24 + 6 layers, the same widths and vocabulary), `generate()` with its dynamic cache and, with
`--peer-static`, its static cache compiled. The weights are the same for any number of processes;
with `--ids` the likeliest ids of a few texts are in the JSON, and by how much each was the
likeliest. Prints one JSON line, last, or writes it to `--output`.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch

from plug import __version__
from plug.distributed.processes import Processes, start_processes
from plug.distributed.tensor_parallel import shard_model, shard_slices
from plug.generation.model_runner import ModelRunner, PreparedModel, Size
from plug.generation.scheduler import Scheduler
from plug.generation.sequence import Sequence
from plug.generation.settings import GenerationSettings
from plug.generation.window import PlugRules
from plug.model.configuration import PRESETS
from plug.model.plug import Plug
from plug.quantization.linear import QuantizedLinear, quantize_modules
from plug.quantization.scheme import Scheme

PROMPT, OUT = 510, 128  # with [CLS] and [SEP] 512
# Seconds of rest before each precision, so that none is measured on a card that another has heated.
COOLING = 8
NAMES = {16: "bf16", 8: "8bit", 4: "int4"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--preset", default="27b", choices=list(PRESETS))
    parser.add_argument("--bits", type=int, nargs="+", choices=[16, 8, 4], help="default: all")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32], help="end to end")
    parser.add_argument("--steps-of", type=int, nargs="*", default=[], help="more batches: a step")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-peer", action="store_true")
    parser.add_argument("--peer-static", action="store_true")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--ids", type=int, default=0, help="texts whose likeliest ids are told")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    arguments.prompt, arguments.out = PROMPT, OUT
    if arguments.tiny:
        arguments.preset, arguments.device, arguments.no_peer = "test", "cpu", True
        arguments.prompt, arguments.out = 24, 8
    # The tiny model's layers are too narrow for 4 bits.
    arguments.bits = arguments.bits or ([16, 8] if arguments.tiny else [16, 8, 4])
    with start_processes(arguments.device) as processes:
        measure_all(arguments, processes)


def measure_all(arguments: argparse.Namespace, processes: Processes) -> None:
    device = processes.device
    torch.manual_seed(0)

    line: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "processes": processes.world_size,
        "preset": arguments.preset,
        "prompt_tokens": arguments.prompt + 2,
        "tokens": arguments.out,
        "ceilings": ceilings(device),
        "results": {},
    }
    if not arguments.no_peer:
        line["peer"] = measure_peer(arguments, device)
        free()
    for bits in arguments.bits:
        time.sleep(COOLING if device.type == "cuda" else 0)
        line["results"][NAMES[bits]] = measure(bits, arguments, processes)
        if processes.is_first:
            shown = {key: x for key, x in line["results"][NAMES[bits]].items() if key != "ids"}
            print(NAMES[bits], json.dumps(shown), flush=True)
            if arguments.output:  # what is known so far
                arguments.output.write_text(json.dumps(line) + "\n", encoding="utf-8")
        free()
    if not processes.is_first:
        return
    line |= {"date": date.today().isoformat(), "plug": __version__, "torch": torch.__version__}
    text = json.dumps(line, ensure_ascii=False)
    if arguments.output:
        arguments.output.write_text(text + "\n", encoding="utf-8")
    else:
        print(text)


def ceilings(device: torch.device) -> dict[str, float]:
    """What the card's memory does, TB/s: a large copy (read and written), a large read."""
    if device.type != "cuda":
        return {}
    source = torch.empty(2**30, device=device).normal_()
    target = torch.empty_like(source)
    moved = source.numel() * 4 / 1e12
    found = {
        "copy_tb_per_s": 2 * moved / seconds(lambda: target.copy_(source), 10),
        "read_tb_per_s": moved / seconds(lambda: source.sum(), 10),
    }
    return {name: round(value, 3) for name, value in found.items()}


@torch.inference_mode()
def measure(bits: int, arguments: argparse.Namespace, processes: Processes) -> dict[str, Any]:
    """One precision of ours."""
    prompt, out = arguments.prompt, arguments.out
    settings = GenerationSettings(
        out_length=out, min_length=out, temperature=0.9, top_k=20, repetition_penalty=1.0
    )
    reset_peak()
    began = time.perf_counter()
    model = random_model(PRESETS[arguments.preset], bits, processes)
    prepared = PreparedModel(model)
    found: dict[str, Any] = {"prepared_s": round(time.perf_counter() - began, 1)}
    if processes.is_first:
        print(f"{bits} bits: prepared after {found['prepared_s']} s", flush=True)
    config = model.config
    rules = PlugRules(config, out, out, out, range(5))
    generator = torch.Generator().manual_seed(1)
    count = max(64, *arguments.batches)
    prompts = torch.randint(5, config.num_emitted_tokens, (count, prompt), generator=generator)
    sources = [[2, *each, 3] for each in prompts.tolist()]
    runner: ModelRunner | None = None

    def written(batch: int) -> None:
        assert runner is not None
        scheduler = Scheduler(batch, ahead=runner.ahead)
        sequences = [Sequence(each, rules, settings, 7) for each in prompts[:batch].tolist()]
        for sequence in sequences:
            scheduler.join(sequence)
        while scheduler.running:
            scheduler.update(runner.step(scheduler.plan()))
        assert all(len(sequence.written) == out for sequence in sequences)

    for batch in arguments.batches:
        runner = None  # its memory is free before the next one's is taken
        runner = ModelRunner(prepared, Size(batch, prompt + 2, out))
        written(batch)  # makes the graphs
        times = [seconds(partial(written, batch), 1) for _ in range(arguments.rounds)]
        found[f"batch{batch}_tokens_per_s"] = round(batch * out / statistics.median(times), 1)
        found[f"batch{batch}_range"] = [round(batch * out / t, 1) for t in (max(times), min(times))]
        if batch == 1:
            found["peak_gb"] = peak_gb()
        encoded = seconds(partial(prepared.model.encode, sources[:batch]), 5, rest=0.5)
        found[f"batch{batch}_encoder_ms"] = round(1e3 * encoded, 2)
    found["peak_gb_all"] = peak_gb()
    runner = None
    if arguments.ids:
        found["ids"] = likeliest(prepared, sources[: arguments.ids], out)
    if prepared.device.type != "cuda":  # nothing to be said of its bandwidth
        return found
    read_by_weights = step_bytes(model, bits, processes)
    found["steps"] = {}
    for batch in [*arguments.batches, *arguments.steps_of]:
        took = step_seconds(prepared, sources[:batch], out)
        cache = 2 * 2 * config.num_decoder_layers * config.hidden_size * batch * (512 + OUT // 2)
        cache //= processes.world_size
        read = read_by_weights + cache
        found["steps"][str(batch)] = {
            "ms": round(1e3 * took, 3),
            "gb_read": round(read / 1e9, 2),
            "tb_per_s": round(read / took / 1e12, 2),
        }
    return found


def likeliest(
    prepared: PreparedModel, sources: list[list[int]], out: int
) -> list[dict[str, list[float]]]:
    """For each source the likeliest ids, one after the other, and their leads over the second."""
    runner = ModelRunner(prepared, Size(len(sources), len(sources[0]), out))
    runner.start(sources)
    tokens = torch.full((len(sources), 1), prepared.config.decoder_start_token_id)
    tokens = tokens.to(prepared.device)
    found: list[dict[str, list[float]]] = [{"ids": [], "leads": []} for _ in sources]
    for position in range(out):
        positions = torch.full_like(tokens, position)
        logits = prepared.model.decode(tokens, positions, position + 1, runner.cache)
        best = logits[:, -1].float().topk(2)
        tokens = best.indices[:, :1].clone()
        leads = (best.values[:, 0] - best.values[:, 1]).tolist()
        for row, (token, lead) in enumerate(zip(tokens[:, 0].tolist(), leads, strict=True)):
            found[row]["ids"].append(token)
            found[row]["leads"].append(round(lead, 5))
    return found


def step_seconds(prepared: PreparedModel, sources: list[list[int]], out: int) -> float:
    """A step in the middle of the window, as a graph, without sampling."""
    runner = ModelRunner(prepared, Size(len(sources), len(sources[0]), out))
    runner.start(sources)
    tokens = torch.full((len(sources), 1), 9, device=prepared.device)
    positions = torch.full_like(tokens, out // 2)

    def step() -> torch.Tensor:
        return prepared.model.decode(tokens, positions, out // 2 + 1, runner.cache)

    step()  # compiles the kernels
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        step()
    took = seconds(graph.replay, 30)
    graph.reset()  # NCCL waits for graphs before the processes part
    return took


def step_bytes(model: Plug, bits: int, processes: Processes) -> int:
    """Weights that a step reads, in bytes: all of the decoder but what projects the source."""
    assert model.decoder is not None
    kept = {name for name, _ in model.decoder.named_modules() if "cross_attention.k_proj" in name}
    kept |= {name for name, _ in model.decoder.named_modules() if "cross_attention.v_proj" in name}
    tensors = [*model.decoder.named_parameters(), *model.decoder.named_buffers()]
    read = sum(t.numel() * t.element_size() for n, t in tensors if n.rpartition(".")[0] not in kept)
    words = model.embeddings.word_embeddings.weight
    return read + words.numel() * (2 if bits == 16 else 1) // processes.world_size


def random_model(config: Any, bits: int, processes: Processes) -> Plug:
    """A model, or this process's shard of one, with random weights, made on the device.

    Tensors are drawn whole, one at a time, so that shards are parts of the same weights whatever
    the number of processes.
    """
    with torch.device("meta"):
        model = Plug(config)
        if bits < 16:
            quantize_modules(model, Scheme.of(bits))
    device = processes.device
    if device.type == "cuda":
        model.bfloat16()
    in_8_bits = {
        name for name, part in model.named_modules()
        if isinstance(part, QuantizedLinear) and part.scheme.bits == 8
    }  # fmt: skip
    generator = torch.Generator(device)
    shards = {}
    for number, (name, whole) in enumerate(model.state_dict().items()):
        layer, _, own = name.rpartition(".")
        dtype = torch.float32 if own == "scale" and layer in in_8_bits else whole.dtype
        tensor = torch.empty(whole.shape, dtype=dtype, device=device)
        fill(name, tensor, bits, generator.manual_seed(number))
        slices = shard_slices(name, tuple(whole.shape), processes)
        if processes.world_size > 1 and slices:
            tensor = tensor[slices].clone()
        shards[name] = tensor
    if processes.world_size == 1:
        model.load_state_dict(shards, assign=True)
    else:
        shard_model(model, shards, processes)
    return model.requires_grad_(False).eval()


def fill(name: str, tensor: torch.Tensor, bits: int, generator: torch.Generator) -> None:
    """Give a tensor of a model its values; weights have a standard deviation of 0.02."""
    units = {"scale": 0.02 / (73.6 if bits == 8 else 4.61), "center": 0.02 / 9.22}
    own = name.rpartition(".")[2]
    if tensor.dtype == torch.int8:
        tensor.random_(-127, 128, generator=generator)
    elif tensor.dtype == torch.uint8:
        tensor.random_(0, 256, generator=generator)
    elif own in units:
        tensor.fill_(units[own])
    elif "norm" in name:
        tensor.fill_(1.0 if own == "weight" else 0.0)
    elif tensor.ndim == 1:
        tensor.zero_()
    else:
        tensor.normal_(std=0.02, generator=generator)


def measure_peer(arguments: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """`transformers`, the same work."""
    import transformers
    from transformers import MBartConfig, MBartForConditionalGeneration

    ours = PRESETS[arguments.preset]
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
    )
    config._attn_implementation = "sdpa"
    with torch.device("meta"):
        model = MBartForConditionalGeneration(config)
    model.bfloat16().to_empty(device=device).eval().requires_grad_(False)
    model.tie_weights()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.ndim == 1 or name.endswith("final_logits_bias"):
            tensor.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
        elif tensor.is_floating_point():
            tensor.normal_(std=0.02)
    found: dict[str, Any] = {"transformers": transformers.__version__}
    ids = torch.randint(5, config.vocab_size, (32, PROMPT + 2), device=device)

    def written(batch: int, **options: Any) -> None:
        with torch.inference_mode():
            out = model.generate(
                input_ids=ids[:batch],
                attention_mask=torch.ones_like(ids[:batch]),
                do_sample=True,
                top_k=20,
                temperature=0.9,
                num_beams=1,
                max_new_tokens=OUT,
                min_new_tokens=OUT,
                **options,
            )
        assert out.shape == (batch, OUT + 1)

    cases = {f"batch{batch}": (batch, {}) for batch in arguments.batches}
    if arguments.peer_static:
        cases["batch1_static"] = (1, {"cache_implementation": "static"})
    for name, (batch, options) in cases.items():
        for _ in range(2):
            written(batch, **options)
        times = [seconds(partial(written, batch, **options), 1) for _ in range(arguments.rounds)]
        found[f"{name}_tokens_per_s"] = round(batch * OUT / statistics.median(times), 1)
    with torch.inference_mode():
        encoded = seconds(partial(model.get_encoder(), ids[:1]), 5, rest=0.5)
        found["encoder_ms"] = round(1e3 * encoded, 2)
    found["peak_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
    return found


def seconds(call: Callable[[], Any], times: int, rest: float = 0.0) -> float:
    """Median seconds of ``call``, with the device idle before and after.

    Args:
        call: what to time.
        times: how often; above 1, after one more that does not count.
        rest: seconds before each: large products heat the card, which then slows down.
    """
    found = []
    for _ in range(times + 1 if times > 1 else 1):
        synchronize()
        time.sleep(rest)
        began = time.perf_counter()
        call()
        synchronize()
        found.append(time.perf_counter() - began)
    return statistics.median(found[1:] or found)


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def reset_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def peak_gb() -> float:
    """What PyTorch had allocated at most, in GB; 0 on a CPU."""
    used = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    return round(used / 1e9, 2)


def free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()

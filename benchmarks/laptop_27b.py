"""The 27B in 4 bits on a CPU: memory, tokens a second, and the share of what the memory allows.

    python benchmarks/laptop_27b.py --folder /tmp/plug-27b-int4        # writes 14 GB first, once
    python benchmarks/laptop_27b.py --folder /tmp/small --preset mini  # the same on a small shape

Random 4-bit weights of the 27B's shape are written as a model directory, since a real one in 16
bits and its quantised form would need 66 GB of disk. Then one text: 64 source tokens in, 64 out,
through `plug.load` and the decoding engine. `read_gb_per_s` is what all cores read together, summed
by the same library's products of one row with a large 8-bit weight. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from dataclasses import replace
from datetime import date
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from machine import processor

import plug
from plug.checkpoints.directory import find_model_directory, write_configs
from plug.checkpoints.weights import TensorSpec, WeightWriter
from plug.files import new_directory
from plug.generation.model_runner import ModelRunner, PreparedModel, Size
from plug.generation.scheduler import Scheduler
from plug.generation.sequence import Sequence
from plug.generation.settings import GenerationSettings
from plug.generation.window import PlugRules
from plug.kernels.cpu.products import CpuProduct
from plug.loading.estimate import Room
from plug.model.configuration import PRESETS, PlugConfig
from plug.model.plug import Plug
from plug.quantization.linear import quantized_names
from plug.quantization.scheme import Scheme
from plug.tokenization import PlugTokenizer

SOURCE, TARGET = 64, 64
SCHEME = Scheme.of(4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--preset", default="27b", choices=list(PRESETS))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if not arguments.folder.exists():
        write_random(arguments.folder, PRESETS[arguments.preset])
    found = measure_directory(arguments.folder)
    line = {
        "laptop_27b": found,
        "preset": arguments.preset,
        "threads": arguments.threads,
        "source_tokens": SOURCE,
        "tokens": TARGET,
        "processor": processor(),
        "date": date.today().isoformat(),
        "plug": plug.__version__,
        "torch": torch.__version__,
    }
    text = json.dumps(line, ensure_ascii=False)
    if arguments.output:
        arguments.output.write_text(text + "\n", encoding="utf-8")
    print(text)


def measure_directory(folder: Path) -> dict[str, float]:
    """Memory, speed and share of the bandwidth of the model in ``folder``."""
    bandwidth = read_bandwidth()
    began = time.perf_counter()
    model = plug.load(folder, room=Room(1, SOURCE, TARGET))
    prepared = PreparedModel(model)
    found = {"load_s": round(time.perf_counter() - began, 1)} | measure(prepared)
    step_bytes = step_weight_bytes(model)
    return found | {
        "gb_a_token": round(step_bytes / 1e9, 3),
        "read_gb_per_s": round(bandwidth / 1e9, 1),
        "share_of_bandwidth": round(found["tokens_per_s"] * step_bytes / bandwidth, 3),
        "peak_rss_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, 2),
    }


def write_random(folder: Path, config: PlugConfig) -> None:
    """A model directory whose 4-bit layers are random; about as large as trained ones would be.

    It has the tokenizer of the shipped model, so that `plug generate` takes it.
    """
    tokenizer, shipped = PlugTokenizer.load(find_model_directory()), plug.load().config
    ids = ("pad", "unk", "decoder_start", "eos", "mask")
    own = {f"{name}_token_id": getattr(shipped, f"{name}_token_id") for name in ids}
    config = replace(config, **own, num_emitted_tokens=shipped.num_emitted_tokens)
    with torch.device("meta"):
        model = Plug(config)
    layers = set(quantized_names(model))
    specs: dict[str, TensorSpec] = {}
    for name, tensor in model.state_dict().items():
        layer, _, kind = name.rpartition(".")
        if layer in layers and kind == "weight":
            for own, (dtype, shape) in SCHEME.tensors(*tensor.shape).items():
                specs[f"{layer}.{own}"] = TensorSpec(dtype, shape)
        else:
            specs[name] = TensorSpec(torch.bfloat16, tuple(tensor.shape))
    generator = np.random.default_rng(0)
    scale = 0.00707 / 4.61  # of integers 0 to 15, so that weights have the reference's deviation
    with new_directory(folder) as temporary:
        with WeightWriter(temporary, specs) as writer:
            for name, spec in specs.items():
                if spec.dtype == torch.uint8:
                    values = torch.from_numpy(
                        generator.integers(0, 256, spec.shape, dtype=np.uint8)
                    )
                elif name.endswith(".scale") or name.endswith(".center"):
                    of = scale if name.endswith(".scale") else scale / 2
                    values = torch.full(spec.shape, of, dtype=spec.dtype)
                elif "norm" in name and name.endswith("weight"):
                    values = torch.ones(spec.shape, dtype=spec.dtype)
                elif name.endswith("bias"):
                    values = torch.zeros(spec.shape, dtype=spec.dtype)
                else:
                    values = torch.randn(spec.shape).mul_(0.00707).to(spec.dtype)
                writer.write(name, values)
        write_configs(temporary, config, specs, SCHEME.to_dict())
        tokenizer.save(temporary, model_max_length=config.max_source_length)


def read_bandwidth() -> float:
    """Bytes a second that all threads read together, the best of five passes over 2 GB."""
    weight = torch.empty(2**18, 2**13, dtype=torch.int8).fill_(1)
    multiply = CpuProduct(weight, None, torch.ones(2**18))
    x = torch.ones(1, 2**13)
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        multiply(x)
        seconds.append(time.perf_counter() - began)
    return weight.nbytes / min(seconds)


@torch.inference_mode()
def measure(prepared: PreparedModel) -> dict[str, float]:
    """One text twice: the first pass reads the file, the second is measured."""
    config = prepared.config
    settings = GenerationSettings(out_length=TARGET, min_length=TARGET, do_sample=False)
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(300, config.num_emitted_tokens, (SOURCE - 2,), generator=generator)
    rules = PlugRules(config, TARGET, TARGET, TARGET, range(5))
    found: dict[str, float] = {}
    for name in ("first", "second"):
        runner = ModelRunner(prepared, Size(1, SOURCE, TARGET))
        scheduler = Scheduler(1, ahead=runner.ahead)
        sequence = Sequence(prompt.tolist(), rules, settings, 0)
        scheduler.join(sequence)
        times = [time.perf_counter()]
        while scheduler.running:
            ids = runner.step(scheduler.plan())
            scheduler.update(ids)
            times.append(time.perf_counter())
        assert len(sequence.written) == TARGET
        steps = sorted(later - earlier for earlier, later in pairwise(times[1:]))
        step = steps[len(steps) // 2]
        found = {
            "tokens_per_s": round(1 / step, 2),
            "prompt_s": round(times[1] - times[0] - step, 2),
            "text_s": round(times[-1] - times[0], 2),
            **({} if name == "first" else {"first_pass_s": found["text_s"]}),
        }
    return found


def step_weight_bytes(model: Plug) -> int:
    """What a step reads: the decoder's quantised layers without those of the source, the head."""
    assert model.decoder is not None
    total = model.config.vocab_size * (model.config.hidden_size + 4)  # the word table in 8 bits
    for name, buffer in model.decoder.named_buffers():
        if not any(part in name for part in ("cross_attention.k_proj", "cross_attention.v_proj")):
            total += buffer.nbytes
    return total


if __name__ == "__main__":
    main()

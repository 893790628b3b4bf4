"""Decoding in 4 bits on a CPU beside llama.cpp: its T5 architecture in q4_0, at equal widths.

    pip install llama-cpp-python gguf            # compiles llama.cpp for this machine
    python benchmarks/laptop_llama.py --folder /tmp/llama        # writes 11 GB first, once

The 27B's widths with 4 encoder and 6 decoder layers, so that both fit 24 GB; random weights. (The
T5 has 6 encoder layers: llama.cpp 0.3.36 loads none that has fewer than the decoder. Only steps are
timed.) T5 has no biases and no positions in its input, and q4_0 has 4.5 bits a weight where ours
has 4.25; so what is compared is the bytes of weights that a second of decoding reads (`ratio`), not
tokens alone. A pair is some steps of ours, then some of llama.cpp's. The last line is JSON.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import median

import numpy as np
import torch
from laptop_27b import step_weight_bytes, write_random
from machine import processor

import plug
from plug.generation.model_runner import ModelRunner, PreparedModel, Size
from plug.loading.estimate import Room
from plug.model.configuration import PRESETS, PlugConfig

ENCODER_LAYERS = 4
SOURCE = 64
BLOCK = 32  # weights of q4_0 that share a scale in float16
BUCKETS = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--preset", default="27b", choices=list(PRESETS))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    found = measure(arguments)
    line = {
        "llama_cpp": found,
        "preset": arguments.preset,
        "threads": arguments.threads,
        "processor": processor(),
        "date": time.strftime("%Y-%m-%d"),
        "plug": plug.__version__,
        "torch": torch.__version__,
    }
    text = json.dumps(line, ensure_ascii=False)
    if arguments.output:
        arguments.output.write_text(text + "\n", encoding="utf-8")
    print(text)


def measure(arguments: argparse.Namespace) -> dict[str, object]:
    """Write both models where they are missing, and compare their steps."""
    config = replace(PRESETS[arguments.preset], num_hidden_layers=ENCODER_LAYERS)
    ours = arguments.folder / f"{arguments.preset}-plug"
    theirs = arguments.folder / f"{arguments.preset}-t5-q4_0.gguf"
    if not ours.exists():
        write_random(ours, config)
    if not theirs.exists():
        write_gguf(theirs, replace(config, num_hidden_layers=config.num_decoder_layers))
    return compare(ours, theirs, arguments)


def compare(ours: Path, theirs: Path, arguments: argparse.Namespace) -> dict[str, object]:
    """Seconds of a step of each, in turn, and the ratio of bytes a second pair by pair."""
    model = plug.load(ours, room=Room(1, SOURCE, SOURCE))
    step_of_ours, bytes_of_ours = _ours(model), step_weight_bytes(model)
    with _llama(theirs, model.config, arguments.threads) as step_of_theirs:
        bytes_of_theirs = _step_bytes(theirs)
        runs = {"plug": step_of_ours, "llama_cpp": step_of_theirs}
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        cpu_seconds: dict[str, list[float]] = {name: [] for name in runs}
        for number in range(arguments.pairs + 1):
            for name, step in runs.items():
                began, cpu_began = time.perf_counter(), time.process_time()
                for _ in range(arguments.steps):
                    step()
                if number:  # the first pair reads the files
                    spent = time.perf_counter() - began
                    seconds[name].append(spent / arguments.steps)
                    spent = time.process_time() - cpu_began
                    cpu_seconds[name].append(spent / arguments.steps)
    by_bytes = bytes_of_ours / bytes_of_theirs
    ratios, cpu_ratios = (
        [by_bytes * b / a for a, b in zip(each["plug"], each["llama_cpp"], strict=True)]
        for each in (seconds, cpu_seconds)
    )
    return {
        "ratio": round(median(ratios), 2),
        "ratio_least_and_most": [round(min(ratios), 2), round(max(ratios), 2)],
        "ratio_of_cpu_seconds": round(median(cpu_ratios), 2),
        "tokens_per_s": {name: round(1 / median(each), 2) for name, each in seconds.items()},
        "gb_a_token": {
            "plug": round(bytes_of_ours / 1e9, 3),
            "llama_cpp": round(bytes_of_theirs / 1e9, 3),
        },
        "pairs": arguments.pairs,
        "llama_cpp_python": _version(),
    }


@torch.inference_mode()
def _ours(model: plug.Plug) -> Callable[[], None]:
    runner = ModelRunner(PreparedModel(model), Size(1, SOURCE, 256))
    runner.start([[2, *range(8, 6 + SOURCE), 3]])
    position = 0

    def step() -> None:
        nonlocal position
        runner.logits([9], [position])
        position += 1

    return step


# --- llama.cpp ------------------------------------------------------------------------------------


def write_gguf(path: Path, config: PlugConfig) -> None:
    """A T5 of our widths in q4_0, random; norms and the positions' biases in float32."""
    import gguf

    tensors = dict(_tensors(config))
    writer = gguf.GGUFWriter(None, "t5")
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    writer.add_context_length(512)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_decoder_block_count(config.num_decoder_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_relative_attn_buckets_count(BUCKETS)
    writer.add_decoder_start_token_id(2)
    q4_0 = gguf.GGMLQuantizationType.Q4_0
    for name, shape in tensors.items():
        if _is_quantized(shape, name):
            rows, columns = shape
            packed = (rows, columns // BLOCK * 18)
            size = rows * packed[1]
            writer.add_tensor_info(name, packed, np.dtype(np.uint8), size, raw_dtype=q4_0)
        else:
            size = int(np.prod(shape)) * 4
            writer.add_tensor_info(name, shape, np.dtype(np.float32), size)
    generator = np.random.default_rng(0)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    writer.write_header_to_file(partial)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, shape in tensors.items():
        writer.write_tensor_data(_values(generator, name, shape))
    writer.close()
    partial.replace(path)


def _values(
    generator: np.random.Generator, name: str, shape: tuple[int, ...]
) -> np.ndarray[tuple[int, ...], np.dtype[np.generic]]:
    if not _is_quantized(shape, name):
        return np.full(shape, 0 if "rel_b" in name else 1, np.float32)
    rows, columns = shape
    blocks = generator.integers(0, 256, (rows, columns // BLOCK, 18), dtype=np.uint8)
    blocks[..., :2] = np.array([0.00707 / 4.61], np.float16).view(np.uint8)
    return blocks.reshape(rows, -1)


def _is_quantized(shape: tuple[int, ...], name: str) -> bool:
    return len(shape) == 2 and "rel_b" not in name


def _tensors(config: PlugConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes (out, in) as llama.cpp has them."""
    hidden, inner = config.hidden_size, config.intermediate_size
    yield "token_embd.weight", (config.vocab_size, hidden)
    for part, layers in (("enc", config.num_hidden_layers), ("dec", config.num_decoder_layers)):
        for layer in range(layers):
            at = f"{part}.blk.{layer}."
            for kind in ("attn", "cross_attn")[: 1 + (part == "dec")]:
                yield f"{at}{kind}_norm.weight", (hidden,)
                for name in "qkvo":
                    yield f"{at}{kind}_{name}.weight", (hidden, hidden)
            if layer == 0:
                yield f"{at}attn_rel_b.weight", (BUCKETS, config.num_attention_heads)
            yield f"{at}ffn_norm.weight", (hidden,)
            yield f"{at}ffn_up.weight", (inner, hidden)
            yield f"{at}ffn_down.weight", (hidden, inner)
        yield f"{part}.output_norm.weight", (hidden,)


def _step_bytes(path: Path) -> int:
    """What a step reads: the decoder without the source's keys and values, the word table."""
    import gguf

    tensors = gguf.GGUFReader(path).tensors
    source = ("cross_attn_k.weight", "cross_attn_v.weight")
    return sum(
        int(each.n_bytes)
        for each in tensors
        if each.name.startswith(("dec.", "token_embd")) and not each.name.endswith(source)
    )


@contextmanager
def _llama(path: Path, config: PlugConfig, threads: int) -> Iterator[Callable[[], None]]:
    """A function that decodes one token after a source of `SOURCE` was read."""
    import llama_cpp

    silent = llama_cpp.llama_log_callback(lambda *_: None)
    llama_cpp.llama_log_set(silent, None)
    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_model_load_from_file(
        str(path).encode(), llama_cpp.llama_model_default_params()
    )
    assert model, f"llama.cpp does not take {path}"
    options = llama_cpp.llama_context_default_params()
    options.n_ctx, options.n_batch, options.n_ubatch = 512, 512, 512
    options.n_threads = options.n_threads_batch = threads
    context = llama_cpp.llama_init_from_model(model, options)
    assert context, "llama.cpp made no context"

    def run(act: Callable[..., int], ids: list[int]) -> None:
        tokens = (ctypes.c_int32 * len(ids))(*ids)
        failed = act(context, llama_cpp.llama_batch_get_one(tokens, len(ids)))
        assert not failed, f"llama.cpp returned {failed}"

    run(llama_cpp.llama_encode, [2, *range(8, 6 + SOURCE), 3])

    def step() -> None:
        run(llama_cpp.llama_decode, [9])
        logits = llama_cpp.llama_get_logits_ith(context, -1)
        assert np.isfinite(np.ctypeslib.as_array(logits, (config.vocab_size,))).all()

    try:
        yield step
    finally:
        llama_cpp.llama_free(context)
        llama_cpp.llama_model_free(model)


def _version() -> str:
    import llama_cpp

    return llama_cpp.__version__


if __name__ == "__main__":
    main()

"""Tokens a second on a CPU, batch 1: ours, `transformers` generate() and CTranslate2, in one run.

    pip install ".[benchmark]"
    python benchmarks/decode_cpu.py --threads 1

All run the weights of one model (plug-mini-zh), greedily, 64 source tokens in, 128 out, encoder
included. The runs take turns, so that whatever else the machine does meets all of them; the figures
are medians. `tokens_per_cpu_s` counts the seconds that the process had the processor: with one
thread it is nearly the figure of a machine that does nothing else. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import ctranslate2
import numpy as np
import torch
import transformers
from ctranslate2.specs import common_spec, transformer_spec
from machine import processor

import plug
from plug.checkpoints.directory import find_model_directory
from plug.generation.model_runner import ModelRunner, PreparedModel, Size
from plug.generation.scheduler import Scheduler
from plug.generation.sequence import Sequence
from plug.generation.settings import GenerationSettings
from plug.generation.window import PlugRules
from plug.quantization.convert import quantize_directory

SOURCE, TARGET = 64, 128
Run = Callable[[], list[int]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    generator = torch.Generator().manual_seed(0)
    config = plug.load().config
    prompt = torch.randint(300, config.vocab_size, (SOURCE - 2,), generator=generator).tolist()
    source = [config.decoder_start_token_id, *prompt, config.eos_token_id]
    with tempfile.TemporaryDirectory() as folder:
        runs = _runs(Path(folder), source, arguments.threads)
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        cpu_seconds: dict[str, list[float]] = {name: [] for name in runs}
        written = {name: run() for name, run in runs.items()}  # warms up
        for _ in range(arguments.rounds):
            for name, run in runs.items():
                start, cpu_start = time.perf_counter(), time.process_time()
                run()
                cpu_seconds[name].append(time.process_time() - cpu_start)
                seconds[name].append(time.perf_counter() - start)
    speed = {name: TARGET / statistics.median(times) for name, times in seconds.items()}
    best = max(speed[name] for name in speed if name.startswith("plug_"))
    print(
        json.dumps(
            {
                "tokens_per_s": {name: round(each, 1) for name, each in speed.items()},
                "tokens_per_cpu_s": {
                    name: round(TARGET / statistics.median(times), 1)
                    for name, times in cpu_seconds.items()
                },
                "slowest_and_fastest": {
                    name: [round(TARGET / each(times), 1) for each in (max, min)]
                    for name, times in seconds.items()
                },
                "ratio_to_ctranslate2_int8": round(best / speed["ctranslate2_int8"], 2),
                "ratio_to_transformers_fp32": round(best / speed["transformers_fp32"], 2),
                "ratios_of_plug_fp32": {
                    name: round(speed["plug_fp32"] / speed[name], 2)
                    for name in ("ctranslate2_int8", "transformers_fp32")
                },
                "same_tokens_as_plug_fp32": {
                    name: _agreement(ids, written["plug_fp32"]) for name, ids in written.items()
                },
                "source_tokens": SOURCE,
                "tokens": TARGET,
                "threads": arguments.threads,
                "rounds": arguments.rounds,
                "processor": processor(),
                "date": time.strftime("%Y-%m-%d"),
                "plug": plug.__version__,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "ctranslate2": ctranslate2.__version__,
            }
        )
    )


def _agreement(ids: list[int], others: list[int]) -> int:
    """Tokens before the first difference."""
    pairs = zip(ids, others, strict=True)
    return next((at for at, (one, other) in enumerate(pairs) if one != other), len(ids))


def _runs(folder: Path, source: list[int], threads: int) -> dict[str, Run]:
    model = plug.load()
    quantize_directory(find_model_directory(), folder / "int8", bits=8)
    quantize_directory(find_model_directory(), folder / "int4", bits=4)
    _write_ctranslate2(model, folder / "ctranslate2")
    return {
        "plug_fp32": _ours(model, source),
        "plug_int8": _ours(plug.load(folder / "int8"), source),
        "plug_int4": _ours(plug.load(folder / "int4"), source),
        "transformers_fp32": _transformers(source),
        "ctranslate2_fp32": _ctranslate2(folder / "ctranslate2", source, "float32", threads),
        "ctranslate2_int8": _ctranslate2(folder / "ctranslate2", source, "int8", threads),
    }


def _ours(model: plug.Plug, source: list[int]) -> Run:
    runner = ModelRunner(PreparedModel(model), Size(1, len(source), TARGET))
    rules = PlugRules(model.config, TARGET, TARGET, min_length=TARGET)
    settings = GenerationSettings(do_sample=False)

    def run() -> list[int]:
        sequence = Sequence(source[1:-1], rules, settings, seed=0)
        scheduler = Scheduler(1)
        scheduler.join(sequence)
        while scheduler.running:
            scheduler.update(runner.step(scheduler.plan()))
        return sequence.written

    return run


def _transformers(source: list[int]) -> Run:
    model = plug.PlugForConditionalGeneration.from_pretrained(
        find_model_directory(), dtype=torch.float32
    ).eval()
    input_ids = torch.tensor([source])
    # The model's own settings have a penalty, for drawing.
    options = {"do_sample": False, "repetition_penalty": 1.0}
    options |= {"max_new_tokens": TARGET, "min_new_tokens": TARGET}

    def run() -> list[int]:
        written = model.generate(input_ids, attention_mask=torch.ones_like(input_ids), **options)
        return written[0, 1:].tolist()

    return run


def _ctranslate2(folder: Path, source: list[int], compute_type: str, threads: int) -> Run:
    translator = ctranslate2.Translator(
        str(folder), device="cpu", compute_type=compute_type, intra_threads=threads
    )
    tokens = [[f"<{index}>" for index in source]]

    def run() -> list[int]:
        [result] = translator.translate_batch(
            tokens, beam_size=1, max_decoding_length=TARGET, min_decoding_length=TARGET
        )
        return [int(token[1:-1]) for token in result.hypotheses[0]]

    return run


def _write_ctranslate2(model: plug.Plug, folder: Path) -> None:
    """The same weights as a CTranslate2 model."""
    config = model.config
    state = {name: tensor.float().numpy() for name, tensor in model.state_dict().items()}

    def norm(spec: common_spec.LayerNormSpec, name: str) -> None:
        spec.gamma, spec.beta = state[f"{name}.weight"], state[f"{name}.bias"]

    def linear(spec: common_spec.LinearSpec, *names: str) -> None:
        spec.weight = np.concatenate([state[f"{name}.weight"] for name in names])
        spec.bias = np.concatenate([state[f"{name}.bias"] for name in names])

    spec = transformer_spec.TransformerSpec.from_config(
        (config.num_hidden_layers, config.num_decoder_layers),
        config.num_attention_heads,
        activation=common_spec.Activation.GELU,
        layernorm_embedding=True,
    )
    token_type = state["embeddings.token_type_embeddings.weight"][0]
    words = state["embeddings.word_embeddings.weight"]
    for side, embeddings in (
        (spec.encoder, spec.encoder.embeddings[0]),
        (spec.decoder, spec.decoder.embeddings),
    ):
        embeddings.weight, side.scale_embeddings = words, False
        positions = state["embeddings.position_embeddings.weight"] + token_type
        side.position_encodings.encodings = positions
        norm(side.layernorm_embedding, "embeddings.layer_norm")
    norm(spec.encoder.layer_norm, "encoder.final_norm")
    norm(spec.decoder.layer_norm, "decoder.final_norm")
    spec.decoder.projection.weight = words
    for part, layers in (("encoder", spec.encoder.layer), ("decoder", spec.decoder.layer)):
        own = "attention" if part == "encoder" else "self_attention"
        for index, layer in enumerate(layers):
            prefix = f"{part}.layers.{index}"
            attention = layer.self_attention
            norm(attention.layer_norm, f"{prefix}.{own}_norm")
            linear(attention.linear[0], *(f"{prefix}.{own}.{each}_proj" for each in "qkv"))
            linear(attention.linear[1], f"{prefix}.{own}.out_proj")
            if part == "decoder":
                cross, name = layer.attention, f"{prefix}.cross_attention"
                norm(cross.layer_norm, f"{name}_norm")
                linear(cross.linear[0], f"{name}.q_proj")
                linear(cross.linear[1], f"{name}.k_proj", f"{name}.v_proj")
                linear(cross.linear[2], f"{name}.out_proj")
            norm(layer.ffn.layer_norm, f"{prefix}.feed_forward_norm")
            linear(layer.ffn.linear_0, f"{prefix}.feed_forward.fc1")
            linear(layer.ffn.linear_1, f"{prefix}.feed_forward.fc2")
    vocabulary = [f"<{index}>" for index in range(config.vocab_size)]
    spec.register_source_vocabulary(vocabulary)
    spec.register_target_vocabulary(vocabulary)
    start, end = f"<{config.decoder_start_token_id}>", f"<{config.eos_token_id}>"
    spec.config.bos_token, spec.config.eos_token = start, end
    spec.config.decoder_start_token, spec.config.unk_token = start, f"<{config.unk_token_id}>"
    spec.config.add_source_bos = spec.config.add_source_eos = False
    spec.validate()
    folder.mkdir()
    spec.save(str(folder))


if __name__ == "__main__":
    main()

"""A decoding step of the 27B, with kernels that overlap and fetch ahead, and without: in turn.

    python benchmarks/steps_in_turn.py --bits 4

A card that has worked for some seconds is slower. So all kinds are captured as graphs first, and
replayed in turn: heat counts alike for all. Prints one JSON line, last.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

import torch
from decode_27b import OUT, PROMPT, random_model

from plug.distributed.processes import Processes
from plug.generation.model_runner import ModelRunner, PreparedModel, Size
from plug.kernels import launch, packed_linear
from plug.model.configuration import PRESETS

# By name: whether kernels overlap, and how many times the usual bytes they fetch ahead.
KINDS = {"apart": (False, 0.0), "overlapping": (True, 0.0), "half": (True, 0.5)}
KINDS |= {"usual": (True, 1.0), "twice": (True, 2.0)}


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--preset", default="27b", choices=list(PRESETS))
    parser.add_argument("--bits", type=int, default=4, choices=[16, 8, 4])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=60)
    arguments = parser.parse_args()
    device = torch.device("cuda", torch.cuda.current_device())
    torch.manual_seed(0)

    config = PRESETS[arguments.preset]
    prepared = PreparedModel(random_model(config, arguments.bits, Processes(0, 1, device)))
    runner = ModelRunner(prepared, Size(arguments.batch, PROMPT + 2, OUT))
    sources = torch.randint(5, config.num_emitted_tokens, (arguments.batch, PROMPT + 2)).tolist()
    runner.start(sources)
    tokens = torch.full((arguments.batch, 1), 9, device=device)
    positions = torch.full_like(tokens, OUT // 2)

    def step() -> torch.Tensor:
        return prepared.model.decode(tokens, positions, OUT // 2 + 1, runner.cache)

    kinds = {name: captured(step, prepared.model, *kind) for name, kind in KINDS.items()}
    times: dict[str, list[float]] = {name: [] for name in kinds}
    for _ in range(arguments.rounds):
        pairs = []
        for graph, _ in kinds.values():
            began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            graph.replay()  # after the one before it, which has filled the caches
            began.record()
            graph.replay()
            ended.record()
            pairs.append((began, ended))
        torch.cuda.synchronize()
        for name, (began, ended) in zip(kinds, pairs, strict=True):
            times[name].append(began.elapsed_time(ended))
        time.sleep(0.02)
    expected = kinds["apart"][1]
    line = {
        "device": torch.cuda.get_device_name(),
        "bits": arguments.bits,
        "batch": arguments.batch,
        "ms": {name: round(statistics.median(each), 4) for name, each in times.items()},
        "same_bits": all(torch.equal(logits, expected) for _, logits in kinds.values()),
        "torch": torch.__version__,
    }
    print(json.dumps(line))


def captured(step: Any, model: Any, overlaps: bool, ahead: float) -> tuple[Any, torch.Tensor]:
    """A graph of the step of this kind, and its logits."""
    real, usual = launch.overlaps, {}
    for weight in weights(model):
        usual[weight] = weight._prefetch
        weight._prefetch = int(weight._prefetch * ahead) // 16 * 16
    if not overlaps:
        launch.overlaps = lambda _device: False
    step()  # compiles the kernels
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = step()
    launch.overlaps = real
    for weight, size in usual.items():
        weight._prefetch = size
    graph.replay()
    return graph, logits.clone()


def weights(model: Any) -> list[packed_linear.PackedLinear]:
    """All that a step multiplies with."""
    layers = [vars(layer).values() for layer in model._decoder_layers]
    found = [each for values in layers for each in values]
    return [each for each in [*found, model._head] if isinstance(each, packed_linear.PackedLinear)]


if __name__ == "__main__":
    main()

"""Attention of a step of pre-training on one card: PyTorch's backends and our own kernels, in turn.

    python benchmarks/attention.py --out benchmarks/results/attention.json

The shapes are those of `configs/mini-stage1.toml` and `configs/mini-stage2.toml`: each layer's
attention alone, forward and backward, the gradients put side by side as the projections want them.
`ms` has both passes of each case. `step_ms` is what all layers take in a step, averaged over the
lengths by their weights. Our kernels run with several sizes of blocks; `best` names the fastest.
Prints one JSON line, last. About 90 s, of which a third compiles, in several processes. `--tiny`
shows on a CPU that it works.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import cache, partial
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

if "--tiny" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"

import torch
from machine import processor
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from plug.kernels import training_attention as kernels
from plug.model.configuration import PRESETS

HERE = Path(__file__).resolve().parent.parent
MINI = PRESETS["mini"]
TINY = {1: [[9, 1.0]], 2: [[9, 12, 1.0]]}
PARTS = ("forward", "backward")
CHOICES = {  # queries, keys, warps, registers, stages
    "forward": [
        (64, 64, 4, 128, 2),
        (128, 64, 4, 208, 2),
        (64, 128, 4, 168, 2),
        (128, 128, 8, 160, 2),
    ],
    "backward": [
        (64, 64, 4, 168, 2),
        (64, 64, 4, 208, 2),
        (64, 64, 4, 168, 3),
        (128, 128, 8, 255, 2),
    ],
    "backward, keys in one block": [
        (64, 64, 4, 168, 2),
        (64, 64, 4, 208, 2),
        (128, 128, 8, 255, 2),
    ],
}


class Case(NamedTuple):
    """Attention of one kind at one length: ``share`` of the layers of a step is one of these."""

    stage: int
    rows: int
    tgt: int
    src: int
    kind: str  # "encoder", "decoder" or "cross"
    layers: int
    share: float  # of the steps


def cases(tiny: bool) -> Iterator[Case]:
    for stage in (1, 2):
        with (HERE / "configs" / f"mini-stage{stage}.toml").open("rb") as file:
            settings = tomllib.load(file)
        for *lengths, share in TINY[stage] if tiny else settings["shapes"]:
            rows = 2 if tiny else settings["batch_tokens"] // sum(lengths)
            src, tgt = lengths[0], lengths[-1]
            yield Case(stage, rows, src, src, "encoder", MINI.num_hidden_layers, share)
            if stage == 2:
                yield Case(stage, rows, tgt, tgt, "decoder", MINI.num_decoder_layers, share)
                yield Case(stage, rows, tgt, src, "cross", MINI.num_decoder_layers, share)


class Inputs(NamedTuple):
    leaves: list[Tensor]  # side by side, or query and a projection of keys and values
    gradient: Tensor


def inputs(case: Case, device: str) -> Inputs:
    hidden = MINI.hidden_size
    sizes = [(case.tgt, 3)] if case.kind != "cross" else [(case.tgt, 1), (case.src, 2)]
    dtype = torch.bfloat16 if device == "cuda" else torch.float16
    leaves = [
        torch.randn(case.rows, n, times * hidden, device=device, dtype=dtype, requires_grad=True)
        for n, times in sizes
    ]
    gradient = torch.randn(case.rows, case.tgt, hidden, device=device, dtype=dtype)
    return Inputs(leaves, gradient)


def ours(case: Case, leaves: list[Tensor]) -> Tensor:
    if case.kind != "cross":
        context, _ = kernels.attend(
            leaves[0], None, None, MINI.head_dim, case.kind == "decoder", 0.0, None
        )
        return context
    key, value = leaves[1].chunk(2, dim=-1)
    context, _ = kernels.attend(leaves[0], key, value, MINI.head_dim, False, 0.0, None)
    return context


def heads(case: Case, leaves: list[Tensor]) -> list[Tensor]:
    parts = leaves[0].chunk(3, dim=-1)
    if case.kind == "cross":
        parts = (leaves[0], *leaves[1].chunk(2, dim=-1))
    return [each.unflatten(-1, (-1, MINI.head_dim)).transpose(1, 2) for each in parts]


def pytorch(case: Case, leaves: list[Tensor]) -> Tensor:
    context = F.scaled_dot_product_attention(*heads(case, leaves), is_causal=case.kind == "decoder")
    return context.transpose(1, 2).flatten(2)


def chosen(case: Case, device: str) -> str:
    """The backend that PyTorch takes here by itself."""
    leaves, _ = inputs(case._replace(rows=1), device)
    is_causal = case.kind == "decoder"
    number = torch._fused_sdp_choice(*heads(case, leaves), None, 0.0, is_causal)
    return str(SDPBackend(number)).split(".")[-1]


def flexible(case: Case, leaves: list[Tensor]) -> Tensor:
    compiled, mask = _flexible(case.kind == "decoder", case.tgt)
    context: Tensor = compiled(*heads(case, leaves), block_mask=mask)
    return context.transpose(1, 2).flatten(2)


@cache
def _flexible(is_causal: bool, length: int) -> tuple[Callable[..., Tensor], Any]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    torch._functorch.config.donated_buffer = False  # the backward pass is timed several times

    def sees(_: Tensor, __: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return i >= j

    mask = create_block_mask(sees, None, None, length, length) if is_causal else None
    return torch.compile(flex_attention), mask


def milliseconds(action: Callable[[], object], device: str) -> float:
    if device == "cuda":
        from triton.testing import do_bench

        return float(do_bench(action, warmup=4, rep=16, return_mode="median"))
    began = perf_counter()
    action()
    return (perf_counter() - began) * 1e3


def measure(
    attend: Callable[[Case, list[Tensor]], Tensor],
    case: Case,
    device: str,
    within: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> tuple[float, float]:
    """Milliseconds forward and backward."""
    leaves, gradient = inputs(case, device)
    with within():
        forward = milliseconds(lambda: attend(case, leaves), device)
        context = attend(case, leaves)
        backward = milliseconds(
            lambda: torch.autograd.grad(context, leaves, gradient, retain_graph=True), device
        )
    return round(forward, 3), round(backward, 3)


def differences(case: Case, device: str) -> float:
    """How far ours is from float32, as a multiple of how far PyTorch is: context and gradients."""
    leaves, gradient = inputs(case._replace(rows=2), device)

    def everything(attend: Callable[..., Tensor], leaves: list[Tensor]) -> list[Tensor]:
        context = attend(case, leaves)
        return [context, *torch.autograd.grad(context, leaves, gradient.to(context.dtype))]

    exact = everything(pytorch, [each.detach().float().requires_grad_() for each in leaves])
    found = (everything(each, leaves) for each in (ours, pytorch))
    apart = [[float((x - y).norm()) for x, y in zip(each, exact, strict=True)] for each in found]
    return max(x / max(y, 1e-9) for x, y in zip(*apart, strict=True))


def choose(name: str, choice: tuple[int, ...]) -> None:
    kernels._SHAPES[name] = kernels._Shape(*choice)


def compile_all(every: list[Case], name: str, number: int, device: str) -> None:
    """Fill Triton's cache with what one choice needs."""
    choose(name, CHOICES[name][number])
    for case in every:
        leaves, gradient = inputs(case._replace(rows=1), device)
        torch.autograd.grad(ours(case, leaves), leaves, gradient)


def totals(rows: dict[str, tuple[float, float]], every: list[Case]) -> dict[str, float]:
    """A step's milliseconds, if ``rows`` has every case."""
    found: dict[str, float] = {}
    for case in every:
        if label(case) not in rows:
            return {}
        for part, value in zip(PARTS, rows[label(case)], strict=True):
            key = f"stage{case.stage}_{part}"
            found[key] = round(found.get(key, 0) + case.layers * case.share * value, 3)
    return found


def label(case: Case) -> str:
    return f"{case.kind} {case.rows}x{case.tgt}x{case.src}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tiny", action="store_true", help="two short sequences, on the CPU")
    parser.add_argument("--seconds", type=float, default=95, help="FlexAttention only before this")
    parser.add_argument("--compile", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help="write the result here as well")
    arguments = parser.parse_args()
    began = perf_counter()
    device = "cpu" if arguments.tiny else "cuda"
    every = list(cases(arguments.tiny))
    if arguments.compile:
        compile_all(every, arguments.compile[0], int(arguments.compile[1]), device)
        return
    sizes = [(name, n) for name, choices in CHOICES.items() for n in range(len(choices))]
    if not arguments.tiny:
        compiling = [
            subprocess.Popen([sys.executable, __file__, "--compile", name, str(n)])
            for name, n in sizes
        ]
        failed = [sizes[i] for i, each in enumerate(compiling) if each.wait()]
        sizes = [each for each in sizes if each not in failed]
    result: dict[str, Any] = {"torch": torch.__version__, "machine": processor()}
    result |= {"compiled_s": round(perf_counter() - began), "ms": {}, "step_ms": {}}
    if device == "cuda":
        result["device"] = torch.cuda.get_device_name()
        result["failed"] = [list(each) for each in failed]
    result["pytorch_s_choice"] = {label(case): chosen(case, device) for case in every}
    result["error_over_pytorch_s"] = {
        label(case): round(differences(case, device), 2) for case in every
    }

    def note(name: str, rows: dict[str, tuple[float, float]]) -> None:
        result["ms"][name], result["step_ms"][name] = rows, totals(rows, every)
        print(name, result["step_ms"][name] or rows, f"{perf_counter() - began:.0f} s", flush=True)

    run = partial(measure, device=device)
    note("pytorch", {label(c): run(pytorch, c) for c in every})
    usual = dict(kernels._SHAPES)
    best: dict[str, dict[str, tuple[float, str]]] = {}
    for name, number in sizes:
        choice = CHOICES[name][number]
        kernels._SHAPES.update(usual)
        choose(name, choice)
        rows = {label(c): run(ours, c) for c in every}
        note(f"ours, {name} {choice}", rows)
        part = "forward" if name == "forward" else "backward"
        for case, times in rows.items():
            found = (times[PARTS.index(part)], f"{name} {choice}")
            best.setdefault(case, {})[part] = min(found, best.get(case, {}).get(part, found))
    result["best"] = best
    kernels._SHAPES.update(usual)
    if device == "cuda":
        flash = partial(sdpa_kernel, SDPBackend.FLASH_ATTENTION)
        note("flash", {label(c): run(pytorch, c, within=flash) for c in every})
        rows = {}
        for case in [c for c in every if c.kind != "cross" and c.tgt in (384, 512)]:
            if perf_counter() - began < arguments.seconds:
                rows[label(case)] = run(flexible, case)
        note("flex_attention", rows)
    result["seconds"] = round(perf_counter() - began)
    line = json.dumps(result)
    if arguments.out:
        arguments.out.write_text(line + "\n", encoding="utf-8")
    print(line)


if __name__ == "__main__":
    main()

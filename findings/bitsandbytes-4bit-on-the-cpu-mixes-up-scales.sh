#!/usr/bin/env bash
# Expected: dequantize_4bit gives back what quantize_4bit took, to within 4 bits: off by about 9% of the norm in NF4, whatever the shape, and on the
#   CPU as on a GPU. Shapes that the kernel cannot do fall back to a slower way.
# Happens (bitsandbytes 0.50.2, on a CPU with AVX-512): a block of 64 numbers has one scale, and blocks go on from one row to the next where rows are
#   no multiple of 64. The vectorised kernel looks for the scales as if each row began with a block. For rows of 16, 32, 48, 80, 96, 160, … numbers
#   (multiples of 16 and not of 64), values come out with another row's scale. The stored numbers and scales are right. Linear4bit computes with
#   it, so that a layer with 96 inputs is off by more than half where rows differ in size; where all rows are alike, as in a new layer, it does not
#   show. Rows of 40, 100 or 312 take another path and are right, as are multiples of 64; blocksize=128 needs multiples of 128.
# Hurts: whoever tests QLoRA or NF4 with small models on the CPU (hidden size 32 or 96): errors like those of a wrong conversion. And models with such
#   widths: TinyBERT's feed-forward layers (1200), the Chinese TinyBERT_4L among them. A CPU without AVX-512 cannot show it.
set -euo pipefail
grep -q -m1 avx512f /proc/cpuinfo || { echo "needs a CPU with AVX-512"; exit 3; }
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet bitsandbytes==0.50.2 torch==2.13.0 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'P'
import bitsandbytes
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit

torch.manual_seed(0)


def off(found, expected):
    return round(float((found - expected).norm() / expected.norm()), 3)


def by_hand(packed, state, shape):
    """The numbers that are stored, each times the scale of its block."""
    codes = torch.stack([packed.flatten() >> 4, packed.flatten() & 15], 1).flatten()[: shape.numel()].long()
    return (state.code[codes] * state.absmax.repeat_interleave(state.blocksize)[: shape.numel()]).view(shape)


def layer(weight, inputs):
    linear = bitsandbytes.nn.Linear4bit(weight.shape[1], weight.shape[0], bias=False, quant_type="nf4", compute_dtype=torch.float32)
    linear.load_state_dict({"weight": weight})
    return linear.to("cpu")(inputs)


print("bitsandbytes", bitsandbytes.__version__, "torch", torch.__version__)
for blocksize in (64, 128):
    wrong, right = [], []
    for columns in (16, 32, 40, 48, 64, 96, 100, 128, 160, 192, 256, 312, 320, 1200):
        weight = torch.randn(8, columns) * torch.logspace(-1, 1, 8)[:, None]  # rows of unlike sizes
        packed, state = quantize_4bit(weight, quant_type="nf4", blocksize=blocksize)
        exact = by_hand(packed, state, weight.shape)
        assert off(exact, weight) < 0.15, "it changed"
        (wrong if off(dequantize_4bit(packed, state), exact) > 0.02 else right).append(columns)
    print(f"blocks of {blocksize}: wrong with {wrong} columns, right with {right}")
    assert all(columns % 16 == 0 and columns % blocksize for columns in wrong), "it changed"
    assert {40, 100, 312, 128, 256} <= set(right) and {96, 160, 1200} <= set(wrong) and ((64 in right) == (blocksize == 64)), "it changed"
for columns in (96, 128):
    weight, inputs = torch.randn(40, columns) * torch.logspace(-1, 1, 40)[:, None], torch.randn(5, columns)
    packed, state = quantize_4bit(weight, quant_type="nf4")
    exact = inputs @ by_hand(packed, state, weight.shape).T
    found = off(layer(weight, inputs), inputs @ weight.T)
    print(f"Linear4bit with {columns} inputs: off by {found}; by hand from the same stored numbers {off(exact, inputs @ weight.T)}")
    assert (found > 0.3) == (columns == 96) and off(exact, inputs @ weight.T) < 0.15, "it changed"
P

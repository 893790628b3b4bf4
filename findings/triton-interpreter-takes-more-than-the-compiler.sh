#!/usr/bin/env bash
# Expected: a kernel that runs under TRITON_INTERPRET=1 and gives the right result also compiles for a GPU, since the interpreter stands for
#   the compiler on machines without one.
# Happens (triton 3.9.0, torch 2.13.0): the interpreter lets a name change its shape in a loop, and have another type after each branch of
#   an `if`. The compiler refuses both (CompilationError), whatever the GPU. Nothing warns of it in the interpreter.
# Hurts: whoever tests Triton kernels in CI without a GPU: the tests pass, and the first run on a card fails. `triton.compile` with a
#   GPUTarget needs no GPU and shows it, as below.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 triton==3.9.0 numpy==2.4.6
cat >"$folder/kernels.py" <<'P'
import sys

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def add_up(x, out, n: tl.constexpr):
    total = 0.0  # a number, and sixteen of them from the first pass on
    for start in range(0, n, 16):
        total += tl.load(x + start + tl.arange(0, 16))
    tl.store(out + tl.arange(0, 16), total)


@triton.jit
def branch(x, out, n):
    i = tl.arange(0, 16)
    if n > 8:
        y = tl.load(x + i)
    else:
        y = tl.load(x + i).to(tl.float16)
    tl.store(out + i, y)


@triton.jit
def plain(x, out, n: tl.constexpr):
    total = tl.zeros([16], tl.float32)
    for start in range(0, n, 16):
        total += tl.load(x + start + tl.arange(0, 16))
    tl.store(out + tl.arange(0, 16), total)


if sys.argv[1] == "interpret":
    x = torch.arange(32.0)
    for kernel, value, expected in ((add_up, 32, x[:16] + x[16:]), (branch, 5, x[:16]), (plain, 32, x[:16] + x[16:])):
        out = torch.zeros(16)
        kernel[(1,)](x, out, value)
        print(f"interpreted {kernel.__name__}: right: {torch.equal(out, expected)}")
else:
    print("torch", torch.__version__, "triton", triton.__version__)
    pointers = {"x": "*fp32", "out": "*fp32"}
    for kernel, constants in ((add_up, {"n": 32}), (branch, {}), (plain, {"n": 32})):
        signature = pointers | {"n": "constexpr" if constants else "i32"}
        try:
            triton.compile(ASTSource(fn=kernel, signature=signature, constexprs=constants), target=GPUTarget("cuda", 90, 32))
            print(f"compiled {kernel.__name__}: yes")
        except Exception as error:
            print(f"compiled {kernel.__name__}: {type(error).__name__}: {str(error).splitlines()[-1]}")
P
TRITON_CACHE_DIR="$folder/cache" TRITON_INTERPRET=0 "$folder/venv/bin/python" -W ignore "$folder/kernels.py" compile | tee "$folder/found"
TRITON_INTERPRET=1 "$folder/venv/bin/python" -W ignore "$folder/kernels.py" interpret | tee -a "$folder/found"
for line in "compiled add_up: CompilationError" "compiled branch: CompilationError" "compiled plain: yes" \
  "interpreted add_up: right: True" "interpreted branch: right: True" "interpreted plain: right: True"; do
  grep -q "^$line" "$folder/found" || { echo "changed: no line '$line'"; exit 1; }
done

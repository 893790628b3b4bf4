"""Kernels that Triton's interpreter runs are also what its compiler takes, for a card not there."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="needs triton, which PyTorch for CUDA brings along")

# The interpreter lets a name have one shape before a loop and another in it; the compiler does not.
PROGRAM = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from plug.kernels import adafactor, adamw8bit

BLOCKS = {"EIGHT": True, "BLOCK": 256, "ROWS": 8}
TILE = {"ROWS": 128, "COLUMNS": 1024, "STEP": 8}
BFLOAT16 = ("weight", "gradient")
CODES = ("first_kept", "second_kept")
INTEGERS = ("rows", "columns", "across", "down", "blocks", "tiles", "size", "key", "start")
FLOATS = ("rate", "gained", "lost", "limit", "tiny", "eps", "first_by", "second_by")
FLOATS += ("gained_first", "gained_second")
for kernel, constants in {
    adafactor._squares: TILE,
    adafactor._moments: {"BLOCK": 128, "AT_ONCE": 32},
    adafactor._weighted_square: {"SUMS": 256, **TILE},
    adafactor._apply: {"SUMS": 256, "TILES": 2048, "ROUNDS": True, **TILE},
    adafactor._vector: {"BLOCK": 4096},
    adamw8bit._squares: BLOCKS,
    adamw8bit._apply: {"HAS_MASTER": False, "ROUNDS": True, **BLOCKS},
}.items():
    kinds = {name: "*fp32" for name in kernel.arg_names}
    kinds |= {name: "*bf16" for name in BFLOAT16 if name in kinds}
    kinds |= {name: "*u8" for name in CODES if name in kinds}
    kinds |= {name: "i32" for name in INTEGERS if name in kinds}
    kinds |= {name: "fp32" for name in FLOATS if name in kinds}
    kinds |= dict.fromkeys(constants, "constexpr")
    source = ASTSource(fn=kernel, signature=kinds, constexprs=constants)
    triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8})
    print(kernel.__name__)
"""

TRAINING = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from plug.kernels import training

HALVES = ("x", "y", "gradient", "residual", "activated")
FLOATS = ("a", "b", "u", "thin", "out", "of_a", "of_b")
for rank in (16, 255):
    for name, most in (
        ("project", 64), ("outer", 64), ("expand", 64), ("through_gelu", 64),
        ("back_through_gelu", 32),
    ):
        shape = training._SHAPES[name]
        kernel = getattr(training, "_" + name)
        columns = training._columns(shape, rank, most)
        constants = {"DROP": True, "RANK": training._whole(rank), "ROWS": shape.rows}
        constants |= {"COLUMNS": columns, "NEXT": constants["RANK"], "GELU": True, "RESIDUAL": True}
        constants = {key: value for key, value in constants.items() if key in kernel.arg_names}
        kinds = {key: "i32" for key in kernel.arg_names}
        kinds |= {key: "*bf16" for key in HALVES if key in kinds}
        kinds |= {key: "*fp32" for key in FLOATS if key in kinds}
        kinds |= {key: "fp32" for key in ("alpha", "scale") if key in kinds}
        kinds |= dict.fromkeys(constants, "constexpr")
        stages = {"project": 4}.get(name, 3)
        compiled = triton.compile(
            ASTSource(fn=kernel, signature=kinds, constexprs=constants),
            target=GPUTarget("cuda", 90, 32),
            options={"num_warps": shape.warps, "num_stages": stages},
        )
        print(name, rank, compiled.metadata.shared)
"""

COLUMNS = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from plug.kernels import training

shape = training._SHAPES["quantize_columns"]
for kernel in (training._largest, training._quantize_columns):
    for of_x in ("*bf16", "*fp32"):
        constants = {"ROWS": shape.rows, "COLUMNS": shape.columns}
        kinds = {key: "i32" for key in kernel.arg_names} | {"x": of_x, "out": "*fp32"}
        if "scale" in kinds:
            kinds |= {"scale": "*fp32", "out": "*fp8e4nv"}
        kinds |= dict.fromkeys(constants, "constexpr")
        triton.compile(
            ASTSource(fn=kernel, signature=kinds, constexprs=constants),
            target=GPUTarget("cuda", 90, 32),
            options={"num_warps": shape.warps},
        )
        print(kernel.__name__, of_x)
"""

# One process for all: the compiler takes seconds to import.
ALL = """
import contextlib, io, json, sys, traceback, warnings
warnings.simplefilter("ignore")
printed = {}
for name, program in json.loads(sys.argv[1]).items():
    with contextlib.redirect_stdout(io.StringIO()) as out:
        try:
            exec(program, {})
        except Exception:
            print(traceback.format_exc())  # the test of this program shows it
    printed[name] = out.getvalue().splitlines()
print(json.dumps(printed))
"""


@pytest.fixture(scope="module")
def printed() -> dict[str, list[str]]:
    """What each program printed."""
    programs = {"fused steps": PROGRAM, "training": TRAINING, "columns": COLUMNS}
    ran = subprocess.run(
        [sys.executable, "-c", ALL, json.dumps(programs)],
        env={**os.environ, "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(ran.stdout)


@pytest.mark.slow
def test_kernels_of_fused_steps_compile(printed: dict[str, list[str]]) -> None:
    assert printed["fused steps"] == [
        "_squares",
        "_moments",
        "_weighted_square",
        "_apply",
        "_vector",
        "_squares",
        "_apply",
    ]


@pytest.mark.slow
def test_training_s_kernels_compile_and_fit_a_card_up_to_their_largest_rank(
    printed: dict[str, list[str]],
) -> None:
    rows = [line.split() for line in printed["training"]]
    assert len(rows) == 10
    for name, rank, shared in rows:
        assert int(shared) <= 232_448, (name, rank)  # bytes that a block of an H100 may have


@pytest.mark.slow
def test_the_kernels_of_columns_in_fp8_compile(printed: dict[str, list[str]]) -> None:
    names = ("_largest", "_quantize_columns")
    expected = [f"{name} {kind}" for name in names for kind in ("*bf16", "*fp32")]
    assert printed["columns"] == expected

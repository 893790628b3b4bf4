"""Two GPUs with a share of the model each write what one GPU writes, and always end."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from plug.generation.generator import generate
from plug.loading.save import save
from plug.model.configuration import PRESETS, PlugConfig
from plug.model.plug import Plug
from plug.tokenization import PlugTokenizer

pytestmark = [pytest.mark.gpu, pytest.mark.multi_gpu]

TEXT, SECONDS = "山上有座庙，", 120
FAILING = Path(__file__).with_name("failing.py")


@pytest.fixture
def directory(
    lively: Callable[[PlugConfig], Plug], tiny_tokenizer: PlugTokenizer, tmp_path: Path
) -> Path:
    config = dataclasses.replace(
        PRESETS["test"], hidden_size=512, num_attention_heads=8, intermediate_size=2048
    )
    save(lively(config), tmp_path / "model", tokenizer=tiny_tokenizer)
    return tmp_path / "model"


# Float32 is computed by the plain model, bfloat16 by the fused one.
each_dtype = pytest.mark.parametrize("dtype", ["float32", "bfloat16"])


def start(*arguments: str, **environment: str) -> subprocess.Popen[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    return subprocess.Popen(
        [sys.executable, *launcher, *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Its exit status, output and errors; it must end within SECONDS."""
    try:
        out, err = process.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return process.returncode, out, err


def options(directory: Path, dtype: str, length: int) -> list[str]:
    given = ["generate", TEXT, "--model", str(directory), "--no-do-sample", "--dtype", dtype]
    return [*given, "--out-length", str(length)]


@each_dtype
def test_they_write_what_one_writes_and_end(dtype: str, directory: Path) -> None:
    status, out, err = finish(start("-m", "plug", *options(directory, dtype, 40)))

    assert status == 0, err
    if dtype == "float32":  # sums of halves round otherwise, and this model has many near-ties
        expected = generate(TEXT, model=directory, device="cuda", out_length=40, do_sample=False)
        assert out == expected.text + "\n"


@each_dtype
@pytest.mark.parametrize("rank", ["0", "1"])
def test_an_error_in_the_middle_ends_all(rank: str, dtype: str, directory: Path) -> None:
    status, _, err = finish(start(str(FAILING), *options(directory, dtype, 40), FAILING_RANK=rank))

    assert status != 0
    assert err.count("错误：显存用完了。") == 1


@each_dtype
def test_an_interruption_ends_all(dtype: str, directory: Path) -> None:
    process = start("-m", "plug", *options(directory, dtype, 100_000))
    assert process.stdout is not None
    assert process.stdout.read(1)  # it is writing

    os.killpg(process.pid, signal.SIGINT)

    assert finish(process)[0] != 0

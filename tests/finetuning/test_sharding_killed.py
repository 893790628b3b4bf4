"""Two processes that `torchrun` starts learn what one learns, also after `kill -9`.

On a CPU and on two GPUs: the same but for the device.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

from safetensors.torch import load_file

from plug.distributed.settings import ParallelSettings
from plug.finetuning.run import finetune
from plug.finetuning.settings import FinetuneSettings

LAUNCHER = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "plug"]
SECONDS = 150

each_device = pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.multi_gpu])]
)


def start(run: FinetuneSettings, device: str, *options: str) -> subprocess.Popen[str]:
    file = Path(f"{run.output}.toml")
    values = {name: value for name, value in run.to_dict().items() if name != "parallel"}
    lines = [f"{name} = {json.dumps(value)}" for name, value in values.items()]
    file.write_text("\n".join([*lines, "[parallel]", 'sharding = "fsdp"']), encoding="utf-8")
    arguments = [sys.executable, *LAUNCHER, "finetune", "--config", str(file), "--device", device]
    return subprocess.Popen(
        [*arguments, *options], stderr=subprocess.PIPE, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def losses(output: str) -> list[float]:
    lines = Path(output, "log.jsonl").read_text(encoding="utf-8").splitlines()
    return [entry["loss"] for entry in map(json.loads, lines) if "loss" in entry]


@pytest.mark.slow
@each_device
@pytest.mark.parametrize(
    ("memory", "precision"),
    [("full", "fp32"), ("lora", "fp32"), ("full", "bf16"), ("lora", "bf16")],
)
def test_two_processes_learn_as_one_and_go_on_after_a_kill(
    memory: str,
    precision: str,
    device: str,
    settings: Callable[..., FinetuneSettings],
    data: Callable[..., Path],
    kill_tree: Callable[[int], None],
    run_together: Callable[..., list[Any]],
    tmp_path: Path,
) -> None:
    if memory == "lora":
        pytest.importorskip("peft")
    if device == "cpu" and (memory, precision) != ("full", "fp32"):
        pytest.skip("test_sharding.py has LoRA, bfloat16 and kills in a save on a CPU")
    options = {"epochs": 4.0, "memory": memory, "lora_dropout": 0.0, "precision": precision}
    train = data("generation")
    one = settings("generation", train, batch_size=4, output=f"{tmp_path}/one", **options)
    finetune(one, device=device)
    two = settings("generation", train, batch_size=2, output=f"{tmp_path}/two", **options)
    process = start(two, device)
    deadline = time.monotonic() + SECONDS
    while not list(tmp_path.glob("two/checkpoints/checkpoint-*/synced")):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    kill_tree(process.pid)
    process.communicate()
    assert not (tmp_path / "two" / "predictions.jsonl").exists()
    if device == "cpu":  # pre-training has `--resume` under torchrun: test_processes.py
        shared = replace(two, parallel=ParallelSettings(sharding="fsdp"))
        run_together(2, "finetune", settings=asdict(shared), resume=True)
    else:
        resumed = start(two, device, "--resume")
        try:
            _, errors = resumed.communicate(timeout=SECONDS)
        except subprocess.TimeoutExpired:
            kill_tree(resumed.pid)
            raise
        assert resumed.returncode == 0, errors
    # Products are in TF32 on a GPU; in bfloat16 the steps of a tiny model part further.
    apart = {"cpu": 1e-5, "cuda": 5e-3}[device] if precision == "fp32" else 5e-2
    assert losses(two.output) == pytest.approx(losses(one.output), abs=apart)
    name = "model.safetensors" if memory == "full" else "adapter_model.safetensors"
    found, expected = load_file(f"{two.output}/{name}"), load_file(f"{one.output}/{name}")
    assert found.keys() == expected.keys()
    for key, tensor in found.items():
        assert tensor.isfinite().all(), key
        assert tensor.any() or not expected[key].any(), key

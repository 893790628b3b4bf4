"""Two GPUs with a shard of each layer each learn what one GPU learns, also after `kill -9`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("transformers")

from safetensors.torch import load_file

from plug.finetuning.run import finetune
from plug.finetuning.settings import FinetuneSettings

pytestmark = [pytest.mark.gpu, pytest.mark.multi_gpu]

LAUNCHER = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "plug"]
SECONDS = 120


def start(run: FinetuneSettings, *options: str) -> subprocess.Popen[str]:
    file = Path(f"{run.output}.json")
    values = {name: value for name, value in run.to_dict().items() if name != "parallel"}
    lines = [f"{name} = {json.dumps(value)}" for name, value in values.items()]
    file.write_text("\n".join([*lines, "[parallel]", 'sharding = "fsdp"']), encoding="utf-8")
    arguments = [sys.executable, *LAUNCHER, "finetune", "--config", str(file), *options]
    return subprocess.Popen(
        arguments, stderr=subprocess.PIPE, text=True, start_new_session=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def losses(output: str) -> list[float]:
    lines = Path(output, "log.jsonl").read_text(encoding="utf-8").splitlines()
    return [entry["loss"] for entry in map(json.loads, lines) if "loss" in entry]


@pytest.mark.parametrize("memory", ["full", "lora"])
def test_two_gpus_learn_as_one_and_go_on_after_a_kill(
    memory: str,
    settings: Callable[..., FinetuneSettings],
    data: Callable[..., Path],
    tmp_path: Path,
) -> None:
    options = {"epochs": 6.0, "memory": memory, "lora_dropout": 0.0, "precision": "fp32"}
    train = data("generation")
    one = settings("generation", train, batch_size=4, output=f"{tmp_path}/one", **options)
    finetune(one, device="cuda")
    two = settings("generation", train, batch_size=2, output=f"{tmp_path}/two", **options)
    process = start(two)
    deadline = time.monotonic() + SECONDS
    while not list(tmp_path.glob("two/checkpoints/checkpoint-*/synced")):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "two" / "predictions.jsonl").exists()
    resumed = start(two, "--resume")
    _, errors = resumed.communicate(timeout=SECONDS)
    assert resumed.returncode == 0, errors
    assert losses(two.output) == pytest.approx(losses(one.output), abs=5e-3)  # TF32
    name = "model.safetensors" if memory == "full" else "adapter_model.safetensors"
    found, expected = load_file(f"{two.output}/{name}"), load_file(f"{one.output}/{name}")
    assert found.keys() == expected.keys()
    assert all(tensor.isfinite().all() for tensor in found.values())

"""The memory of the host: what is free, what a model needs, and a run within that."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from plug.errors import PlugError
from plug.loading import memory
from plug.loading.estimate import Room
from plug.loading.host_memory import free_host_memory
from plug.loading.load import load
from plug.loading.memory import check_host_memory, need_on_cpu
from plug.loading.save import save
from plug.model.configuration import PRESETS, PlugConfig
from plug.model.plug import Plug
from plug.quantization.convert import quantize_directory

GB = 10**9


def write(path: Path, text: str | int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{text}\n")


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """8,000,000 kB available, no limits."""
    write(tmp_path / "proc/meminfo", "MemTotal: 9000000 kB\nMemAvailable:    8000000 kB")
    return tmp_path


def test_what_the_machine_has_available_counts(machine: Path) -> None:
    assert free_host_memory(machine) == 8_000_000 * 1024
    assert free_host_memory(machine / "nothing") is None


def test_the_tightest_of_the_groups_above_counts_in_version_2(machine: Path) -> None:
    write(machine / "proc/self/cgroup", "0::/service/job")
    groups = machine / "sys/fs/cgroup"
    write(groups / "service/memory.max", 5 * GB)
    write(groups / "service/memory.current", 2 * GB)
    write(groups / "service/memory.stat", f"anon 1\ninactive_file {GB}")
    write(groups / "service/job/memory.max", "max")
    write(groups / "service/job/memory.current", GB)

    assert free_host_memory(machine) == 4 * GB  # its cached files give way


def test_groups_of_version_1_and_of_a_container(machine: Path) -> None:
    write(machine / "proc/self/cgroup", "3:cpu:/\n2:memory,hugetlb:/docker/abc\n0::/")
    top = machine / "sys/fs/cgroup/memory"  # in a container the group itself is the top
    write(top / "memory.limit_in_bytes", 3 * GB)
    write(top / "memory.usage_in_bytes", GB)
    write(top / "memory.stat", "total_inactive_file 0")

    assert free_host_memory(machine) == 2 * GB


def test_a_limit_that_is_overdrawn_leaves_nothing(machine: Path) -> None:
    write(machine / "proc/self/cgroup", "0::/")
    write(machine / "sys/fs/cgroup/memory.max", GB)
    write(machine / "sys/fs/cgroup/memory.current", 2 * GB)

    assert free_host_memory(machine) == 0


@pytest.mark.parametrize(
    ("free", "bits", "batch_size", "says"),
    [
        (17, 16, 1, [r"约需 15\d\.\d GB", "可用 17.0 GB", "--bits 4，约需 16.3 GB"]),
        (8, 4, 1, ["约需 16.3 GB", "权重 14.9", "换内存更大的机器"]),
        (18, 4, 64, ["--batch-size 4（现在 64）"]),
    ],
)
def test_what_does_not_fit_is_told_with_what_would(
    free: int, bits: int, batch_size: int, says: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "free_host_memory", lambda: free * GB + 10**7)
    monkeypatch.setattr(memory, "library", lambda: True)

    with pytest.raises(PlugError) as caught:
        check_host_memory(PRESETS["27b"], bits, Room(batch_size=batch_size))

    for word in says:
        assert re.search(word, str(caught.value)), str(caught.value)


def test_without_a_compiler_more_is_needed_and_a_compiler_is_advised(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(memory, "free_host_memory", lambda: 20 * GB)
    monkeypatch.setattr(memory, "library", lambda: None)

    with pytest.raises(PlugError, match=r"apt install g\+\+），约需 16"):
        check_host_memory(PRESETS["27b"], 4, Room())


def test_nothing_is_read_where_it_does_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(Plug(PRESETS["test"]), tmp_path / "model", tokenizer=None)
    weights = next((tmp_path / "model").glob("*.safetensors"))
    header = int.from_bytes(weights.read_bytes()[:8], "little")
    with weights.open("r+b") as stream:  # NaN, which reading would find
        stream.seek(8 + header)
        stream.write(b"\xff" * 64)
    monkeypatch.setattr(memory, "free_host_memory", lambda: 1000)

    with pytest.raises(PlugError, match="内存不够"):
        load(tmp_path / "model")


WITHIN_A_LIMIT = """
import json, re, resource, sys
from pathlib import Path
import torch
from plug.generation.model_runner import ModelRunner, PreparedModel, Size
from plug.loading.estimate import Room
from plug.loading.load import load
from plug.loading.memory import need_on_cpu
from plug.model.configuration import PlugConfig

torch.set_num_threads(1)
small, directory, share = Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3])

@torch.inference_mode()
def write(folder):
    model = load(folder, room=Room(1, 64, 64))
    runner = ModelRunner(PreparedModel(model), Size(1, 64, 64))
    runner.start([[2, *range(8, 70), 3]])
    for position in range(64):
        logits = runner.logits([9], [position])
    return logits.sum().item()

write(small)  # what libraries map at first use is there
used = int(re.search(r"VmSize:\\s*(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
need = need_on_cpu(PlugConfig.from_file(directory / "config.json"), 4, Room(1, 64, 64)).total
limit = used + int(need * share)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
print(json.dumps({"need": need, "sum": write(directory)}))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux")
@pytest.mark.skipif(memory.library() is None, reason="needs a C++ compiler")
def test_a_model_writes_within_what_was_predicted_and_no_less(tmp_path: Path) -> None:
    torch.manual_seed(0)
    shape = {"vocab_size": 4096, "num_emitted_tokens": 4096, "max_position_embeddings": 128}
    config = PlugConfig(
        **shape, hidden_size=768, num_attention_heads=12, intermediate_size=3072,
        num_hidden_layers=4, num_decoder_layers=2,
    )  # fmt: skip
    tiny = PlugConfig(
        **shape, hidden_size=128, num_attention_heads=4, intermediate_size=256,
        num_hidden_layers=1, num_decoder_layers=1,
    )  # fmt: skip
    for name, each in (("small", tiny), ("model", config)):
        save(Plug(each).bfloat16(), tmp_path / f"{name}-16", tokenizer=None)
        quantize_directory(tmp_path / f"{name}-16", tmp_path / name, bits=4)

    def run(share: float) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", WITHIN_A_LIMIT, tmp_path / "small", tmp_path / "model"]
        return subprocess.run(
            [*map(str, command), str(share)], capture_output=True, text=True, check=False
        )

    ran = run(1.02)
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout)["need"] == need_on_cpu(config, 4, Room(1, 64, 64)).total
    too_little = run(0.98)
    assert "内存不够" in too_little.stderr.splitlines()[-1]

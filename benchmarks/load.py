"""How fast a model gets from its files onto a device, and what memory that takes.

    python benchmarks/load.py --folder /tmp/load --preset 27b

Writes a model of random weights in bfloat16 (52 GB for the 27B; kept there with --keep), piece by
piece, then loads it several times, in turn: `cached`, with its files in the system's page cache,
and `cold`, when the cache was asked to let them go (Linux); by `plug.load` with numbers of reading
threads, and, for comparison, by safetensors' own reading to a device. The host's memory is what
the process holds beside mapped files, at its peak and without what it held before (page-locked
buffers of CUDA may not be counted there: they are THREADS * 2 * 16 MiB). The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open

import plug
from plug.checkpoints.directory import weight_shapes, write_configs
from plug.checkpoints.headers import weight_files
from plug.checkpoints.weights import TensorSpec, WeightWriter
from plug.loading import transfer
from plug.loading.load import load
from plug.model.configuration import PRESETS, PlugConfig
from plug.model.plug import Plug

BLOCK = 2**24  # random numbers, which are repeated: 27 billion of them would take minutes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--preset", choices=list(PRESETS), default="27b")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--no-cold", action="store_true", help="leave out the reads from the disk")
    parser.add_argument("--keep", action="store_true", help="leave the model where it is")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)

    model = arguments.folder / arguments.preset
    if not (model / "config.json").is_file():
        _write(model, PRESETS[arguments.preset])
    size = sum(file.stat().st_size for file in weight_files(model))
    ways: dict[str, Callable[[], object]] = {
        f"threads_{count}": _with_threads(count, model, device) for count in arguments.threads
    }
    ways["safetensors"] = lambda: _by_safetensors(model, device)
    torch.zeros(1, device=device)  # the device is awake
    runs: dict[str, dict[str, object]] = {}
    for name, way in ways.items():
        _forget(model)
        if not arguments.no_cold:
            runs[f"{name}_cold"] = _measure(way, size, device)
        _measure(way, size, device)
        runs[f"{name}_cached"] = _measure(way, size, device)
        print(name, runs[f"{name}_cached"], flush=True)
    if not arguments.keep:
        shutil.rmtree(model)
    default = runs.get(f"threads_{transfer.THREADS}_cached", {})
    on_cuda = device.type == "cuda"
    result = {
        "GB": round(size / 1e9, 2),
        **default,  # of `plug.load` as it is
        "runs": runs,
        "preset": arguments.preset,
        "device": torch.cuda.get_device_name(device) if on_cuda else platform.processor(),
        "cpus": os.cpu_count(),
        "date": time.strftime("%Y-%m-%d"),
        "plug": plug.__version__,
        "torch": torch.__version__,
    }
    print(json.dumps(result))


def _write(directory: Path, config: PlugConfig) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    with torch.device("meta"):
        shapes = weight_shapes(Plug(config))
    specs = {name: TensorSpec(torch.bfloat16, shape) for name, shape in shapes.items()}
    block = torch.randn(BLOCK).mul_(config.initializer_range).bfloat16()
    with WeightWriter(directory, specs) as writer:
        for name, spec in specs.items():
            if "norm" in name:
                writer.write(name, torch.full(spec.shape, float(name.endswith("weight"))))
                continue
            row = spec.num_bytes // 2 // spec.shape[0]
            rows = max(1, BLOCK // row)
            for first in range(0, spec.shape[0], rows):
                count = min(rows, spec.shape[0] - first)
                values = block[: count * row].view(count, *spec.shape[1:])
                writer.write(name, values, (slice(first, first + count),))
    write_configs(directory, config, specs)


def _with_threads(count: int, model: Path, device: torch.device) -> Callable[[], object]:
    def run() -> object:
        transfer.THREADS = count
        return load(model, device=device, dtype=torch.bfloat16)

    return run


def _by_safetensors(model: Path, device: torch.device) -> object:
    tensors = {}
    for file in weight_files(model):
        with safe_open(file, framework="pt", device=str(device)) as opened:
            tensors |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    return tensors


def _forget(model: Path) -> None:
    """Ask the system to drop the files from its page cache."""
    for file in weight_files(model):
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def _measure(way: Callable[[], object], size: int, device: torch.device) -> dict[str, object]:
    on_cuda = device.type == "cuda"
    if on_cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    before, peak, done = _host_bytes(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.01):
            peak = max(peak, _host_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    loaded = way()
    if on_cuda:
        torch.cuda.synchronize(device)
    seconds = time.perf_counter() - start
    done.set()
    watcher.join()
    del loaded
    return {
        "seconds": round(seconds, 2),
        "GB_per_s": round(size / seconds / 1e9, 2),
        "peak_host_bytes": max(0, peak - before),
        "peak_gpu_bytes": torch.cuda.max_memory_allocated(device) if on_cuda else 0,
    }


def _host_bytes() -> int:
    """What the process holds in memory, mapped files left out."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    return sum(int(fields[name].split()[0]) for name in ("RssAnon", "RssShmem")) * 1024


if __name__ == "__main__":
    main()

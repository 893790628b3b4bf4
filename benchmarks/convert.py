"""Peak memory and time of `plug convert`, both ways, on a synthetic original checkpoint.

    python benchmarks/convert.py --folder /tmp/convert --hidden-size 2048 --shards 8

Makes float16 shards of random numbers, converts them there and back in processes of their own and
reads the peak resident memory of each (VmHWM of /proc: Linux only). Mapped file pages count while
they are mapped, though the system may drop them: the figure is an upper bound of what is needed.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

import plug
from plug.checkpoints import original_layout as layout
from plug.checkpoints.original_shards import SHARD_FILE, write_shard
from plug.model.configuration import PlugConfig


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--hidden-size", type=int, default=2048)
    parser.add_argument("--shards", type=int, default=8)
    arguments = parser.parse_args()

    source, ours, back = (arguments.folder / name for name in ("original", "ours", "back"))
    shutil.rmtree(arguments.folder, ignore_errors=True)
    size = _make_original(source, arguments.hidden_size, arguments.shards)
    shards = str(arguments.shards)
    commands = {
        "imports_alone": ["--from", str(ours), "--to", str(back)],  # there is nothing to convert
        "to_ours": ["--from", str(source), "--to", str(ours)],
        "to_original": ["--from", str(ours), "--to", str(back), "--to-original", shards],
    }
    results = {name: _measure(command) for name, command in commands.items()}
    shutil.rmtree(arguments.folder)
    result = {
        "plug": plug.__version__,
        "torch": torch.__version__,
        "hidden_size": arguments.hidden_size,
        "shards": arguments.shards,
        "checkpoint_bytes": size,
        "shard_bytes": size // arguments.shards,
        **results,
    }
    print(json.dumps(result))


def _make_original(source: Path, hidden_size: int, num_shards: int) -> int:
    """Shards of a model of 27B's layers and this width; their bytes in all."""
    config = PlugConfig(
        hidden_size=hidden_size,
        intermediate_size=4 * hidden_size,
        num_attention_heads=hidden_size // 64,
        encoder_final_norm_passes=2,
    )
    (source / "model").mkdir(parents=True)
    values = layout.original_config(config, half=True)
    (source / "config.json").write_text(json.dumps(values))
    for rank in range(num_shards):
        torch.manual_seed(rank)
        state = {
            name: torch.full(shape, 0.5, dtype=torch.float16)
            if entry.axis is None
            else torch.randn(shape, dtype=torch.float16)
            for name, entry in layout.tensor_table(config).items()
            if (shape := entry.shard_shape(num_shards))
        }
        write_shard(source / "model" / SHARD_FILE.format(rank), state, num_shards)
    return sum(path.stat().st_size for path in source.rglob("*.pt"))


_RUN = """
import sys
from plug.cli import main
status = main()
print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def _measure(arguments: list[str]) -> dict[str, float]:
    start = time.perf_counter()
    command = [sys.executable, "-c", _RUN, "convert", *arguments]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    seconds = round(time.perf_counter() - start, 2)
    kibibytes = int(done.stdout.rsplit("VmHWM:", 1)[1].split()[0])
    return {"peak_memory_bytes": kibibytes * 1024, "seconds": seconds}


if __name__ == "__main__":
    main()

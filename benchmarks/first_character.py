"""How long `plug generate` takes to its first character, from the start of the command.

    python benchmarks/first_character.py [--runs 5]

Runs the README's first command as a new process each time. The last line is JSON (seconds).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time

PROMPT = "段誉轻挥折扇，摇了摇头，说道：“你师父是你的师父，你师父可不是我的师父。”"


def measure() -> tuple[float, float]:
    """Seconds to the first character and to the end."""
    began = time.perf_counter()
    command = [sys.executable, "-m", "plug", "generate", PROMPT, "--seed", "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.read(1)
        first = time.perf_counter() - began
        process.stdout.read()
    return first, time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=int, default=5)
    runs = [measure() for _ in range(parser.parse_args().runs)]
    names = ("first_character_s", "whole_text_s")
    record = {
        name: {"median": round(statistics.median(times), 2), "worst": round(max(times), 2)}
        for name, times in zip(names, zip(*runs, strict=True), strict=True)
    }
    print(json.dumps({"runs": len(runs), **record}))


if __name__ == "__main__":
    main()

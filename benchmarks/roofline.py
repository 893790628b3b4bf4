"""Plot of decode_27b.json: a step's tokens a second against what memory and arithmetic allow.

    python benchmarks/roofline.py --results benchmarks/results/decode_27b.json \
        --output docs/images/roofline_27b.png

A step of B texts does 2 * weights * B operations and reads the weights once and B caches. The
ceilings are the card's measured copy bandwidth and the bf16 products' 778 TFLOP/s (measured on
8192 x 8192 x 8192, docs/quantization.md). The last line is JSON: each point's share of its ceiling.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

from plug.model import accounting
from plug.model.configuration import PRESETS

TFLOP_PER_S = 778
NAMES = {"bf16": "bf16", "8bit": "8-bit", "int4": "4-bit"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    line = json.loads(arguments.results.read_text(encoding="utf-8"))
    bandwidth = line["ceilings"]["copy_tb_per_s"]
    weights = accounting.step_weights(PRESETS[line["preset"]])

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    shares: dict[str, dict[str, float]] = {}
    for (name, label), color in zip(NAMES.items(), ("C0", "C1", "C2"), strict=True):
        steps = line["results"][name]["steps"]
        batches = sorted(map(int, steps))
        reached = [1e3 * batch / steps[str(batch)]["ms"] for batch in batches]
        by_memory = [batch * bandwidth * 1e3 / steps[str(batch)]["gb_read"] for batch in batches]
        by_products = TFLOP_PER_S * 1e12 / (2 * weights)
        ceiling = [min(each, by_products) for each in by_memory]
        axes.plot(batches, reached, "o-", color=color, label=f"{label}, measured")
        axes.plot(batches, ceiling, "--", color=color, label=f"{label}, memory's ceiling")
        shares[name] = {
            str(batch): round(got / most, 3)
            for batch, got, most in zip(batches, reached, ceiling, strict=True)
        }
    axes.set(
        xscale="log",
        yscale="log",
        xticks=batches,
        xlabel="texts in a step",
        ylabel="tokens a second (steps alone)",
        title=f"PLUG 27B on one {line['device']}, {line['date']}",
    )
    axes.set_xticks(batches, [str(batch) for batch in batches])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(arguments.output, dpi=130)
    print(json.dumps({"share_of_ceiling": shares}))


if __name__ == "__main__":
    main()

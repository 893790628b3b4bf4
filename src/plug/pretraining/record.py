"""The log of a run: a CSV row every few steps, and the loss curves as a PNG."""

from __future__ import annotations

import csv
import logging
import math
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from plug.evaluation.report import new_figure
from plug.files import new_file, sync

logger = logging.getLogger(__name__)

FIELDS = ["step", "tokens", "seconds", "tokens_per_second", "learning_rate", "grad_norm"]
# Model FLOPs as a share of the card's measured product, peak memory of the first process, share of
# the time that was spent waiting for batches, steps passed over so far.
MORE_FIELDS = ["mfu", "memory_gb", "data_wait", "skipped"]


class Record:
    """A CSV file with a row every few steps.

    `log.csv` has `FIELDS`, then the losses by name in nats a prediction, then `MORE_FIELDS`.

    Args:
        path: the file; with ``resume_step`` its rows up to that step stay.
        fields: its columns, `step` first.
        resume_step: the step the run goes on from, 0 for a new run.
    """

    def __init__(self, path: Path, fields: list[str], resume_step: int) -> None:
        self.path, self.fields = path, fields
        required = FIELDS if set(FIELDS) <= set(fields) else fields
        rows = read_rows(path, required) if resume_step else []
        kept = [row for row in rows if row["step"] <= resume_step]
        self.seconds_before = kept[-1].get("seconds", 0.0) if kept else 0.0
        with new_file(path, newline="") as file:
            writer = csv.DictWriter(file, self.fields, restval="", extrasaction="ignore")
            writer.writeheader()
            writer.writerows(kept)

    def add(self, row: dict[str, Any]) -> None:
        """Append a row. A process killed here leaves part of it, which `read_rows` passes over."""
        with self.path.open("a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, self.fields, restval="").writerow(row)

    def sync(self) -> None:
        """Flush the file to the disk."""
        sync(self.path)


def read_rows(path: Path, required: Sequence[str] = FIELDS) -> list[dict[str, float]]:
    """The rows of a `log.csv`, or of a file with other ``required`` columns.

    Numbers are numbers, empty cells are left out.

    A last line without its end is passed over: the run was killed as it wrote it. So are rows that
    are no numbers, with a warning.
    """
    if not path.is_file():
        return []
    whole, _, _ = path.read_text(encoding="utf-8", errors="replace").rpartition("\n")
    rows, broken = [], 0
    for cells in csv.DictReader(whole.replace("\0", "").splitlines()):
        try:
            row = {name: float(value) for name, value in cells.items() if value}
        except (TypeError, ValueError):  # words, or more cells than columns
            row = {}
        if row.keys() >= set(required):
            rows.append(row)
        else:
            broken += 1
    if broken:
        logger.warning("%s 有 %d 行读不懂，已略去。", path, broken)
    return rows


def loss_curves(
    rows: list[dict[str, float]], skipped: Collection[int] = ()
) -> dict[str, list[tuple[float, float]]]:
    """Return (millions of tokens seen, loss) by the loss's name.

    Args:
        rows: of a `log.csv`.
        skipped: steps, from 0, whose losses are left out; others that are not finite are as well.
    """
    others = {*FIELDS, *MORE_FIELDS}
    curves: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if row["step"] - 1 in skipped:
            continue
        for name, value in row.items():
            if name not in others and math.isfinite(value):
                curves.setdefault(name, []).append((row["tokens"] / 1e6, value))
    return curves


def plot_losses(log: Path, image: Path, skipped: Collection[int] = ()) -> None:
    """Draw every loss of a `log.csv` over the tokens seen.

    Args:
        log: the file.
        image: a PNG.
        skipped: as in `loss_curves`.

    Raises:
        ImportError: matplotlib is not installed (extra `train`).
    """
    rows = read_rows(log)
    figure, axes = new_figure(8, 5)
    curves = loss_curves(rows, skipped)
    for name, points in curves.items():
        axes.plot(*zip(*points, strict=True), label=name, linewidth=1)
    # the first steps of a new model may be far above everything that follows: let them run out
    settled = [loss for points in curves.values() for _, loss in points[len(rows) // 50 :]]
    axes.set_ylim(bottom=0, top=1.1 * max(settled, default=1.0))
    axes.set_xlabel("tokens seen (millions)")
    axes.set_ylabel("loss (nats a prediction)")
    if curves:
        axes.legend()
    axes.grid(alpha=0.3)
    figure.tight_layout()
    with new_file(image, "wb") as file:
        figure.savefig(file, dpi=120, format="png")

"""The page that a finished run leaves: its numbers, its curves, and what each process did."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from statistics import mean, median

from plug.evaluation.report import Evaluation, Table, curves_plot, write_report
from plug.pretraining.record import loss_curves, read_rows
from plug.pretraining.settings import RunConfig
from plug.pretraining.watching import PROCESS_FIELDS

_CURVES = {  # columns of the log, a plot each, where they are not 0 all along
    "tokens_per_second": "每秒词元",
    "mfu": "MFU（占实测矩阵乘速度的比例）",
    "grad_norm": "梯度范数",
    "learning_rate": "学习率",
    "memory_gb": "显存峰值（GB）",
    "data_wait": "等数据的时间比例",
}


def is_told(output: Path) -> bool:
    """Return whether a finished run has its page."""
    return (output / "report" / "report.md").is_file()  # written last


def write_page(output: Path, stage: int, config: RunConfig, skipped: list[int]) -> None:
    """Write `OUTPUT/report/report.md` and `.html` from the logs in ``output``.

    Losses of the steps ``skipped`` (from 0) are left out.
    """
    rows = read_rows(output / "log.csv")
    if not rows:
        return
    curves = loss_curves(rows, skipped)
    found = {f"loss_{name}": mean(y for _, y in xy[-5:]) for name, xy in curves.items()}
    # The first row has the compilation in it.
    later = rows[1:] or rows
    for name in ("tokens_per_second", "mfu", "memory_gb", "data_wait"):
        found[name] = float(median(row.get(name, 0.0) for row in later))
    plots = []
    if curves:
        plots = [curves_plot("loss", "损失（每个预测，nats）", curves, "tokens seen (millions)")]
    for name, title in _CURVES.items():
        with_it = [row for row in rows if math.isfinite(row.get(name, math.nan))]
        points = [(row["tokens"] / 1e6, row[name]) for row in with_it]
        if any(value for _, value in points):
            plots.append(curves_plot(name, title, {name: points}, "tokens seen (millions)"))
    evaluation = Evaluation(
        found,
        samples=Table("跳过的步", ("步",), [(step + 1,) for step in skipped]),
        tables=_processes(output),
        plots=plots,
    )
    facts = {"阶段": stage, "步数": int(rows[-1]["step"]), "词元数": int(rows[-1]["tokens"])}
    facts |= dataclasses.asdict(config)
    command = f"plug pretrain stage{stage} --config …  # 设置见下"
    write_report(output / "report", f"预训练第 {stage} 阶段", command, facts, evaluation)


def _processes(output: Path) -> list[Table]:
    """A row for each process, the medians of what it logged."""
    rows = read_rows(output / "processes.csv", PROCESS_FIELDS)
    names = [name for name in PROCESS_FIELDS if name not in ("step", "process")]
    numbers = sorted({int(row["process"]) for row in rows})
    lines = [
        (number, *(median(r[name] for r in rows if r["process"] == number) for name in names))
        for number in numbers
    ]
    return [Table("各进程（中位数）", ("进程", *names), lines)] if lines else []

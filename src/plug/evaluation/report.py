"""A report of an evaluation: Markdown and HTML with the same content, plots as PNG beside them."""

from __future__ import annotations

import html
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plug.errors import install
from plug.files import add_files, plain_errors, write_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

logger = logging.getLogger(__name__)

Cell = str | int | float
MOST_TICKS = 30  # labels along the axes of a matrix; more are numbered by matplotlib


@dataclass(frozen=True, slots=True)
class Table:
    """Rows under a header; floats are shown with four digits."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[Cell]]


@dataclass(frozen=True, slots=True)
class Plot:
    """A picture: `name`.png; ``draw`` is given matplotlib axes. Text in it must be ASCII.

    ``key`` stands below the picture and says what the numbers in it are.
    """

    name: str
    title: str
    draw: Callable[[Axes], None]
    key: str = ""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What an evaluation found: `metrics` by name, shares from 0 to 1, and what shows them."""

    metrics: dict[str, float]
    samples: Table
    tables: list[Table] = field(default_factory=list)
    plots: list[Plot] = field(default_factory=list)


def write_report(
    directory: Path,
    title: str,
    command: str,
    facts: dict[str, Any],
    evaluation: Evaluation,
) -> None:
    """Write `report.md`, `report.html`, `metrics.json` and the plots into a directory.

    Args:
        directory: made if need be; files of an earlier report are replaced.
        title: the heading.
        command: what made it, so that it can be made again.
        facts: settings and circumstances by name.
        evaluation: the results. Tables without rows are left out, and without matplotlib, with a
            warning, the plots.

    Raises:
        PlugError: the directory cannot be written.
    """
    metrics = Table("结果", ("指标", "值"), list(evaluation.metrics.items()))
    circumstances = Table("条件", ("项", "值"), [(key, str(value)) for key, value in facts.items()])
    tables = [metrics, *evaluation.tables, evaluation.samples, circumstances]
    tables = [table for table in tables if table.rows]
    with plain_errors(directory):
        directory.mkdir(parents=True, exist_ok=True)
        plots = evaluation.plots if find_spec("matplotlib") else []
        if len(plots) < len(evaluation.plots):
            logger.warning("报告里没有图。要有图，请安装：%s", install("train"))
        files = {
            "report.md": _markdown(title, command, tables, plots),
            "report.html": _html(title, command, tables, plots),
            "metrics.json": json.dumps(evaluation.metrics, ensure_ascii=False, indent=2) + "\n",
        }
        with add_files(directory, last="report.md") as new:
            for plot in plots:
                _save_plot(plot, new / f"{plot.name}.png")
            for name, content in files.items():
                write_text(new / name, content)


def _shown(cell: Cell) -> str:
    return f"{cell:.4f}" if isinstance(cell, float) else str(cell)


def _markdown(title: str, command: str, tables: list[Table], plots: list[Plot]) -> str:
    parts = [f"# {title}", f"```sh\n{command}\n```"]
    for table in tables:
        lines = [table.header, ["---"] * len(table.header), *table.rows]
        shown = [" | ".join(map(_markdown_cell, line)) for line in lines]
        parts.append(f"## {table.title}\n\n" + "\n".join(f"| {line} |" for line in shown))
    for plot in plots:
        parts.append(f"## {plot.title}\n\n![{plot.title}]({plot.name}.png)")
        if plot.key:
            parts.append(_markdown_cell(plot.key))
    return "\n\n".join(parts) + "\n"


def _markdown_cell(cell: Cell) -> str:
    return _shown(cell).replace("|", "\\|").replace("\n", " ")


_STYLE = (
    "body{font-family:sans-serif;max-width:60em;margin:2em auto;padding:0 1em}"
    "table{border-collapse:collapse}td,th{border:1px solid #ccc;padding:.2em .6em;text-align:left}"
    "pre{background:#f4f4f4;padding:.6em;overflow-x:auto}img{max-width:100%}"
)


def _html(title: str, command: str, tables: list[Table], plots: list[Plot]) -> str:
    parts = [
        '<!doctype html><html lang="zh"><meta charset="utf-8">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style>",
        f"<h1>{html.escape(title)}</h1>",
        f"<pre>{html.escape(command)}</pre>",
    ]
    for table in tables:
        head = "".join(f"<th>{html.escape(cell)}</th>" for cell in table.header)
        rows = [
            "".join(f"<td>{html.escape(_shown(cell))}</td>" for cell in row) for row in table.rows
        ]
        body = "\n".join(f"<tr>{row}</tr>" for row in (head, *rows))
        parts.append(f"<h2>{html.escape(table.title)}</h2>\n<table>\n{body}\n</table>")
    for plot in plots:
        parts.append(f'<h2>{html.escape(plot.title)}</h2>\n<img src="{plot.name}.png" alt="">')
        if plot.key:
            parts.append(f"<p>{html.escape(plot.key)}</p>")
    return "\n".join(parts) + "\n"


def _save_plot(plot: Plot, path: Path) -> None:
    figure, axes = new_figure(7, 5)
    plot.draw(axes)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def new_figure(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure of so many inches and its axes, without a window.

    Raises:
        ImportError: matplotlib is not installed (extra `train`).
    """
    # Where the home cannot be written it warns, in English, of caches that nobody asked for.
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    return figure, figure.subplots()


def ascii_labels(labels: Sequence[str]) -> list[str]:
    """Labels as they can be drawn: matplotlib's own font has no Chinese, so numbers for those."""
    return [label if label.isascii() else str(index) for index, label in enumerate(labels)]


def _key(labels: Sequence[str], every: bool = False) -> str:
    """What the numbers stand for that `ascii_labels` writes (or that stand for every label)."""
    numbered = [f"{i} = {label}" for i, label in enumerate(labels) if every or not label.isascii()]
    return f"图中的编号：{'，'.join(numbered)}。" if numbered else ""


def matrix_plot(name: str, title: str, matrix: list[list[int]], labels: Sequence[str]) -> Plot:
    """A confusion matrix, each row as shares of its sum."""

    def draw(axes: Axes) -> None:
        shares = [[cell / max(1, sum(row)) for cell in row] for row in matrix]
        image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        axes.figure.colorbar(image, ax=axes)
        if len(labels) <= MOST_TICKS:
            axes.set_xticks(range(len(labels)), ascii_labels(labels), rotation=90)
            axes.set_yticks(range(len(labels)), ascii_labels(labels))
        axes.set_xlabel("predicted")
        axes.set_ylabel("answer")

    return Plot(name, title, draw, _key(labels, every=len(labels) > MOST_TICKS))


def bars_plot(name: str, title: str, values: dict[str, float], xlabel: str) -> Plot:
    """A bar a name."""

    def draw(axes: Axes) -> None:
        axes.barh(ascii_labels(list(values)), list(values.values()))
        axes.set_xlabel(xlabel)

    return Plot(name, title, draw, _key(list(values)))


def histogram_plot(name: str, title: str, values: Sequence[float], xlabel: str) -> Plot:
    """How often values fall where."""

    def draw(axes: Axes) -> None:
        axes.hist(values, bins=20)
        axes.set_xlabel(xlabel)
        axes.set_ylabel("examples")

    return Plot(name, title, draw)


def curves_plot(
    name: str, title: str, curves: dict[str, list[tuple[float, float]]], xlabel: str
) -> Plot:
    """Lines through (x, y) points, by name."""

    def draw(axes: Axes) -> None:
        for label, points in curves.items():
            axes.plot(
                *zip(*points, strict=True), label=label, marker="." if len(points) < 30 else ""
            )
        axes.set_xlabel(xlabel)
        axes.grid(alpha=0.3)
        axes.legend()

    return Plot(name, title, draw)

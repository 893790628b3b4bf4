"""A report's files say the same, and nothing in them breaks out of a cell."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from plug.errors import PlugError
from plug.evaluation.report import (
    Evaluation,
    Table,
    bars_plot,
    curves_plot,
    histogram_plot,
    matrix_plot,
    write_report,
)

pytest.importorskip("matplotlib")


def test_cells_are_escaped_and_plots_drawn(tmp_path: Path) -> None:
    evaluation = Evaluation(
        metrics={"accuracy": 1 / 3},
        samples=Table("样例", ("文本",), [("<b>甲</b> | 乙\n丙",)]),
        plots=[
            matrix_plot("matrix", "矩阵", [[3, 1], [0, 0]], ["是", "no"]),
            bars_plot("bars", "条", {"人": 0.5}, "F1"),
            histogram_plot("histogram", "分布", [0.1, 0.2], "F1"),
            curves_plot("curve", "线", {"loss": [(1, 2), (2, 1)]}, "step"),
        ],
    )
    write_report(tmp_path / "new", "标题", "plug …", {"seed": 1}, evaluation)

    markdown = (tmp_path / "new" / "report.md").read_text(encoding="utf-8")
    assert "| <b>甲</b> \\| 乙 丙 |" in markdown
    assert "| accuracy | 0.3333 |" in markdown
    page = (tmp_path / "new" / "report.html").read_text(encoding="utf-8")
    assert "<td>&lt;b&gt;甲&lt;/b&gt; | 乙\n丙</td>" in page
    assert json.loads((tmp_path / "new" / "metrics.json").read_text()) == {"accuracy": 1 / 3}
    for text in (markdown, page):
        assert "图中的编号：0 = 是。" in text  # of the matrix; "no" is drawn as it is
        assert "图中的编号：0 = 人。" in text
        assert text.count("图中的编号") == 2
    for name in ("matrix", "bars", "histogram", "curve"):
        assert f"({name}.png)" in markdown
        assert f'src="{name}.png"' in page
        assert (tmp_path / "new" / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_every_label_of_a_large_matrix_has_its_number_in_the_key() -> None:
    labels = [f"L{index}" for index in range(31)]
    plot = matrix_plot("matrix", "矩阵", [[0] * 31] * 31, labels)
    assert plot.key.startswith("图中的编号：0 = L0，1 = L1，")
    assert plot.key.endswith("30 = L30。")
    assert matrix_plot("matrix", "矩阵", [[0]], ["a"]).key == ""


def test_a_place_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    evaluation = Evaluation(metrics={}, samples=Table("样例", (), []))
    with pytest.raises(PlugError, match="没能写入"):
        write_report(tmp_path / "file", "标题", "plug", {}, evaluation)


def test_a_home_that_cannot_be_written_is_no_matter_for_the_reader() -> None:
    program = "from plug.evaluation.report import new_figure; new_figure(1, 1)"
    environment = {key: value for key, value in os.environ.items() if not key.startswith("XDG_")}
    environment.pop("MPLCONFIGDIR", None)
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=environment | {"HOME": "/dev/null"},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")

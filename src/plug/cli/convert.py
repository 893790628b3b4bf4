"""`plug convert`: the original's checkpoints to our directories, and back."""

from __future__ import annotations

import time
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Precision(StrEnum):
    """What weights can be converted to."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


def convert(
    source: Annotated[Path, typer.Option("--from", help="要读的目录。")],
    target: Annotated[Path, typer.Option("--to", help="要写的目录，须不存在或为空。")],
    dtype: Annotated[
        Precision | None,
        typer.Option(help="所有权重的精度；不给则各张量保持原样。", show_default=False),
    ] = None,
    to_original: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="反过来：写成原版的 N 个分片。", show_default=False),
    ] = None,
) -> None:
    """把原版 PLUG 的权重（model/mp_rank_NN_model_states.pt）转成本项目的目录，或反过来。"""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    from plug.checkpoints.original import export_original, import_original
    from plug.checkpoints.weights import DTYPES

    start = time.perf_counter()
    wanted = None if dtype is None else DTYPES[dtype.value]
    columns = (TextColumn("转换"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task("")

        def advance(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        if to_original is None:
            notes = import_original(source, target, dtype=wanted, progress=advance)
        else:
            notes = export_original(source, target, to_original, dtype=wanted, progress=advance)
    for note in notes:
        print(f"注意：{note}")
    size = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    print(f"已写入 {target}：{size / 1e6:,.1f} MB，用时 {time.perf_counter() - start:.1f} 秒。")

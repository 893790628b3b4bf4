"""`plug convert`: originals and training checkpoints to our directories; to ModelScope's; back."""

from __future__ import annotations

import time
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from plug.cli.options import check_directory
from plug.errors import UsageError
from plug.shipped import SHIPPED_MODEL


class Precision(StrEnum):
    """What weights can be converted to."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


def convert(
    target: Annotated[Path, typer.Option("--to", help="要写的目录，须不存在或为空。")],
    source: Annotated[
        str | None, typer.Option("--from", help="要读的目录。", show_default=False)
    ] = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            "--from-checkpoint",
            help="要读的训练检查点，或训练的输出目录（取其中最新的检查点）。",
            callback=check_directory,
            show_default=False,
        ),
    ] = None,
    dtype: Annotated[
        Precision | None,
        typer.Option(help="所有权重的精度；不给则各张量保持原样。", show_default=False),
    ] = None,
    to_original: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="反过来：写成原版的 N 个分片。", show_default=False),
    ] = None,
    to_modelscope: Annotated[
        bool,
        typer.Option(
            "--to-modelscope", help="写成可以上传到 ModelScope 的目录（原版或本项目的模型）。"
        ),
    ] = False,
) -> None:
    """把原版 PLUG 的权重（model/mp_rank_NN_model_states.pt）转成本项目的目录，或反过来。

    也把训练的检查点变成普通的模型目录（--from-checkpoint）。
    """
    if to_original is not None and to_modelscope:
        raise UsageError("--to-original 和 --to-modelscope 只能给一个。")
    if (source is None) == (checkpoint is None):
        raise UsageError("--from 和 --from-checkpoint 要给一个，也只能给一个。")
    if checkpoint is not None and (to_original is not None or to_modelscope):
        raise UsageError(
            "--from-checkpoint 写成本项目的目录。请先这样转换，再用 --from 转成别的格式。"
        )

    if source not in (None, SHIPPED_MODEL):
        check_directory(Path(str(source)))

    from plug.checkpoints.original import export_original, import_original
    from plug.checkpoints.weights import DTYPES
    from plug.integrations.modelscope_hub import write_hub_directory
    from plug.loading.from_checkpoint import convert_checkpoint
    from plug.progress import byte_counter

    start = time.perf_counter()
    wanted = None if dtype is None else DTYPES[dtype.value]
    with byte_counter("转换") as progress:
        if checkpoint is not None:
            notes = convert_checkpoint(checkpoint, target, dtype=wanted, progress=progress)
        elif to_modelscope:
            notes = write_hub_directory(str(source), target, dtype=wanted, progress=progress)
        elif to_original is None:
            notes = import_original(Path(str(source)), target, dtype=wanted, progress=progress)
        else:
            notes = export_original(
                Path(str(source)), target, to_original, dtype=wanted, progress=progress
            )
    for note in notes:
        print(f"注意：{note}")
    size = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    print(f"已写入 {target}：{size / 1e6:,.1f} MB，用时 {time.perf_counter() - start:.1f} 秒。")

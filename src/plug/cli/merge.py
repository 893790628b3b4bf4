"""`plug merge`: a model and its adapter to one directory."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from plug.cli.options import check_directory, check_model
from plug.errors import UsageError


def merge(
    target: Annotated[Path, typer.Option("--to", help="要写的目录，须不存在或为空。")],
    adapter: Annotated[
        Path,
        typer.Option(
            help="LoRA 适配器的目录（plug finetune --memory lora|qlora 或 peft 所写）。",
            callback=check_directory,
        ),
    ],
    model: Annotated[
        str | None,
        typer.Option(
            help="适配器所适配的模型：名字或目录（量化过的也可以）；默认训练时的。",
            callback=check_model,
        ),
    ] = None,
    bits: Annotated[
        int | None, typer.Option(help="8 或 4：合并后量化；默认写成浮点数。", show_default=False)
    ] = None,
    compares: Annotated[
        bool, typer.Option("--compare/--no-compare", help="合并后比较输出（内存要放得下模型）。")
    ] = True,
) -> None:
    """把 LoRA 适配器合并进模型的权重，逐个张量进行，并说明输出变了多少。"""
    if bits not in (None, 4, 8):
        raise UsageError(f"--bits {bits} 只能是 8 或 4。")

    from plug.finetuning.merge import merge_directory
    from plug.finetuning.predict import base_of

    change = merge_directory(
        model or base_of(adapter), adapter, target, bits=bits, compares=compares
    )
    size = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    print(f"已写入 {target}：{size / 1e6:,.1f} MB。")
    if change is not None:
        print(
            f"输出与未合并时相比：logits 最多变了最大值的 {change.largest:.2%}，平均变了标准差的"
            f" {change.mean:.2%}；{change.same_choice:.1%} 的位置首选相同。"
        )

"""`plug quantize`: a model's weights in 8 or 4 bits."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from plug.errors import UsageError


def quantize(
    target: Annotated[Path, typer.Option("--to", help="要写的目录，须不存在或为空。")],
    bits: Annotated[int, typer.Option(help="8：每个输出通道一个缩放；4：每 128 个输入一组。")],
    model: Annotated[
        str, typer.Option(help="plug-mini-zh、模型目录，或原版 PLUG 的目录。")
    ] = "plug-mini-zh",
) -> None:
    """把编码器和解码器各层的权重量化成 8 位或 4 位，逐个张量进行，内存只需放得下一个。"""
    if bits not in (4, 8):
        raise UsageError(f"--bits {bits} 只能是 8 或 4。")

    from plug.progress import byte_counter
    from plug.quantization.convert import quantize_directory

    start = time.perf_counter()
    with byte_counter("量化") as progress:
        notes = quantize_directory(model, target, bits=bits, progress=progress)
    for note in notes:
        print(f"注意：{note}")
    size = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    print(f"已写入 {target}：{size / 1e6:,.1f} MB，用时 {time.perf_counter() - start:.1f} 秒。")

"""`plug embed`: texts as vectors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from plug.cli.options import BatchSize, Device, Model, Simplify
from plug.errors import PlugError, UsageError
from plug.shipped import SHIPPED_MODEL


def embed(
    text: Annotated[list[str] | None, typer.Argument(help="一段或几段文字。")] = None,
    file: Annotated[Path | None, typer.Option(help="一行一段文字的文件。")] = None,
    output: Annotated[
        Path | None, typer.Option(help="把向量写成 NumPy 的 .npy 文件，而不是打印 JSON。")
    ] = None,
    batch_size: BatchSize = 32,
    model: Model = SHIPPED_MODEL,
    device: Device = None,
    simplify: Simplify = False,
) -> None:
    """把文字变成长度为 1 的向量（一行一个 JSON 列表）；两个向量的内积是余弦相似度。"""
    if bool(text) == (file is not None):
        raise UsageError('请给出文字（plug embed "…"）或 --file，二者选一。')
    if output is not None and (output.suffix != ".npy" or output.exists()):
        raise UsageError(f"{output} 应是一个还不存在的 .npy 文件。")
    if output is not None and not output.parent.is_dir():
        raise UsageError(f"{output} 所在的目录不存在。请先建好它。")

    from plug.textfiles import read_lines, trim
    from plug.zero_shot.embed import embed as run

    texts = text or []
    if file is not None:
        texts = [line for _, line in read_lines(file)]
        while texts and not trim(texts[-1]):
            texts.pop()
        for number, line in enumerate(texts, start=1):
            if not trim(line):
                raise UsageError(
                    f"{file} 第 {number} 行是空的，没有向量。请删去空行，使行与向量对应。"
                )
    vectors = run(
        texts, batch_size=batch_size, model=model, device=device, simplify=simplify
    ).numpy()
    if output is not None:
        import numpy as np

        try:
            np.save(output, vectors)
        except OSError as error:
            raise PlugError(f"没能写入 {output}：{error.strerror or error}。") from error
        print(f"已写入 {output}：{vectors.shape[0]} 个 {vectors.shape[1]} 维向量。")
        return
    for vector in vectors:
        print(json.dumps([round(float(value), 6) for value in vector]))

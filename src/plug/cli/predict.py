"""`plug predict`: what a fine-tuned model says of a text, or of every example of a file."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

from plug.cli.options import (
    Adapter,
    BatchSize,
    Device,
    Simplify,
    TunedBeams,
    TunedModel,
    check_data,
)
from plug.errors import UsageError


def predict(
    model: TunedModel = None,
    text: Annotated[
        list[str] | None,
        typer.Argument(help="文字；句对给两段，阅读理解给问题和原文，问题生成给答案和原文。"),
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option(
            help="任务格式的数据文件（可以没有答案），或 .txt：一行一例，各段用制表符分开。",
            callback=check_data,
        ),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="结果写到这个文件，一行一个 JSON。")] = None,
    batch_size: BatchSize = 32,
    num_beams: TunedBeams = None,
    adapter: Adapter = None,
    simplify: Simplify = False,
    device: Device = None,
) -> None:
    """用微调过的模型：分类、标注、回答、生成。"""
    if bool(text) == (file is not None):
        raise UsageError('请给出文字（plug predict --model 目录 "…"）或 --file，二者选一。')
    if output is not None and not output.parent.is_dir():
        raise UsageError(f"{output} 所在的目录不存在。请先建好它。")

    from plug.files import new_file
    from plug.finetuning.predict import Predictor, prediction_line
    from plug.progress import counter
    from plug.traditional import as_read

    # Opened first: a second process with this output is refused before it computes anything.
    with nullcontext() if output is None else new_file(output, replaces=False) as stream:
        predictor = Predictor(model, device, num_beams, adapter=adapter)
        if text:
            examples = [predictor.kind.example([as_read(part, simplify) for part in text])]
        else:
            assert file is not None
            examples = predictor.read(file, simplify=simplify)
        with counter(len(examples)) as advance:
            predictions = predictor(examples, batch_size=batch_size, on_progress=advance)
        for example, prediction in zip(examples, predictions, strict=True):
            print(prediction_line(predictor.kind, example, prediction), file=stream)
    if output is not None:
        print(f"已写入 {output}：{len(examples)} 例。")

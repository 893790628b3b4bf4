"""`plug classify`: labels for a text without fine-tuning."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from plug.cli.options import AsJson, Device, Model, Simplify
from plug.shipped import SHIPPED_MODEL


class Method(StrEnum):
    """What scores the labels."""

    DECODER = "decoder"
    MLM = "mlm"


def classify(
    text: Annotated[str, typer.Argument(help="要分类的文字。")],
    labels: Annotated[str, typer.Option(help="标签，用逗号分开，如 体育,财经,科技。")],
    examples: Annotated[
        Path | None, typer.Option(help="几个示例（text 与 label 的 jsonl 或 csv），放进提示里。")
    ] = None,
    prompt: Annotated[
        str | None,
        typer.Option(help="提示：{text} 处放文字，末尾接标签。[默认：{text}这段话说的是]"),
    ] = None,
    method: Annotated[Method, typer.Option(help="用解码器或 masked-LM 头评分。")] = Method.DECODER,
    model: Model = SHIPPED_MODEL,
    device: Device = None,
    simplify: Simplify = False,
    as_json: AsJson = False,
) -> None:
    """不经微调的分类：比较各标签接在提示之后有多可能。"""
    from plug.errors import UsageError
    from plug.finetuning.readers import ClassificationExample, read_classification
    from plug.zero_shot.classify import PROMPT
    from plug.zero_shot.classify import classify as run

    wanted = [label.strip() for label in labels.replace("，", ",").split(",")]
    shown = []
    for example in read_classification(examples) if examples else ():
        assert isinstance(example, ClassificationExample)
        if example.label not in wanted:
            raise UsageError(f"{example.place}的标签 {example.label!r} 不在 --labels 里。")
        shown.append((example.text_a + (example.text_b or ""), example.label))
    scores = run(
        text,
        wanted,
        examples=shown,
        prompt=prompt or PROMPT,
        method=method.value,
        model=model,
        device=device,
        simplify=simplify,
    )
    if as_json:
        print(json.dumps([each._asdict() for each in scores], ensure_ascii=False))
        return
    for label, probability in scores:
        print(f"{probability:.4f}  {label}")

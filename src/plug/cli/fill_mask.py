"""`plug fill-mask`: what may stand at a [MASK]."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from plug.cli.options import AsJson, Device, Model, Simplify
from plug.shipped import SHIPPED_MODEL


def fill_mask(
    text: Annotated[str, typer.Argument(help="文字，要填的地方写 [MASK]。")],
    top_k: Annotated[int, typer.Option(min=1, help="每处给出几个。")] = 5,
    model: Model = SHIPPED_MODEL,
    device: Device = None,
    simplify: Simplify = False,
    as_json: AsJson = False,
) -> None:
    """填空：每个 [MASK] 处最可能的字词。"""
    from plug.zero_shot.fill_mask import fill_mask as run

    fillings = run(text, top_k=top_k, model=model, device=device, simplify=simplify)
    if as_json:
        print(json.dumps([[each._asdict() for each in at] for at in fillings], ensure_ascii=False))
        return
    for number, at in enumerate(fillings, start=1):
        print(f"第 {number} 处：" + "  ".join(f"{text} {share:.3f}" for text, share in at))

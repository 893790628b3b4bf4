"""Options that several commands share, so that they read alike."""

from __future__ import annotations

from typing import Annotated

import typer

SHIPPED = "plug-mini-zh"

Model = Annotated[str, typer.Option(help=f"{SHIPPED} 或模型目录。")]
TunedModel = Annotated[str, typer.Option(help="plug finetune 的输出目录。")]
TunedBeams = Annotated[
    int | None, typer.Option(min=1, help="生成任务的束宽；1 为贪心；默认与微调时相同。")
]
BatchSize = Annotated[int, typer.Option(min=1, help="一次算几个。")]
Device = Annotated[str | None, typer.Option(help="cpu 或 cuda；默认有 GPU 就用 GPU。")]
AsJson = Annotated[bool, typer.Option("--json", help="输出 JSON。")]

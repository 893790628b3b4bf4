"""`plug finetune`: a pre-trained model and a task's data to a model for that task."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from plug.cli.options import (
    Device,
    check_data,
    check_model,
    options_from,
    tells_of_interruption,
)
from plug.finetuning.settings import FLAGS, FinetuneSettings
from plug.finetuning.tasks import TASKS
from plug.options import options_of

_TASKS = "\n\n".join(f"{name}：{task.title}" for name, task in TASKS.items())
_MORE = "、".join(name for name in options_of(FinetuneSettings) if name not in (*FLAGS, "task"))


@options_from(FinetuneSettings, FLAGS)
def finetune(
    task: Annotated[str | None, typer.Argument(help="任务名，见上。")] = None,
    *,
    changes: dict[str, Any],
    config: Annotated[
        Path | None,
        typer.Option(help="TOML 设置文件：名字 = 值，一行一项。命令行上的选项优先。"),
    ] = None,
    set_: Annotated[
        list[str], typer.Option("--set", help=f"改一项设置，如 --set fgm=1；可重复。有：{_MORE}。")
    ] = [],  # noqa: B006 (typer reads the default, nothing changes it)
    deepspeed: Annotated[
        Path | None, typer.Option(help="DeepSpeed 的设置文件（JSON），由 deepspeed 启动时。")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="接着输出目录里中断的训练。")] = False,
    device: Device = None,
) -> None:
    """微调：为一个任务训练模型，留下评测得分最高的一轮。"""
    from plug.options import merge_tables, parse_assignments, read_toml

    values = ({} if config is None else read_toml(config)) | changes
    values = merge_tables(values, parse_assignments(set_))
    if deepspeed is not None:
        values = merge_tables(values, {"parallel": {"deepspeed": str(deepspeed)}})
    if task is not None:
        values["task"] = task
    settings = FinetuneSettings.of(values)
    check_model(settings.model)
    check_data(settings.train)
    check_data(settings.eval)

    from plug.finetuning.run import finetune as run

    with tells_of_interruption():
        result = run(settings, device=device, resume=resume)
    if os.environ.get("RANK", "0") != "0":  # of several processes, one tells
        return
    for name, value in result.metrics.items():
        print(f"{name:<16}{value:.4f}")
    print(f"已写入 {result.directory}：模型、report.md、report.html。")


finetune.__doc__ = f"{finetune.__doc__}\n\n任务：\n\n{_TASKS}"

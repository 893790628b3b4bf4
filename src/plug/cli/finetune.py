"""`plug finetune`: a pre-trained model and a task's data to a model for that task."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from plug.cli.options import Device, Model, tells_of_interruption
from plug.finetuning.settings import FinetuneSettings
from plug.finetuning.tasks import TASKS

_DEFAULTS = FinetuneSettings(task="classification", train="", eval="", output="")
_TASKS = "\n\n".join(f"[bold]{name}[/bold] {task.title}" for name, task in TASKS.items())


def finetune(
    task: Annotated[str, typer.Argument(help="任务名，见下。")],
    train: Annotated[str, typer.Option(help="训练数据文件（可 .gz），或 datasets 的 名字:划分。")],
    eval_: Annotated[str, typer.Option("--eval", help="评测数据，用来选出最好的一轮。")],
    output: Annotated[str, typer.Option(help="输出目录：模型、设置、报告。须不存在或为空。")],
    model: Model = _DEFAULTS.model,
    epochs: Annotated[float, typer.Option(help="训练几轮；0 为任务的默认值。")] = 0.0,
    batch_size: Annotated[int, typer.Option(help="每步几个例子；0 为任务的默认值。")] = 0,
    eval_batch_size: Annotated[
        int, typer.Option(help="评测时一次几个例子。")
    ] = _DEFAULTS.eval_batch_size,
    learning_rate: Annotated[
        float, typer.Option(help="最高学习率；大模型用 1e-5。")
    ] = _DEFAULTS.learning_rate,
    warmup_fraction: Annotated[
        float, typer.Option(help="学习率升高的步数所占比例。")
    ] = _DEFAULTS.warmup_fraction,
    weight_decay: Annotated[float, typer.Option(help="权重衰减。")] = _DEFAULTS.weight_decay,
    clip_grad_norm: Annotated[
        float, typer.Option(help="梯度范数的上限。")
    ] = _DEFAULTS.clip_grad_norm,
    layer_decay: Annotated[
        float, typer.Option(help="每低一层，学习率乘以它；1 为不变。")
    ] = _DEFAULTS.layer_decay,
    r_drop: Annotated[
        float, typer.Option(help="R-Drop 的权重（分类任务）；0 为不用。")
    ] = _DEFAULTS.r_drop,
    label_smoothing: Annotated[
        float, typer.Option(help="标签平滑：目标中分给所有标签（或词元）的比例；0 为不用。")
    ] = _DEFAULTS.label_smoothing,
    fgm: Annotated[
        float, typer.Option(help="对抗训练（FGM）在词向量上走多远，如 1；0 为不用。")
    ] = _DEFAULTS.fgm,
    child_tuning: Annotated[
        float, typer.Option(help="每步保留多大比例的梯度；1 为全部。")
    ] = _DEFAULTS.child_tuning,
    source_length: Annotated[int, typer.Option(help="最多读多少词元；0 为任务的默认值。")] = 0,
    target_length: Annotated[
        int, typer.Option(help="最多写多少词元（常有几个字）；0 为任务的默认值。")
    ] = 0,
    num_beams: Annotated[
        int, typer.Option(help="生成任务评测时的束宽；1 为贪心。")
    ] = _DEFAULTS.num_beams,
    patience: Annotated[
        int, typer.Option(help="连续几轮不见好就停；0 为不早停。")
    ] = _DEFAULTS.patience,
    seed: Annotated[int, typer.Option(help="随机种子。")] = _DEFAULTS.seed,
    precision: Annotated[
        str, typer.Option(help="GPU 上的精度：bf16，或 fp32（乘法用 TF32）。")
    ] = _DEFAULTS.precision,
    from_scratch: Annotated[
        bool, typer.Option("--from-scratch", help="不用模型的权重，随机初始化（供比较）。")
    ] = _DEFAULTS.from_scratch,
    resume: Annotated[bool, typer.Option("--resume", help="接着输出目录里中断的训练。")] = False,
    device: Device = None,
) -> None:
    """微调：为一个任务训练模型，留下评测得分最高的一轮。"""
    from plug.finetuning.run import finetune as run

    settings = FinetuneSettings(
        task=task,
        train=train,
        eval=eval_,
        output=output,
        model=model,
        epochs=epochs,
        batch_size=batch_size,
        eval_batch_size=eval_batch_size,
        learning_rate=learning_rate,
        warmup_fraction=warmup_fraction,
        weight_decay=weight_decay,
        clip_grad_norm=clip_grad_norm,
        layer_decay=layer_decay,
        r_drop=r_drop,
        label_smoothing=label_smoothing,
        fgm=fgm,
        child_tuning=child_tuning,
        source_length=source_length,
        target_length=target_length,
        num_beams=num_beams,
        patience=patience,
        seed=seed,
        precision=precision,
        from_scratch=from_scratch,
    )
    with tells_of_interruption():
        result = run(settings, device=device, resume=resume)
    if os.environ.get("RANK", "0") != "0":  # of several processes, one tells
        return
    for name, value in result.metrics.items():
        print(f"{name:<16}{value:.4f}")
    print(f"已写入 {result.directory}：模型、report.md、report.html。")


finetune.__doc__ = f"{finetune.__doc__}\n\n任务：\n\n{_TASKS}"

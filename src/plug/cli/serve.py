"""`plug serve`: an HTTP server with OpenAI's routes, PLUG's own, and the page AI写手."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from plug.cli.convert import Precision
from plug.cli.options import Device, Model, options_from
from plug.errors import PlugError, UsageError, install
from plug.serving.settings import ServeSettings
from plug.shipped import SHIPPED_MODEL


@options_from(ServeSettings)
def serve(
    model: Model = SHIPPED_MODEL,
    served_model_name: Annotated[
        str | None, typer.Option(help="客户端用的模型名（默认为目录名）。", show_default=False)
    ] = None,
    finetuned: Annotated[
        list[str] | None,
        typer.Option(help="名字=目录：再加一个微调过的模型；可重复。", show_default=False),
    ] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            help="名字=目录：再加一个 --model 的 LoRA 适配器，与它同批写作；可重复。",
            show_default=False,
        ),
    ] = None,
    *,
    settings: ServeSettings,
    device: Device = None,
    dtype: Annotated[
        Precision | None,
        typer.Option(help="权重的精度（默认 CPU 上 float32，显卡上照原样）。", show_default=False),
    ] = None,
) -> None:
    """启动服务：OpenAI 兼容的接口和写作网页。"""
    try:
        from plug.serving.server import serve as run
    except ModuleNotFoundError as error:
        raise PlugError(f"缺少 {error.name}。请安装服务所需的包：{install('serve')}") from None
    from plug.checkpoints.weights import DTYPES
    from plug.device import find_device
    from plug.distributed.processes import start_processes
    from plug.serving.loading import limit_memory, load_models, named_directories
    from plug.serving.together import serve_together

    name = served_model_name or Path(model).expanduser().resolve().name
    others = named_directories("--finetuned", finetuned or ())
    adapters = named_directories("--adapter", adapter or ())
    weights = None if dtype is None else DTYPES[dtype]
    if settings.replicas > 1:
        from plug.serving.replicas import Models, resolved, serve_replicas

        copies = Models(
            name=name,
            directory=resolved(model),
            finetuned={each: resolved(path) for each, path in others.items()},
            adapters={each: resolved(path) for each, path in adapters.items()},
            device=str(find_device(device)),
            dtype=weights,
        )
        serve_replicas(copies, settings, _say_where)
        return
    with start_processes(device) as processes:
        limit_memory(processes.device, settings.gpu_memory_utilization)
        if processes.world_size > 1:
            if others or adapters:
                raise UsageError("--finetuned 和 --adapter 不能和多个进程一起用。请只用 --model。")
            serve_together(name, model, settings, processes, dtype=weights, on_started=_say_where)
            return
        models, load = load_models(
            name, model, others, adapters, settings, device=processes.device, dtype=weights
        )
        run(models, settings, load, _say_where)


def _say_where(address: str) -> None:
    print(f"服务已启动：{address}（网页在 /，接口在 /v1）。按 Ctrl-C 结束。", flush=True)

"""`plug info`: what a model costs, by part, before anything is loaded."""

from __future__ import annotations

import contextlib
import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from plug.model.configuration import PlugConfig


def info(
    model: Annotated[
        str, typer.Option(help="规格名（test、mini、base、large、27b）、plug-mini-zh 或模型目录。")
    ] = "plug-mini-zh",
    source_length: Annotated[
        int | None, typer.Option(min=1, help="计算量按多少个原文词元算（默认 512）。")
    ] = None,
    position: Annotated[
        int | None, typer.Option(min=1, help="计算量按写到第几个词元算（默认 128）。")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="内存按一起写多少段文字算。")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="输出 JSON。")] = False,
) -> None:
    """查看模型各部分的参数量、各精度的字节数、每词元的计算量。"""
    config = _find_config(model)
    source_length = _length("--source-length", source_length, 512, config)
    position = _length("--position", position, 128, config)
    costs = _costs(config, source_length, position, batch_size)
    if as_json:
        print(json.dumps({"model": model, **costs}, ensure_ascii=False, indent=2))
    else:
        _print_tables(model, costs)


def _find_config(model: str) -> PlugConfig:
    from plug.model.configuration import PRESETS, PlugConfig

    if model in PRESETS:
        return PRESETS[model]
    from plug.checkpoints.directory import find_model_directory

    return PlugConfig.from_file(find_model_directory(model) / "config.json")


def _length(option: str, asked: int | None, default: int, config: PlugConfig) -> int:
    from plug.errors import UsageError

    longest = config.max_position_embeddings
    if asked is None:
        return min(default, longest)
    if asked > longest:
        raise UsageError(f"{option} {asked} 超过该模型的最大长度 {longest}。请取更小的值。")
    return asked


def _costs(
    config: PlugConfig, source_length: int, position: int, batch_size: int
) -> dict[str, Any]:
    from plug.errors import UsageError
    from plug.loading.memory import generation_need, weight_bytes
    from plug.model import accounting

    sizes: dict[str, int | None] = {}  # None: the model cannot be had so
    needs: dict[str, int | None] = {}
    for name, bits in (("fp32", 32), ("bf16", 16), ("int8", 8), ("int4", 4)):
        sizes[name] = needs[name] = None
        with contextlib.suppress(UsageError):  # too narrow for groups of 4 bits
            sizes[name] = size = weight_bytes(config, bits)
            needs[name] = generation_need(
                config,
                weights=size,
                batch_size=batch_size,
                source_length=source_length,
                capacity=position,
                bytes_per_value=4 if name == "fp32" else 2,
            ).total
    by_part = {name: part.parameters for name, part in accounting.parts(config).items()}
    return {
        "config": config.to_dict(),
        "parameters": {**by_part, "total": sum(by_part.values())},
        "bytes": sizes,
        "batch_size": batch_size,
        "generation_bytes": needs,
        "source_length": source_length,
        "position": position,
        "encoder_flops_per_token": accounting.encoder_flops(config, source_length) // source_length,
        "cross_projection_flops_per_token": accounting.cross_projection_flops(config, 1),
        "decoder_flops_per_token": accounting.step_flops(config, source_length, position),
        "decoder_weights_per_token": accounting.step_weights(config),
        "cache_bytes_per_token": accounting.cache_bytes(config),
    }


def _print_tables(model: str, costs: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    words = {"embeddings": "嵌入", "encoder": "编码器", "decoder": "解码器", "heads": "输出头"}
    words["total"] = "合计"
    source, position = costs["source_length"], costs["position"]
    tables = {
        f"{model} 的参数": {words[name]: f"{n:,}" for name, n in costs["parameters"].items()},
        "权重大小（int8、int4：编码层和解码层的矩阵量化，其余为 bf16）": {
            name: _megabytes(count) for name, count in costs["bytes"].items()
        },
        f"写作需要的显存（一起写 {costs['batch_size']} 段，各读 {source}、写 {position} 个词元）": {
            name: _megabytes(count) for name, count in costs["generation_bytes"].items()
        },
        "计算量（每词元的浮点运算）": {
            f"编码（原文 {source} 个词元）": _giga(costs["encoder_flops_per_token"]),
            "投影到交叉注意力（每个原文词元一次）": _giga(
                costs["cross_projection_flops_per_token"]
            ),
            f"写第 {position} 个词元（有缓存）": _giga(costs["decoder_flops_per_token"]),
        },
        "访存": {
            "写一个词元读取的权重": f"{costs['decoder_weights_per_token']:,} 个",
            "键值缓存，bf16，每词元": f"{costs['cache_bytes_per_token']:,} 字节",
        },
    }
    console = Console()
    for title, rows in tables.items():
        table = Table(show_header=False, min_width=60)
        table.add_column(ratio=1)
        table.add_column(justify="right")
        for row in rows.items():
            table.add_row(*row)
        console.print(f"[bold]{title}[/bold]")
        console.print(table)


def _megabytes(count: int | None) -> str:
    return "不支持（宽度不是 128 的倍数）" if count is None else f"{count / 1e6:,.1f} MB"


def _giga(operations: int) -> str:
    return f"{operations / 1e9:,.3f} GFLOP"

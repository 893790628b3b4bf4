"""`plug evaluate`: measure a model; one command a kind of measurement."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Annotated, Any

import typer

from plug.cli.convert import Precision

if TYPE_CHECKING:
    from plug.evaluation.language_model import LanguageModelScore

app = typer.Typer(help="评测模型。", no_args_is_help=True)

_COUNTS = ("documents", "skipped", "tokens", "characters")
_RATIOS = ("nats_per_token", "nats_per_character", "unknown_share")


@app.command()
def lm(
    text: Annotated[
        list[Path],
        typer.Option(help="语料文件或文件夹（txt 空行分篇，或 jsonl；可 gz、zst 压缩）。"),
    ],
    more: Annotated[
        list[Path] | None, typer.Argument(metavar="FILE", help="更多语料文件。")
    ] = None,
    model: Annotated[str, typer.Option(help="plug-mini-zh 或模型目录。")] = "plug-mini-zh",
    source_length: Annotated[int, typer.Option(min=1, help="每篇先读多少个词元。")] = 128,
    target_length: Annotated[int, typer.Option(min=1, help="接着给多少个词元评分。")] = 128,
    batch_size: Annotated[int, typer.Option(min=1, help="一次算几篇。")] = 16,
    limit: Annotated[int | None, typer.Option(min=1, help="每个领域只取前几篇。")] = None,
    device: Annotated[str | None, typer.Option(help="cpu 或 cuda；默认有 GPU 就用 GPU。")] = None,
    dtype: Annotated[
        Precision | None, typer.Option(help="计算精度；默认 CPU 上 float32，GPU 上与权重文件相同。")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="输出 JSON。")] = False,
) -> None:
    """续写能力：每词元、每字的负对数似然（奈特）。文件名去掉 -00 一类编号即领域名。"""
    from itertools import chain, islice

    from plug.checkpoints.store import find_model_directory, load
    from plug.checkpoints.weights import DTYPES
    from plug.device import find_device
    from plug.evaluation.language_model import evaluate_language_model
    from plug.pretraining.corpus import domain_name, expand_paths, read_documents
    from plug.tokenization import PlugTokenizer

    domains: dict[str, list[Path]] = {}
    for path in expand_paths([*text, *(more or [])]):
        domains.setdefault(domain_name(path), []).append(path)
    directory = find_model_directory(model)
    tokenizer = PlugTokenizer.load(directory)
    wanted = None if dtype is None else DTYPES[dtype.value]
    network = load(directory, device=find_device(device), dtype=wanted)
    scores = {}
    for name, paths in domains.items():
        documents = chain.from_iterable(map(read_documents, paths))
        scores[name] = evaluate_language_model(
            network,
            tokenizer,
            islice(documents, limit),
            source_length=source_length,
            target_length=target_length,
            batch_size=batch_size,
        )
    report = {"model": model, **_report(scores)}
    if as_json:
        print(json.dumps(report, ensure_ascii=False, indent=2))
    else:
        _print_table(report)


def _report(scores: dict[str, LanguageModelScore]) -> dict[str, Any]:
    """Ratios: the plain mean over domains. Counts: sums. Then each domain by name."""
    domains = {
        name: {key: getattr(score, key) for key in (*_RATIOS, *_COUNTS)}
        for name, score in scores.items()
    }
    return {
        **{key: fmean(domain[key] for domain in domains.values()) for key in _RATIOS},
        **{key: sum(domain[key] for domain in domains.values()) for key in _COUNTS},
        "domains": domains,
    }


def _print_table(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{report['model']} 的续写评分", title_justify="left")
    table.add_column("领域")
    for heading in ("奈特/词元", "奈特/字", "未知词元", "文档", "跳过", "词元", "字"):
        table.add_column(heading, justify="right")
    rows = dict(report["domains"])
    if len(rows) > 1:
        rows["平均／合计"] = report
    for name, row in rows.items():
        ratios = f"{row['nats_per_token']:.4f}", f"{row['nats_per_character']:.4f}"
        counts = (f"{row[key]:,}" for key in _COUNTS)
        table.add_row(name, *ratios, f"{row['unknown_share']:.2%}", *counts)
    Console().print(table)

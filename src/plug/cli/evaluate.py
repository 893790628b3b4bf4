"""`plug evaluate`: measure a model; one command a kind of measurement."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Annotated, Any

import typer

from plug.cli.convert import Precision
from plug.cli.options import (
    Adapter,
    AsJson,
    BatchSize,
    Device,
    Model,
    TunedBeams,
    TunedModel,
    check_data,
)
from plug.finetuning.tasks import TASKS
from plug.shipped import SHIPPED_MODEL

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
    model: Model = SHIPPED_MODEL,
    source_length: Annotated[
        int | None,
        typer.Option(min=1, help="每篇先读多少个词元（默认 128，至多是模型最大长度的一半）。"),
    ] = None,
    target_length: Annotated[
        int | None,
        typer.Option(min=1, help="接着给多少个词元评分（默认 128，至多是模型最大长度的一半）。"),
    ] = None,
    batch_size: BatchSize = 16,
    limit: Annotated[int | None, typer.Option(min=1, help="每个领域只取前几篇。")] = None,
    adapter: Adapter = None,
    device: Device = None,
    dtype: Annotated[
        Precision | None, typer.Option(help="计算精度；默认 CPU 上 float32，GPU 上与权重文件相同。")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """续写能力：每词元、每字的负对数似然（奈特）。文件名去掉 -00 一类编号即领域名。"""
    from itertools import chain, islice

    from plug.pretraining.corpus import domain_name, expand_paths, read_documents

    domains: dict[str, list[Path]] = {}
    for path in expand_paths([*text, *(more or [])]):
        domains.setdefault(domain_name(path), []).append(path)

    from plug.checkpoints.directory import find_model_directory, load_tokenizer
    from plug.checkpoints.weights import DTYPES
    from plug.device import find_device
    from plug.evaluation.language_model import default_lengths, evaluate_language_model
    from plug.loading.load import load

    directory = find_model_directory(model)
    tokenizer = load_tokenizer(directory)
    wanted = None if dtype is None else DTYPES[dtype.value]
    network = load(directory, device=find_device(device), dtype=wanted, adapter=adapter)
    default_source, default_target = default_lengths(network.config)
    lengths = {
        "source_length": source_length or default_source,
        "target_length": target_length or default_target,
    }
    scores = {}
    for name, paths in domains.items():
        documents = chain.from_iterable(map(read_documents, paths))
        scores[name] = evaluate_language_model(
            network,
            tokenizer,
            islice(documents, limit),
            batch_size=batch_size,
            **lengths,
        )
    report = {"model": model, **lengths, **_report(scores)}
    if as_json:
        print(json.dumps(report, ensure_ascii=False, indent=2))
    else:
        _print_table(report)


def task(
    context: typer.Context,
    data: Annotated[str, typer.Option(help="任务格式的数据文件，带答案。", callback=check_data)],
    model: TunedModel = None,
    adapter: Adapter = None,
    report: Annotated[
        Path | None, typer.Option(help="把报告（Markdown、HTML、图）写到这个目录。")
    ] = None,
    num_beams: TunedBeams = None,
    batch_size: BatchSize = 32,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    import shlex

    from plug.errors import UsageError
    from plug.evaluation.report import write_report
    from plug.files import hold
    from plug.finetuning.predict import Predictor
    from plug.finetuning.tasks import read_examples
    from plug.progress import counter

    name = str(context.info_name)
    if report is not None and report.exists() and not report.is_dir():
        raise UsageError(f"{report} 是一个文件，不能作为报告的目录。")
    # Held first: a second process with this report is refused before it computes anything.
    with nullcontext() if report is None else hold(report):
        predictor = Predictor(model, device, num_beams, adapter=adapter)
        if predictor.task.kind != TASKS[name].kind:
            raise UsageError(
                f"{adapter or model} 是为 {predictor.task_name} 微调的，不能评测 {name}。"
            )
        examples = read_examples(TASKS[name], Path(data), answered=True)
        predictor.kind.check(examples, training=False)
        with counter(len(examples)) as advance:
            predictions = predictor(examples, batch_size=batch_size, on_progress=advance)
        evaluation = predictor.kind.evaluate(examples, predictions)
        if report is not None:
            beams = [] if num_beams is None else ["--num-beams", str(num_beams)]
            chosen = [] if model is None else ["--model", model]
            chosen += [] if adapter is None else ["--adapter", str(adapter)]
            words = ["plug", "evaluate", name, *chosen, "--data", data, *beams]
            facts = {"model": str(adapter or model), "data": data, "examples": len(examples)}
            write_report(report, f"{TASKS[name].title}：评测", shlex.join(words), facts, evaluation)
    if as_json:
        print(json.dumps({"examples": len(examples), **evaluation.metrics}, indent=2))
        return
    for key, value in evaluation.metrics.items():
        print(f"{key:<16}{value:.4f}")


for _name, _task in TASKS.items():
    app.command(_name, help=_task.title)(task)


@app.command()
def clue(
    models: Annotated[Path, typer.Option(help="一个任务一个子目录（如 tnews）的模型目录。")],
    data: Annotated[Path, typer.Option(help="一个任务一个子目录的数据目录。")],
    submit: Annotated[
        Path | None, typer.Option(help="不评分，而是预测测试集，把提交文件写到这个目录。")
    ] = None,
    batch_size: BatchSize = 64,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """CLUE 各分类任务的准确率及其平均（Score）；--submit 写官方提交文件。"""
    from rich.console import Console

    from plug.finetuning.clue import evaluate_clue, write_submission

    tell = Console(stderr=True).print
    options: dict[str, Any] = {"batch_size": batch_size, "device": device, "on_task": tell}
    if submit is not None:
        for path in write_submission(models, data, submit, **options):
            print(path)
        return
    found = evaluate_clue(models, data, **options)
    if as_json:
        print(json.dumps({"score": found.score, "missing": found.missing, **found.tasks}, indent=2))
        return
    for name, metrics in found.tasks.items():
        low, high = metrics["accuracy_low"], metrics["accuracy_high"]
        print(f"{name:<14}{metrics['accuracy']:.4f}  95% 置信区间 {low:.4f}–{high:.4f}")
    print(f"{'Score':<14}{found.score:.4f}  （{len(found.tasks)} 个任务的平均）")
    if found.missing:
        print(f"没有模型的任务：{'、'.join(found.missing)}。")


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

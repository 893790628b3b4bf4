"""`plug pretrain vocab|data|stage1|stage2|plan`: from text files to a model, step by step."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from plug.cli.options import AsJson, options_from, tells_of_interruption
from plug.pretraining.plan_settings import PlanSettings

app = typer.Typer(
    help="预训练：词表、语料、第一阶段（StructBERT）、第二阶段（PALM）；大规模训练的计划。",
    no_args_is_help=True,
)

CorpusOption = Annotated[
    list[Path], typer.Option(help="语料文件或文件夹（.txt .jsonl，可压缩为 .gz .zst）；可重复。")
]
ConfigOption = Annotated[Path, typer.Option("--config", help="TOML 设置文件，见 configs/。")]
SetOption = Annotated[
    list[str], typer.Option("--set", help="改一项设置，如 --set steps=100；可重复。")
]
ResumeOption = Annotated[
    bool, typer.Option("--resume", help="接着中断的训练；还没有检查点则从头。")
]
DeviceOption = Annotated[str | None, typer.Option(help="cpu 或 cuda；默认有 GPU 就用 GPU。")]


@app.command()
def vocab(
    corpus: CorpusOption,
    output: Annotated[Path, typer.Option(help="分词器写到这个文件夹。")],
    size: Annotated[int, typer.Option(help="词表大小。")] = 12288,
    alphabet: Annotated[int, typer.Option(help="其中单字的个数，其余的字用字节表示。")] = 6000,
    characters_per_domain: Annotated[
        int, typer.Option(min=1, help="每个领域至多读多少字。")
    ] = 2_000_000,
) -> None:
    """在语料上训练自己的词表。"""
    from plug.errors import UsageError
    from plug.files import new_directory, refuse_used
    from plug.pretraining import corpus as reader
    from plug.pretraining import vocabulary

    if (output / "tokenizer.json").exists():
        raise UsageError(f"{output} 已有分词器。请换一个文件夹或先删去它。")
    refuse_used(output)
    files = reader.expand_paths(corpus)
    documents = vocabulary.sample_documents(files, characters_per_domain)
    tokenizer = vocabulary.train(documents, size, alphabet)
    with new_directory(output) as temporary:
        tokenizer.save(temporary)
    typer.echo(f"{output}：{tokenizer.vocab_size} 项")


@app.command()
def data(
    corpus: CorpusOption,
    tokenizer: Annotated[Path, typer.Option(help="分词器或模型的文件夹，或 plug-mini-zh。")],
    output: Annotated[Path, typer.Option(help="编码好的语料写到这个文件夹。")],
    heldout: Annotated[
        float, typer.Option(help="每个领域留作评测、不参加训练的文档比例。")
    ] = 0.005,
    character_share: Annotated[
        float, typer.Option(help="逐字切分的文档比例（为按字标注的任务）。")
    ] = 0.0,
) -> None:
    """把语料编码成词元编号，写到磁盘上。"""
    from plug.pretraining.corpus import expand_paths
    from plug.pretraining.tokens import write_tokens
    from plug.tokenization import PlugTokenizer

    counted = write_tokens(
        expand_paths(corpus),
        PlugTokenizer.load(tokenizer),
        output,
        heldout=heldout,
        character_share=character_share,
    )
    for number, counts in enumerate(counted):
        if not number:  # what is refused has no table
            typer.echo("领域          文档    留出        字数      词元数  字/词元  未知词元")
        typer.echo(
            f"{counts.name:<12}{counts.documents:>8}{counts.heldout_documents:>6}"
            f"{counts.characters:>12}{counts.tokens:>12}"
            f"{counts.characters / max(1, counts.tokens):>9.3f}{counts.unknown_tokens:>10}"
        )


@app.command()
def stage1(
    config: ConfigOption,
    set_: SetOption = [],  # noqa: B006 (typer reads the default, nothing changes it)
    resume: ResumeOption = False,
    device: DeviceOption = None,
) -> None:
    """第一阶段：StructBERT 的三个目标，只训练编码器。"""
    _run(1, config, set_, resume, device)


@app.command()
def stage2(
    config: ConfigOption,
    set_: SetOption = [],  # noqa: B006
    resume: ResumeOption = False,
    device: DeviceOption = None,
) -> None:
    """第二阶段：PALM，编码器读前文，解码器写下文。"""
    _run(2, config, set_, resume, device)


@app.command()
@options_from(PlanSettings)
def plan(settings: PlanSettings, as_json: AsJson = False) -> None:
    """要多少张卡、多少天、多少钱：按实测的速度和写明的假设算，并模拟故障，选出检查点的间隔。"""
    import json

    from plug.pretraining.plan import lines_of, make_plan

    found = make_plan(settings)
    typer.echo(
        json.dumps(found, ensure_ascii=False, indent=2)
        if as_json
        else "\n".join(lines_of(settings, found))
    )


def _run(
    stage: int, config: Path, assignments: list[str], resume: bool, device: str | None
) -> None:
    from plug.options import parse_assignments
    from plug.pretraining.run import pretrain
    from plug.pretraining.settings import RunConfig

    settings = RunConfig.from_file(config, parse_assignments(assignments))
    with tells_of_interruption():
        pretrain(stage, settings, resume=resume, device=device)

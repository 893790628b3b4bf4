"""`plug quantize`: a model's weights in 8 or 4 bits."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from plug.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor


def quantize(
    target: Annotated[Path, typer.Option("--to", help="要写的目录，须不存在或为空。")],
    bits: Annotated[int, typer.Option(help="8：每个输出通道一个缩放；4：每 128 个输入一组。")],
    model: Annotated[
        str, typer.Option(help="plug-mini-zh、模型目录，或原版 PLUG 的目录。")
    ] = "plug-mini-zh",
    calibration: Annotated[
        list[Path] | None,
        typer.Option(
            help="4 位时：文本文件或目录，与将来要写的文字同类。照它选取整数，质量损失小得多；"
            "模型要能整个放进内存或显存。"
        ),
    ] = None,
    texts: Annotated[int, typer.Option(help="校准用多少段文本，从各文件轮流取。")] = 128,
    device: Annotated[str | None, typer.Option(help="校准时用的设备：cpu、cuda 等。")] = None,
) -> None:
    """把编码器和解码器各层的权重量化成 8 位或 4 位，逐个张量进行，内存只需放得下一个。"""
    if bits not in (4, 8):
        raise UsageError(f"--bits {bits} 只能是 8 或 4。")
    if calibration and bits == 8:
        raise UsageError("--calibration 只用于 --bits 4；8 位几乎没有损失。请去掉它。")

    from plug.checkpoints.directory import find_model_directory, is_original

    if not is_original(Path(model).expanduser()):
        find_model_directory(model)

    from plug.files import refuse_used
    from plug.progress import byte_counter
    from plug.quantization.convert import quantize_directory

    start = time.perf_counter()
    refuse_used(target)
    with byte_counter("量化") as progress:
        layers = _calibrated(model, calibration, texts, device) if calibration else ()
        notes = quantize_directory(model, target, bits=bits, layers=layers, progress=progress)
    for note in notes:
        print(f"注意：{note}")
    size = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    print(f"已写入 {target}：{size / 1e6:,.1f} MB，用时 {time.perf_counter() - start:.1f} 秒。")


def _calibrated(
    name: str, paths: list[Path], count: int, device: str | None
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """The layers of a model in 4 bits, chosen for what it reads and writes in these texts."""
    import plug
    from plug.checkpoints.directory import find_model_directory, load_tokenizer
    from plug.device import find_device
    from plug.evaluation.language_model import cut, default_lengths
    from plug.pretraining.corpus import expand_paths, read_documents
    from plug.quantization.calibration import LEAST_EXAMPLES, Example, calibrated

    if count < 1:
        raise UsageError(f"--texts {count} 应是正整数。")
    directory = find_model_directory(name)
    tokenizer = load_tokenizer(directory)
    model = plug.load(directory, device=find_device(device))
    source_length, target_length = default_lengths(model.config)
    examples: list[Example] = []
    files = [read_documents(path) for path in expand_paths(paths)]
    while files and len(examples) < count:
        for documents in list(files):
            text = next(documents, None)
            if text is None:
                files.remove(documents)
                continue
            found = cut(text, tokenizer, source_length, target_length)
            if len(found.target) == target_length and len(examples) < count:
                examples.append(Example(found.source, found.target))
    if len(examples) < LEAST_EXAMPLES:
        raise UsageError(
            f"校准的文本里只有 {len(examples)} 篇不短于 {source_length + target_length} 个词元，"
            f"至少要 {LEAST_EXAMPLES} 篇，最好一百篇以上。各篇之间空一行；请给更多或更长的文本。"
        )
    return calibrated(model, examples)

"""`plug generate`: continue a text, shown as it is written."""

from __future__ import annotations

import json
import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from plug.cli.convert import Precision
from plug.cli.options import Adapter, Model, options_from
from plug.errors import UsageError
from plug.generation.settings import WINDOW, GenerationSettings
from plug.shipped import SHIPPED_MODEL
from plug.textfiles import Notes, read_lines, trim

if TYPE_CHECKING:
    from plug.generation.result import GenerationResult


@options_from(GenerationSettings)
def generate(
    text: Annotated[str | None, typer.Argument(help="要续写的文字。")] = None,
    model: Model = SHIPPED_MODEL,
    *,
    settings: GenerationSettings,
    seed: Annotated[int | None, typer.Option(help="随机种子：同样的种子写出同样的文字。")] = None,
    allow_special_tokens: Annotated[
        bool, typer.Option("--allow-special-tokens", help="把文字里的 [SEP] 等当作特殊符号。")
    ] = False,
    file: Annotated[str | None, typer.Option(help="逐行续写文件里的文字，- 为标准输入。")] = None,
    batch_size: Annotated[
        int, typer.Option(min=1, help="一起写的段数：越大总的越快，占的内存或显存越多。")
    ] = 8,
    device: Annotated[str | None, typer.Option(help="cpu 或 cuda（默认有 cuda 就用）。")] = None,
    device_map: Annotated[
        str | None,
        typer.Option(
            help="auto：显存放不下的编码器的层留在内存或别的卡上，用时再读。", show_default=False
        ),
    ] = None,
    adapter: Adapter = None,
    dtype: Annotated[
        Precision | None,
        typer.Option(help="权重的精度（默认 CPU 上 float32，显卡上照原样）。", show_default=False),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="输出 JSON，一段文字一行。")] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="在标准错误上说明读权重用了多久。")
    ] = False,
) -> None:
    """续写一段文字，边写边显示。"""
    texts = _texts(text, file)
    if verbose:
        logging.basicConfig(level=logging.INFO, format="%(message)s")

    from plug.checkpoints.weights import DTYPES
    from plug.distributed.processes import start_processes
    from plug.generation.generator import Generator
    from plug.loading.estimate import Room

    capacity = min(settings.window or WINDOW[settings.mode], settings.out_length)
    texts_each = settings.num_return_sequences
    rows = min(batch_size, len(texts) * texts_each) * settings.num_beams
    shown_as_written = file is None and not as_json and texts_each == 1
    with start_processes(device) as processes:
        generator = Generator(
            model,
            dtype=None if dtype is None else DTYPES[dtype],
            room=Room(batch_size=rows, capacity=capacity),
            processes=processes,
            device_map=device_map,
            adapter=adapter,
        )
        for first in range(0, len(texts), batch_size):
            results = generator(
                texts[first : first + batch_size],
                settings,
                seed=seed,
                batch_size=batch_size,
                allow_special_tokens=allow_special_tokens,
                on_text=_show if shown_as_written else None,
            )
            for number, result in enumerate(results):
                prompt = texts[first + number // texts_each]
                if as_json:
                    print(json.dumps(_record(prompt, result), ensure_ascii=False), flush=True)
                else:
                    print("" if shown_as_written else f"{result.text}\n", flush=True)


def _texts(text: str | None, file: str | None) -> list[str]:
    if (text is None) == (file is None):
        raise UsageError('请给出要续写的文字（plug generate "…"）或 --file，二者选一。')
    if text is not None:
        return [text]
    assert file is not None
    if file == "/dev/stdin":
        file = "-"
    if file == "-" and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError("多个进程不能都读标准输入。请把文字写进文件，用 --file 文件。")
    if file == "-":
        texts = [line.rstrip("\r") for line in _standard_input().split("\n") if trim(line)]
    else:
        notes, texts = Notes(), []
        for number, line in read_lines(Path(file), notes):
            if trim(line):
                texts.append(line)
            else:
                notes.add("空行没有续写", f"{file} 第 {number} 行")
        notes.log()
    if not texts:
        raise UsageError(f"{file} 里没有文字。请一行写一段。")
    return texts


def _standard_input() -> str:
    try:
        return sys.stdin.buffer.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"标准输入不是 UTF-8 文本（第 {error.start + 1} 个字节）。") from None


def _show(_row: int, piece: str) -> None:
    sys.stdout.write(piece)
    sys.stdout.flush()


def _record(prompt: str, result: GenerationResult) -> dict[str, object]:
    return {
        "prompt": prompt,
        "text": result.text,
        "token_ids": list(result.token_ids),
        "prompt_token_count": result.prompt_token_count,
        "finish_reason": result.finish_reason,
        "seed": result.seed,
        "seconds": round(result.seconds, 4),
        "tokens_per_second": round(result.tokens_per_second, 2),
    } | _logprobs(result)


def _logprobs(result: GenerationResult) -> dict[str, object]:
    """As vLLM's and OpenAI's: of each token, and of the likeliest ones at its place."""
    if result.logprobs is None:
        return {}
    return {
        "logprobs": [round(each.logprob, 4) for each in result.logprobs],
        "top_logprobs": [
            {str(token_id): round(logprob, 4) for token_id, logprob in each.top}
            for each in result.logprobs
        ],
    }

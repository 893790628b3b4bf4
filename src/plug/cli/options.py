"""Options that several commands share, and options made from a settings dataclass."""

from __future__ import annotations

import functools
import inspect
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from plug.errors import UsageError
from plug.files import about_windows_path, recover
from plug.options import REQUIRED, Option, merge, options_of
from plug.shipped import SHIPPED_MODEL
from plug.textfiles import check_regular_file

_Path = TypeVar("_Path", bound=str | Path | None)


# What is not there is refused while the options are read, before torch is imported: on a cold
# machine that takes 10 s and more.
def check_model(value: str | None) -> str | None:
    """Return the value of an option for a model.

    Raises:
        UsageError: no model is there, and no adapter.
    """
    from plug.checkpoints.directory import find_model_directory

    if value is not None and not (Path(value).expanduser() / "adapter_config.json").is_file():
        find_model_directory(value)
    return value


def check_directory(value: Path | None) -> Path | None:
    """Return the value of an option for a directory.

    Raises:
        UsageError: there is none.
    """
    if value is None:
        return None
    directory = value.expanduser()
    recover(directory)
    if not directory.is_dir():
        raise UsageError(f"找不到目录 {value}。请检查路径。{about_windows_path(value)}")
    return value


def check_data(value: _Path) -> _Path:
    """Return the value of an option for a file, or for a name of the `datasets` library.

    Raises:
        UsageError: there is no such file.
    """
    if value is not None and ":" not in str(value):  # NAME:SPLIT is for `datasets`
        check_regular_file(Path(value))
    return value


Model = Annotated[str, typer.Option(help=f"{SHIPPED_MODEL} 或模型目录。", callback=check_model)]
TunedModel = Annotated[
    str | None,
    typer.Option(
        help="plug finetune 的输出目录；与 --adapter 一起时是适配的模型，默认训练时的。",
        callback=check_model,
    ),
]
TunedBeams = Annotated[
    int | None, typer.Option(min=1, help="生成任务的束宽；1 为贪心；默认与微调时相同。")
]
BatchSize = Annotated[int, typer.Option(min=1, help="一次算几个。")]
Device = Annotated[str | None, typer.Option(help="cpu 或 cuda；默认有 GPU 就用 GPU。")]
Adapter = Annotated[
    Path | None,
    typer.Option(
        help="LoRA 适配器的目录（plug finetune --memory lora 或 peft 所写）。",
        callback=check_directory,
    ),
]
Simplify = Annotated[
    bool, typer.Option("--simplify", help="先把繁体转成简体（要装 plug-zh[opencc]）。")
]
AsJson = Annotated[bool, typer.Option("--json", help="输出 JSON。")]


@contextmanager
def tells_of_interruption() -> Iterator[None]:
    """Tell the user what Ctrl-C or SIGTERM left, and end with the exit status of that signal."""
    try:
        yield
    except KeyboardInterrupt as error:
        if os.environ.get("RANK", "0") == "0":  # of several processes, one tells
            print(str(error) or "已中断。加 --resume 从上一个检查点继续。", file=sys.stderr)
        raise typer.Exit(getattr(error, "exit_code", 130)) from error


def options_from(
    settings: type, names: Sequence[str] | None = None
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Return a decorator: a parameter of the command becomes an option for each field.

    Without ``names`` that is the parameter ``settings``: the command is called with a checked
    object of this class. With ``names`` it is the parameter ``changes``: the command is called with
    a dictionary of those options that were typed, to put them over what a file says.

    Args:
        settings: a dataclass whose fields are made by `plug.options.option`.
        names: the fields that are options; None: all.
    """
    found = options_of(settings)
    parameters = [_parameter(name, *found[name], names is not None) for name in names or found]
    replaced = "settings" if names is None else "changes"

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(command, eval_str=True)
        shown: list[inspect.Parameter] = []
        for each in signature.parameters.values():
            shown += parameters if each.name == replaced else [each]

        @functools.wraps(command)
        def run(**values: Any) -> None:
            chosen = {name: values.pop(name) for name in names or found}
            if names is None:
                values["settings"] = merge(settings, None, chosen)
            else:
                values["changes"] = {
                    name: value for name, value in chosen.items() if value is not None
                }
            command(**values)

        in_order = [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in shown]
        run.__signature__ = signature.replace(parameters=in_order)  # type: ignore[attr-defined]
        run.__annotations__ = {each.name: each.annotation for each in shown}
        return run

    return decorate


def _parameter(name: str, default: Any, option: Option, is_change: bool) -> inspect.Parameter:
    kind = option.kind
    text = option.chinese
    if option.unset[0]:
        text += f"（默认{option.unset[0]}）"
    elif default is not REQUIRED and not kind.is_repeated and kind.word_type is not bool:
        text += f"（默认 {default:g}）" if isinstance(default, float) else f"（默认 {default}）"
    flag = "--" + name.replace("_", "-")
    if kind.word_type is bool and default is True:
        flag += f"/--no-{name.replace('_', '-')}"
    annotation: Any = list[kind.word_type] if kind.is_repeated else kind.word_type  # type: ignore[name-defined]
    if default is None or kind.is_repeated or is_change:
        annotation, default = annotation | None, None
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=default,
        annotation=Annotated[annotation, typer.Option(flag, help=text, show_default=False)],
    )

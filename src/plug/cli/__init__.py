"""The command line: one short file a command, put together here.

Command files import only typer, rich and the standard library at their top, so that `plug --help`
does not wait for torch; the work is imported when a command runs.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

import plug
from plug.cli import (
    classify,
    convert,
    embed,
    evaluate,
    fill_mask,
    finetune,
    generate,
    help,
    info,
    merge,
    predict,
    pretrain,
    quantize,
    serve,
)
from plug.cli.usage import WrongUsage, in_chinese
from plug.errors import PlugError
from plug.interrupts import end_on_bus_errors

app = typer.Typer(
    help="PLUG：既能理解、又能写作的中文模型。",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(asked: bool) -> None:
    if asked:
        print(f"plug {plug.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="显示版本号。")
    ] = False,
) -> None:
    pass


app.command()(generate.generate)
app.command()(convert.convert)
app.command()(quantize.quantize)
app.command()(merge.merge)
app.add_typer(pretrain.app, name="pretrain")
app.command()(finetune.finetune)
app.command()(predict.predict)
app.add_typer(evaluate.app, name="evaluate")
app.command()(classify.classify)
app.command()(fill_mask.fill_mask)
app.command()(embed.embed)
app.command()(serve.serve)
app.command()(info.info)


def main() -> int:
    """Run `plug`; the exit status.

    Returns:
        0 done; 1 it could not be done; 2 wrong use; 130 Ctrl-C, 143 SIGTERM in a run.
        Nobody reading any more (a closed pipe) is 1 and quiet. A bug keeps its traceback.
    """
    if _is_first_process():
        return _run()
    logging.disable(logging.WARNING)  # `torchrun` starts several, and one speaks for all
    with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stdout(nowhere):
        return _run()


def _run() -> int:
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show it gets "?"
    # Threads that spin while they wait starve each other where another program has the cores: a
    # text that takes 5 s then took 40. Read by OpenMP when torch is imported, so it is set here.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    end_on_bus_errors()
    try:
        command = typer.main.get_command(app)
        help.use_on(command)
        _let_interruptions_through(command)
        status = command(_without_launchers(sys.argv[1:]) or ["--help"], standalone_mode=False)
        sys.stdout.flush()
    except PlugError as error:
        return _say(str(error), error.exit_code)
    except WrongUsage as error:
        if type(error).__name__ == "NoArgsIsHelpError":  # a group alone: this is its help
            print(error)
            return 2
        return _say(in_chinese(error), 2)
    except _StoppedError as stopped:
        # A run that saved before it ended says so (`plug.interrupts`).
        if _is_first_process():
            print(f"\n{str(stopped) or '已按 Ctrl-C 中断，没有做完。'}", file=sys.stderr)
        return stopped.exit_code
    except BrokenPipeError:
        # What is still buffered would raise again when the interpreter flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if not _is_one_of_several():
            raise
        from plug.distributed.processes import is_first_to_fail, is_loss_of_another

        if is_loss_of_another(error):
            return _say("另一个进程中断了，不能继续。请看它的错误，或查看内存和显卡后重试。", 1)
        if is_first_to_fail():
            raise
        return 1
    return status if isinstance(status, int) else 0


def _without_launchers(arguments: list[str]) -> list[str]:
    """Drop `--local_rank=N`, which the `deepspeed` launcher puts first; LOCAL_RANK says it too."""
    is_launchers = arguments[:1] == [f"--local_rank={os.environ.get('LOCAL_RANK')}"]
    return arguments[1:] if is_launchers else arguments


class _StoppedError(Exception):
    """A KeyboardInterrupt in the words that it was raised with."""

    def __init__(self, interrupt: BaseException) -> None:
        super().__init__(str(interrupt))
        self.exit_code: int = getattr(interrupt, "exit_code", 130)


def _let_interruptions_through(command: Any) -> None:
    """Keep what a KeyboardInterrupt says; typer makes an exit status of it."""
    invoke = command.invoke

    def invoke_until_stopped(context: Any) -> Any:
        try:
            return invoke(context)
        except KeyboardInterrupt as interrupt:
            raise _StoppedError(interrupt) from None

    command.invoke = invoke_until_stopped


def _is_one_of_several() -> bool:
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def _is_first_process() -> bool:
    return not _is_one_of_several() or os.environ.get("RANK", "0") == "0"


def _say(message: str, status: int) -> int:
    """Print an error; of several processes, the first to fail does."""
    if _is_one_of_several():
        from plug.distributed.processes import is_first_to_fail

        if not is_first_to_fail():
            return status
    print(f"错误：{message}", file=sys.stderr)
    return status

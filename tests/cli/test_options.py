"""Options made from a settings dataclass: one flag a field, checked before the command runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import typer

from plug.cli.options import options_from
from plug.errors import UsageError
from plug.generation.settings import GenerationSettings
from plug.options import Biases, Bool, Float, Int, Strings, check_options, option, options_of


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    most_words: int = option(3, Int(1, 9), "个数。", "how many")
    share: float | None = option(None, Float(0, 1), "份额。", "of all", unset=("全部", "all"))
    loud: bool = option(False, Bool(), "大声。", "loudly")
    polite: bool = option(True, Bool(), "有礼。", "politely")
    stop: tuple[str, ...] = option((), Strings(2, 5), "停在。", "ends")
    bias: dict[int, float] = option({}, Biases(2, 9), "偏置。", "added")

    def __post_init__(self) -> None:
        check_options(self)


@pytest.fixture
def parse() -> Callable[..., tuple[str, Settings]]:
    def parse(*arguments: str) -> tuple[str, Settings]:
        told: list[tuple[str, Settings]] = []
        app = typer.Typer()

        @app.command()
        @options_from(Settings)
        def command(text: str, *, settings: Settings) -> None:
            told.append((text, settings))

        typer.main.get_command(app)(list(arguments), standalone_mode=False)
        return told[0]

    return parse


def test_nothing_given_is_the_defaults(parse: Callable) -> None:
    assert parse("山") == ("山", Settings())


def test_each_field_has_a_flag(parse: Callable) -> None:
    flags = [
        "--most-words",
        "5",
        "--share",
        "0.5",
        "--loud",
        "--no-polite",
        "--stop",
        "。",
        "--stop",
        "！",
        "--bias",
        "7=-2",
    ]
    expected = Settings(
        most_words=5, share=0.5, loud=True, polite=False, stop=("。", "！"), bias={7: -2}
    )
    assert parse(*flags, "山") == ("山", expected)


def test_a_value_out_of_its_limits_is_refused(parse: Callable) -> None:
    with pytest.raises(UsageError, match="most_words=10 应在 1 到 9 之间"):
        parse("山", "--most-words", "10")


def test_generate_has_a_flag_for_every_setting() -> None:
    from plug.cli import app

    flags = {
        flag
        for parameter in typer.main.get_command(app).commands["generate"].params
        for flag in parameter.opts
    }
    wanted = {"--" + name.replace("_", "-") for name in options_of(GenerationSettings)}
    assert wanted <= flags

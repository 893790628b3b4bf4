"""Running `plug` in this process."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest

from plug.cli import main


class Ran(NamedTuple):
    status: int
    out: str
    err: str


@pytest.fixture
def run_plug(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Ran]:
    """`run_plug("info", "--json")`: exit status, standard output and standard error."""

    def run(*arguments: object) -> Ran:
        monkeypatch.setattr("sys.argv", ["plug", *map(str, arguments)])
        capsys.readouterr()
        status = main()
        return Ran(status, *capsys.readouterr())

    return run

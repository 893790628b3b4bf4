from __future__ import annotations

from pathlib import Path

import pytest

from plug.errors import UsageError
from plug.options import markdown_table
from plug.serving.settings import ServeSettings, is_local

DOCS = Path(__file__).resolve().parents[2] / "docs"


def test_the_table_of_options_stands_in_the_guide() -> None:
    assert markdown_table(ServeSettings) in (DOCS / "serving.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["serving.md", "serving.zh-CN.md"])
def test_the_guides_name_every_route(name: str) -> None:
    from plug.serving.app import ROUTES

    text = (DOCS / name).read_text(encoding="utf-8")
    assert [path for path, _, _ in ROUTES if f"{path}`" not in text] == []


@pytest.mark.parametrize(
    ("host", "local"),
    [("127.0.0.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("plug", False)],
)
def test_which_hosts_are_this_machine(host: str, local: bool) -> None:
    assert is_local(host) is local


@pytest.mark.parametrize("path", ["plug", "/plug/", "/"])
def test_a_root_path_begins_with_a_slash_and_does_not_end_with_one(path: str) -> None:
    with pytest.raises(UsageError, match="root_path"):
        ServeSettings(root_path=path)

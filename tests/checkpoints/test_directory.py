from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from plug.checkpoints.directory import find_model_directory, replace_directory
from plug.checkpoints.hub import SAMPLING
from plug.errors import PlugError
from plug.generation.settings import GenerationSettings

Contents = Callable[[Path], dict[str, bytes]]


def test_a_directory_may_have_the_shipped_models_name(
    model_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model_directory.rename(model_directory.with_name("plug-mini-zh"))
    monkeypatch.chdir(model_directory.parent)

    assert find_model_directory("./plug-mini-zh") == Path("plug-mini-zh")


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_a_failing_block_leaves_the_old_directory(
    error: type[BaseException], model_directory: Path, contents: Contents
) -> None:
    before = contents(model_directory.parent)

    def fill() -> None:
        with replace_directory(model_directory) as temporary:
            (temporary / "config.json").write_text("{}")
            raise error

    with pytest.raises(error):
        fill()

    assert contents(model_directory.parent) == before


def test_a_failing_rename_leaves_the_old_directory(
    model_directory: Path, contents: Contents, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(model_directory.parent)
    rename = Path.rename

    def refuse_the_new(self: Path, target: Path) -> Path:
        if ".partial" in self.name:
            raise PermissionError(13, "Permission denied")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse_the_new)
    with (
        pytest.raises(PlugError, match="Permission denied"),
        replace_directory(model_directory) as new,
    ):
        (new / "config.json").write_text("{}")

    assert contents(model_directory.parent) == before


def test_files_are_readable_as_any_new_file_is(model_directory: Path, tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    (tmp_path / "folder").mkdir()

    assert model_directory.stat().st_mode == (tmp_path / "folder").stat().st_mode
    for path in model_directory.iterdir():
        assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_the_sampling_told_to_modelscope_is_that_of_generate() -> None:
    settings = GenerationSettings()
    assert {name: getattr(settings, name) for name in SAMPLING} == SAMPLING

from __future__ import annotations

from pathlib import Path

import pytest

from plug.checkpoints.directory import find_model_directory
from plug.checkpoints.hub import SAMPLING
from plug.errors import UsageError
from plug.generation.settings import GenerationSettings


def test_a_directory_may_have_the_shipped_models_name(
    model_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model_directory.rename(model_directory.with_name("plug-mini-zh"))
    monkeypatch.chdir(model_directory.parent)

    assert find_model_directory("./plug-mini-zh") == Path("plug-mini-zh")


def test_an_adapter_is_no_model_and_is_told_from_other_things(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UsageError, match=r"是 LoRA 适配器，不是模型。请用 --adapter .*plug merge"):
        find_model_directory(tmp_path)


def test_files_are_readable_as_any_new_file_is(model_directory: Path, tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    (tmp_path / "folder").mkdir()

    assert model_directory.stat().st_mode == (tmp_path / "folder").stat().st_mode
    for path in model_directory.iterdir():
        assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_the_sampling_told_to_modelscope_is_that_of_generate() -> None:
    settings = GenerationSettings()
    assert {name: getattr(settings, name) for name in SAMPLING} == SAMPLING

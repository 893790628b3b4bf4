"""`configuration.json` names the task and the pipeline that ModelScope starts."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from plug.checkpoints.hub import (
    CONFIGURATION_FILE,
    PIPELINES,
    SAMPLING,
    write_finetuned_configuration,
    write_pretrained_configuration,
)
from plug.model.configuration import PRESETS, PlugConfig


def written(directory: Path) -> dict:
    return json.loads((directory / CONFIGURATION_FILE).read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("config", "task", "mode"),
    [
        (PRESETS["test"], "text-generation", "plug"),
        (
            dataclasses.replace(PRESETS["test"], encoder_final_norm_passes=2),
            "text-generation",
            "original",
        ),
        (dataclasses.replace(PRESETS["test"], num_decoder_layers=0), "fill-mask", None),
    ],
)
def test_a_pretrained_model_has_the_task_that_its_parts_allow(
    config: PlugConfig, task: str, mode: str | None, tmp_path: Path
) -> None:
    write_pretrained_configuration(tmp_path, config)

    content = written(tmp_path)
    assert content["task"] == task
    assert content["pipeline"] == {"type": "plug-generation"}
    assert content["model"].get("mode") == mode
    assert (SAMPLING.items() <= content["model"].items()) == (mode is not None)


@pytest.mark.parametrize("kind", PIPELINES)
def test_a_finetuned_model_has_its_kind_s_pipeline(kind: str, tmp_path: Path) -> None:
    write_finetuned_configuration(tmp_path, kind, num_beams=3)

    content = written(tmp_path)
    assert (content["task"], content["pipeline"]["type"]) == PIPELINES[kind]
    assert content["model"].get("num_beams") == (3 if kind == "generation" else None)


def test_a_kind_that_modelscope_has_no_task_for_gets_no_file(tmp_path: Path) -> None:
    write_finetuned_configuration(tmp_path, "reading", num_beams=1)

    assert not (tmp_path / CONFIGURATION_FILE).exists()

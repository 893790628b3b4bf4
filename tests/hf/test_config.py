"""`PlugTransformersConfig`: the keys and checks of `PlugConfig`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from plug.errors import UsageError
from plug.model.configuration import PRESETS, PlugConfig

transformers = pytest.importorskip("transformers")

from transformers import (  # noqa: E402
    AutoConfig,
)

from plug import (  # noqa: E402
    PlugForPreTraining,
    PlugTransformersConfig,
)


@pytest.mark.parametrize("preset", PRESETS)
def test_the_config_has_the_keys_and_values_of_plug_config(preset: str) -> None:
    shape = PRESETS[preset]

    config = PlugTransformersConfig(**shape.to_dict())

    assert config.to_plug_config() == shape
    assert PlugTransformersConfig.from_dict(config.to_dict()).to_plug_config() == shape
    assert config.is_encoder_decoder
    assert config.tie_word_embeddings
    assert PlugTransformersConfig().to_plug_config() == PlugConfig()


@pytest.mark.parametrize("bad", [{"hiden_size": 32}, {"hidden_size": 33}, {"vocab_size": "many"}])
def test_a_bad_key_or_value_is_refused(bad: dict[str, Any], directory: Path) -> None:
    with pytest.raises(UsageError, match=next(iter(bad))):
        PlugTransformersConfig(**PRESETS["test"].to_dict() | bad)

    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | bad))
    with pytest.raises(UsageError, match=next(iter(bad))):
        AutoConfig.from_pretrained(directory)


def test_a_value_changed_after_construction_is_checked_when_the_model_is_built() -> None:
    config = PlugTransformersConfig(**PRESETS["test"].to_dict())
    config.hidden_size = 33

    with pytest.raises(UsageError, match="hidden_size=33"):
        PlugForPreTraining(config)

"""`PlugConfig` as `transformers` wants it."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedConfig

from plug.checkpoints.directory import find_model_directory
from plug.model.configuration import PlugConfig
from plug.shipped import SHIPPED_MODEL

# Arguments of `PreTrainedConfig` that are neither our keys nor written into a plain config.json.
_CONFIG_ARGUMENTS = frozenset(
    ["attn_implementation", "experts_implementation", "name_or_path", "quantization_config"]
)


def local_path(name_or_path: Any) -> Any:
    """The directory of the model that ships with the package; any other name as it is.

    Without this, `from_pretrained("plug-mini-zh")` would look for the name on the network.
    """
    is_shipped = str(name_or_path) == SHIPPED_MODEL and not Path(SHIPPED_MODEL).exists()
    return str(find_model_directory(SHIPPED_MODEL)) if is_shipped else name_or_path


class PlugTransformersConfig(PreTrainedConfig):
    """`PlugConfig` as `transformers` wants it: the same keys, checked by the same code.

    Raises:
        UsageError: an unknown key, or a value that makes no sense.
    """

    model_type = "plug"
    # A list: the Trainer adds "loss" to it.
    keys_to_ignore_at_inference = ["past_key_values", "cache", "losses"]  # noqa: RUF012
    is_encoder_decoder: bool = True
    tie_word_embeddings: bool = True

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...  # the fields of `PlugConfig`

    def __post_init__(self, **kwargs: Any) -> None:
        checked = {
            key: value
            for key, value in kwargs.items()
            if key not in _CONFIG_ARGUMENTS and not key.startswith("_")
        }
        super().__post_init__(**kwargs | PlugConfig.from_dict(checked).to_dict())

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As `PreTrainedConfig.from_pretrained`; knows the name of the shipped model."""
        return super().from_pretrained(local_path(pretrained_model_name_or_path), *args, **kwargs)

    def to_plug_config(self) -> PlugConfig:
        """The shape alone; attributes changed since construction are checked here."""
        return PlugConfig(
            **{field.name: getattr(self, field.name) for field in dataclasses.fields(PlugConfig)}
        )

    def get_text_config(
        self, decoder: bool | None = None, encoder: bool | None = None
    ) -> PreTrainedConfig:
        """This config; for the decoder alone, with its number of layers (it sizes the caches)."""
        if not decoder or encoder:
            return self
        config = copy.copy(self)
        config.num_hidden_layers = self.num_decoder_layers
        return config

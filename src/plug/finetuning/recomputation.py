"""Which layers are computed again in the backward pass, so that less is kept until then."""

from __future__ import annotations

from functools import partial
from typing import Any, cast

from torch import nn
from torch.utils.checkpoint import checkpoint

from plug.model.layers import DecoderLayer, EncoderLayer


def layers_of(model: nn.Module) -> list[EncoderLayer | DecoderLayer]:
    """Return the layers of a model of `plug.hf`, the encoder's first; peft may be around it."""
    return [part for part in model.modules() if isinstance(part, EncoderLayer | DecoderLayer)]


def recompute_layers(model: nn.Module, count: int) -> None:
    """Have the first ``count`` layers keep nothing but their input; the others keep what they need.

    The last layers are the ones that keep more: their memory is free again when the backward pass
    comes to the first layers, which then need some to compute themselves again.

    Args:
        model: of `plug.hf`, with or without peft around it.
        count: layers; more than there are means all.
    """
    for index, layer in enumerate(layers_of(model)):
        switched = cast(Any, layer)  # a `GradientCheckpointingLayer` of transformers
        if hasattr(switched, "recomputed"):  # of `plug.finetuning.adapted_layers`
            switched.recomputed = index < count
        else:
            switched.gradient_checkpointing = index < count
            switched._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)


def is_recomputed(layer: nn.Module) -> bool:
    """Return whether a layer keeps its input alone."""
    of_transformers = getattr(layer, "gradient_checkpointing", False)
    return bool(getattr(layer, "recomputed", of_transformers))

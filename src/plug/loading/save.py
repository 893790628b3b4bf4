"""Save a model as a directory, whole or not at all."""

from __future__ import annotations

from pathlib import Path

import torch

from plug.checkpoints.directory import CONFIG_FILE, write_configs
from plug.checkpoints.weights import MAX_SHARD_BYTES, TensorSpec, WeightWriter
from plug.files import replace_directory
from plug.model.plug import Plug
from plug.quantization.linear import scheme_of
from plug.quantization.scheme import is_quantized
from plug.tokenization import PlugTokenizer


def save(
    model: Plug,
    directory: str | Path,
    *,
    tokenizer: PlugTokenizer | None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write a model directory; an older one is replaced only when the new one is whole.

    Args:
        model: on any device.
        directory: where; its parent is made if need be.
        tokenizer: saved beside the weights; None leaves it out.
        dtype: of all weights; None keeps each parameter's own.
        max_shard_bytes: the largest weight file.

    Raises:
        PlugError: the disk is full or cannot be written; what was there is untouched.
        UsageError: ``directory`` holds something that is not a model.
    """
    with replace_directory(directory, CONFIG_FILE) as temporary:
        write_model(
            model, temporary, tokenizer=tokenizer, dtype=dtype, max_shard_bytes=max_shard_bytes
        )


def write_model(
    model: Plug,
    directory: Path,
    *,
    tokenizer: PlugTokenizer | None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """What `save` writes, into a directory that is there (arguments as in `save`)."""
    state = model.state_dict()
    specs = {
        name: TensorSpec(
            tensor.dtype if dtype is None or is_quantized(name, tensor.dtype) else dtype,
            tuple(tensor.shape),
        )
        for name, tensor in state.items()
    }
    with WeightWriter(directory, specs, max_shard_bytes) as writer:
        for name, tensor in state.items():
            writer.write(name, tensor.detach())
    scheme = scheme_of(model)
    write_configs(directory, model.config, specs, None if scheme is None else scheme.to_dict())
    if tokenizer is not None:
        tokenizer.save(directory, model_max_length=model.config.max_source_length)

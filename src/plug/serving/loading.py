"""Model directories to `ServedModel`s: what a directory can do is seen from its files."""

from __future__ import annotations

from pathlib import Path

import torch

from plug.checkpoints.directory import find_model_directory
from plug.generation.generator import Generator
from plug.generation.settings import GenerationSettings
from plug.generation.window import prompt_limit, window_length
from plug.loading.load import load
from plug.loading.memory import Room
from plug.serving.engine import Engine
from plug.serving.models import ServedModel
from plug.tokenization import PlugTokenizer
from plug.zero_shot.encoder import TextEncoder


def load_model(
    name: str,
    directory: str | Path,
    *,
    rows: int,
    device: torch.device,
    dtype: torch.dtype | None = None,
) -> ServedModel:
    """A pre-trained model: it writes where it has a decoder, and understands without fine-tuning.

    Args:
        name: what clients call it.
        directory: as `plug.load` takes it.
        rows: texts written at once.
        device: where it runs.
        dtype: of its weights, as in `plug.load`.

    Raises:
        UsageError: there is no such model.
        PlugError: it is damaged, or does not fit into the memory.
    """
    found = find_model_directory(directory)
    tokenizer = PlugTokenizer.load(found)
    model = load(found, device=device, dtype=dtype, room=Room(batch_size=rows))
    config = model.config
    served = ServedModel(
        name,
        tokenizer,
        max_source_tokens=prompt_limit(config),
        token_count=min(tokenizer.vocab_size, config.vocab_size),
        encoder=TextEncoder(model, tokenizer),
    )
    if config.num_decoder_layers:
        add_engine(served, Generator(model, tokenizer), rows)
    return served


def add_engine(served: ServedModel, generator: Generator, rows: int) -> None:
    """Have ``served`` write by ``generator``."""
    engine = Engine(generator, rows)
    served.engine = engine
    served.window_tokens = window_length(generator.config, GenerationSettings())
    served.encode_prompt = lambda text: generator.encode(text, allow_special_tokens=False)
    served.check_alive = lambda: engine.is_alive
    served.on_close = engine.close

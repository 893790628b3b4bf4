"""Model directories to `ServedModel`s: what a directory can do is seen from its files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from plug.checkpoints.directory import CONFIG_FILE, RUN_FILE, find_model_directory
from plug.errors import UsageError
from plug.finetuning.classification import Classification
from plug.finetuning.generation import Generation
from plug.finetuning.kind import Kind
from plug.finetuning.plain import load_plain
from plug.finetuning.predict import kind_of
from plug.generation.generator import Generator
from plug.generation.settings import GenerationSettings
from plug.generation.window import prompt_limit, window_length
from plug.loading.estimate import Room
from plug.loading.load import load
from plug.model.configuration import PlugConfig
from plug.serving.engine import Engine
from plug.serving.models import Capability, ServedModel
from plug.tokenization import PlugTokenizer
from plug.zero_shot.encoder import TextEncoder

_BATCH = 16
_CAPABILITIES: dict[str, Capability] = {  # class of the model -> what its predictions are for
    "PlugForSequenceClassification": "classify",
    "PlugForTokenClassification": "tag",
    "PlugForQuestionAnswering": "answer",
}


def load_model(
    name: str,
    directory: str | Path,
    *,
    rows: int,
    device: torch.device,
    dtype: torch.dtype | None = None,
) -> ServedModel:
    """A model of any kind: a directory with `finetuning.json` does what it was fine-tuned for.

    A pre-trained one writes where it has a decoder, and understands without fine-tuning.

    Args:
        name: what clients call it.
        directory: as `plug.load` takes it.
        rows: texts written at once.
        device: where it runs.
        dtype: of a pre-trained model's weights, as in `plug.load`.

    Raises:
        UsageError: there is no such model.
        PlugError: it is damaged, or does not fit into the memory.
    """
    found = find_model_directory(directory)
    if (found / RUN_FILE).is_file():
        return _load_finetuned(name, found, rows, device)
    tokenizer = PlugTokenizer.load(found)
    model = load(found, device=device, dtype=dtype, room=Room(batch_size=rows))
    if model.config.num_decoder_layers:
        served = serve_plug(name, Generator(model, tokenizer), rows)
    else:
        served = _empty(name, tokenizer, model.config)
    served.encoder = TextEncoder(model, tokenizer)
    return served


def serve_plug(name: str, generator: Generator, rows: int) -> ServedModel:
    """A model that writes by ``generator``; arguments as in `load_model`."""
    served = _empty(name, generator.tokenizer, generator.config)
    engine = Engine(generator, rows)
    served.engine = engine
    served.window_tokens = window_length(generator.config, GenerationSettings())
    served.encode_prompt = lambda text: generator.encode(text, allow_special_tokens=False)
    served.stats = lambda: engine.stats
    served.check_alive = lambda: engine.is_alive
    served.on_close = engine.close
    return served


def limit_memory(device: torch.device, share: float) -> None:
    """Let this process use no more than ``share`` of a card's memory."""
    if device.type == "cuda":
        torch.cuda.set_per_process_memory_fraction(share, device)


def named_directories(values: Sequence[str]) -> dict[str, str]:
    """`NAME=DIRECTORY` of the command line, as a mapping.

    Raises:
        UsageError: a value has another form, or a name comes twice.
    """
    found: dict[str, str] = {}
    for value in values:
        name, _, directory = value.partition("=")
        if not name or not directory:
            raise UsageError(f"--finetuned {value} 应写成 名字=目录，如 news=runs/tnews。")
        if name in found:
            raise UsageError(f"--finetuned 的名字 {name} 重复。请给它们不同的名字。")
        found[name] = directory
    return found


def _empty(name: str, tokenizer: PlugTokenizer, config: PlugConfig) -> ServedModel:
    return ServedModel(
        name,
        tokenizer,
        max_source_tokens=prompt_limit(config),
        token_count=min(tokenizer.vocab_size, config.vocab_size),
    )


def _load_finetuned(name: str, directory: Path, rows: int, device: torch.device) -> ServedModel:
    kind = kind_of(directory)
    model = load_plain(kind, directory, device)
    if isinstance(kind, Generation):
        served = serve_plug(name, Generator(model, kind.tokenizer), rows)
        served.question = lambda parts: kind.sources([kind.example(parts)])[0]
        served.question_settings = GenerationSettings(
            out_length=kind.target_length, do_sample=False, num_beams=kind.num_beams
        )
        served.tuned_for = "questions"
        return served
    served = _empty(name, kind.tokenizer, PlugConfig.from_file(directory / CONFIG_FILE))
    served.tuned_for = _CAPABILITIES[kind.model_class]
    if isinstance(kind, Classification):
        served.tuned = lambda parts: _classify(kind, model, parts)
    else:
        served.tuned = lambda parts: _predict(kind, model, parts)
    return served


def _predict(
    kind: Kind[Any, Any], model: Any, parts: Sequence[Sequence[str]]
) -> list[dict[str, Any]]:
    """The records of `plug predict`; an entity's type stands at `label` too."""
    examples = [kind.example(each) for each in parts]
    found = kind.predict(model, examples, batch_size=_BATCH)
    records = [kind.record(*pair) for pair in zip(examples, found, strict=True)]
    for record in records:
        for entity in record.get("entities", ()):
            entity["label"] = entity["type"]
    return records


def _classify(
    kind: Classification, model: Any, parts: Sequence[Sequence[str]]
) -> list[dict[str, Any]]:
    """The likeliest label of each example, and every label's probability, the likeliest first."""
    examples = [kind.example(each) for each in parts]
    found = kind.probabilities(model, examples, batch_size=_BATCH).tolist()
    records = []
    for row in found:
        labels = [
            {"label": label, "probability": probability}
            | ({"label_name": kind.label_names[label]} if label in kind.label_names else {})
            for label, probability in zip(kind.labels, row, strict=True)
        ]
        labels.sort(key=lambda each: -float(str(each["probability"])))
        records.append({"label": labels[0]["label"], "labels": labels})
    return records

"""Model directories to `ServedModel`s: what a directory can do is seen from its files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
from plug.loading.adapters import is_adapter, read_adapter
from plug.loading.estimate import Room
from plug.loading.load import load
from plug.model.configuration import PlugConfig
from plug.serving.engine import AdaptedEngine, Engine
from plug.serving.models import Capability, ServedModel
from plug.serving.service import Loader
from plug.serving.settings import ServeSettings
from plug.tokenization import PlugTokenizer
from plug.zero_shot.encoder import TextEncoder

_BATCH = 16
_CAPABILITIES: dict[str, Capability] = {  # class of the model -> what its predictions are for
    "PlugForSequenceClassification": "classify",
    "PlugForTokenClassification": "tag",
    "PlugForQuestionAnswering": "answer",
}


def load_models(
    name: str,
    directory: str | Path,
    finetuned: Mapping[str, str],
    adapters: Mapping[str, str],
    settings: ServeSettings,
    *,
    device: torch.device,
    dtype: torch.dtype | None,
) -> tuple[list[ServedModel], Loader]:
    """The models that a server starts with, and what loads others while it runs.

    Args:
        name: of the first model.
        directory: of the first model, which adapters are for.
        finetuned: directories of more models, by their names.
        adapters: directories of LoRA adapters of the first model, by their names.
        settings: of the server.
        device: as in `load_model`, as is the next.
        dtype: see ``device``.

    Raises:
        UsageError: as `load_model` and `load_adapter`; two have one name, or an adapter is none.
        PlugError: as these.
    """
    names = [name, *finetuned, *adapters]
    for each in names:
        if names.count(each) > 1:
            raise UsageError(f"有两个模型都叫 {each}。请给它们不同的名字。")
    for each in adapters.values():
        if not is_adapter(each):
            raise UsageError(
                f"--adapter {each} 不是适配器的目录：里面应有 adapter_config.json，"
                "没有 config.json。完整的模型请用 --finetuned。"
            )
    for each, own in finetuned.items():
        if is_adapter(own):
            raise UsageError(f"{own} 是 LoRA 适配器，不是模型。请用 --adapter {each}={own}。")
    rows, encoded = settings.max_num_seqs, settings.max_num_batched_tokens
    base = load_model(
        name,
        directory,
        rows=rows,
        device=device,
        dtype=dtype,
        max_num_batched_tokens=encoded,
        takes_adapters=bool(adapters) or settings.models_dir is not None,
    )

    def load(name: str, own: str | Path) -> ServedModel:
        if is_adapter(own):
            return load_adapter(name, own, base, directory, device=device)
        return load_model(
            name, own, rows=rows, device=device, dtype=dtype, max_num_batched_tokens=encoded
        )

    return [base, *(load(*each) for each in (*finetuned.items(), *adapters.items()))], load


def load_model(
    name: str,
    directory: str | Path,
    *,
    rows: int,
    device: torch.device,
    dtype: torch.dtype | None = None,
    max_num_batched_tokens: int | None = None,
    takes_adapters: bool = False,
) -> ServedModel:
    """A model of any kind: a directory with `finetuning.json` does what it was fine-tuned for.

    A pre-trained one writes where it has a decoder, and understands without fine-tuning.

    Args:
        name: what clients call it.
        directory: as `plug.load` takes it.
        rows: texts written at once.
        device: where it runs.
        dtype: of a pre-trained model's weights, as in `plug.load`.
        max_num_batched_tokens: as in `AsyncEngine`.
        takes_adapters: `load_adapter` may follow.

    Raises:
        UsageError: there is no such model.
        PlugError: it is damaged, or does not fit into the memory.
    """
    found = find_model_directory(directory)
    if (found / RUN_FILE).is_file():
        kind = kind_of(found)
        if not isinstance(kind, Generation):
            return _load_understanding(name, kind, found, device)
        tuned = load_plain(kind, found, device)
        generator = Generator(tuned, kind.tokenizer, takes_adapters=takes_adapters)
        served = serve_plug(name, generator, rows, max_num_batched_tokens)
        _ask_questions(served, kind)
        return served
    tokenizer = PlugTokenizer.load(found)
    model = load(found, device=device, dtype=dtype, room=Room(batch_size=rows))
    if model.config.num_decoder_layers:
        generator = Generator(model, tokenizer, takes_adapters=takes_adapters)
        served = serve_plug(name, generator, rows, max_num_batched_tokens)
    else:
        served = _empty(name, tokenizer, model.config)
    served.encoder = TextEncoder(model, tokenizer)
    return served


def serve_plug(
    name: str, generator: Generator, rows: int, max_num_batched_tokens: int | None = None
) -> ServedModel:
    """A model that writes by ``generator``; arguments as in `load_model`."""
    served = _empty(name, generator.tokenizer, generator.config)
    engine = Engine(generator, rows, max_num_batched_tokens)
    served.engine = engine
    served.window_tokens = window_length(generator.config, GenerationSettings())
    served.encode_prompt = lambda text: generator.encode(text, allow_special_tokens=False)
    served.stats = lambda: engine.stats
    served.check_alive = lambda: engine.is_alive
    served.on_close = engine.close
    return served


def load_adapter(
    name: str,
    directory: str | Path,
    base: ServedModel,
    base_directory: str | Path,
    *,
    device: torch.device,
) -> ServedModel:
    """A LoRA adapter as a model of its own. One that writes shares weights and steps with ``base``.

    One with a head for a task of understanding gets a copy of the encoder, with the adapter in it.

    Args:
        name: what clients call it.
        directory: of `plug finetune --memory lora`, or of peft.
        base: loaded with ``takes_adapters``.
        base_directory: where ``base`` was loaded from.
        device: as in `load_model`.

    Raises:
        UsageError: it is of another model or of a kind that cannot be served.
        PlugError: it is damaged.
    """
    found, own = find_model_directory(base_directory), Path(directory).expanduser()
    kind = kind_of(found, adapter=own) if (own / RUN_FILE).is_file() else None
    if kind is not None and not isinstance(kind, Generation):
        return _load_understanding(name, kind, found, device, own)
    adapter = read_adapter(own, found)
    if not isinstance(base.engine, Engine):
        raise UsageError(f"模型 {base.name} 不能写作，适配器 {own} 用不上。请换 --model。")
    engine = base.engine
    adapted = AdaptedEngine(engine, engine.generator.add_adapter(adapter))
    served = _empty(name, base.tokenizer, engine.generator.config)
    served.engine = adapted
    served.window_tokens = base.window_tokens
    served.encode_prompt = base.encode_prompt
    served.check_alive = base.check_alive
    served.on_close = adapted.close
    if isinstance(kind, Generation):
        _ask_questions(served, kind)
    return served


def limit_memory(device: torch.device, share: float) -> None:
    """Let this process use no more than ``share`` of a card's memory."""
    if device.type == "cuda":
        torch.cuda.set_per_process_memory_fraction(share, device)


def named_directories(option: str, values: Sequence[str]) -> dict[str, str]:
    """`NAME=DIRECTORY` of an option of the command line, as a mapping.

    Raises:
        UsageError: a value has another form, or a name comes twice.
    """
    found: dict[str, str] = {}
    for value in values:
        name, _, directory = value.partition("=")
        if not name or not directory:
            raise UsageError(f"{option} {value} 应写成 名字=目录，如 news=runs/tnews。")
        if name in found:
            raise UsageError(f"{option} 的名字 {name} 重复。请给它们不同的名字。")
        found[name] = directory
    return found


def _empty(name: str, tokenizer: PlugTokenizer, config: PlugConfig) -> ServedModel:
    return ServedModel(
        name,
        tokenizer,
        max_source_tokens=prompt_limit(config),
        token_count=min(tokenizer.vocab_size, config.vocab_size),
    )


def _ask_questions(served: ServedModel, kind: Generation) -> None:
    served.question = lambda parts: kind.sources([kind.example(parts)])[0]
    served.question_settings = GenerationSettings(
        out_length=kind.target_length, do_sample=False, num_beams=kind.num_beams
    )
    served.tuned_for = "questions"


def _load_understanding(
    name: str,
    kind: Kind[Any, Any],
    directory: Path,
    device: torch.device,
    adapter: Path | None = None,
) -> ServedModel:
    model = load_plain(kind, directory, device, adapter)
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

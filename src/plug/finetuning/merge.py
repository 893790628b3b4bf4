"""An adapter and its model to one directory, a tensor at a time; and how much that moved outputs.

Weights in floats take the adapter in float32 and are rounded once. Into 8 or 4 bits a weight is
dequantised if need be, takes the adapter, and is quantised again: outputs change, by how much is
measured. Where it was in as many bits before, it is rounded at random (`Scheme.requantize`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from plug.checkpoints.directory import (
    CONFIG_FILE,
    RUN_FILE,
    find_model_directory,
    load_tokenizer,
    weight_shapes,
    write_configs,
)
from plug.checkpoints.headers import read_places
from plug.checkpoints.hub import CONFIGURATION_FILE, write_finetuned_configuration
from plug.checkpoints.weights import (
    Place,
    TensorSpec,
    WeightWriter,
    check_finite,
    check_names_and_shapes,
    finite,
    map_tensors,
)
from plug.errors import UsageError
from plug.files import new_directory, refuse_used, write_json
from plug.finetuning.kind import Kind
from plug.finetuning.plain import UNREAD, check_head, load_classifier, num_outputs
from plug.finetuning.predict import kind_of, read_run
from plug.finetuning.tasks import KindName, find_task
from plug.jsonfiles import read_json
from plug.loading.adapters import (
    BASE_KEY,
    MERGED_KEY,
    Adapter,
    check_shapes,
    merged_mark,
    read_adapter,
)
from plug.loading.load import load
from plug.model.classifier import EncoderClassifier
from plug.model.configuration import PlugConfig
from plug.model.plug import Plug
from plug.model.without_memory import without_memory
from plug.quantization.linear import quantize_modules, quantized_names
from plug.quantization.scheme import Scheme, check_saved, read_scheme
from plug.tokenization import PlugTokenizer

# What both models read for the comparison: news, advice, a poem, a recipe, a question.
TEXTS = (
    "昨天下午，市里最大的图书馆重新开放，许多读者一早就在门口排起了队。",
    "学习外语最重要的是坚持，每天读一点、写一点，日子久了自然会有进步。",
    "床前明月光，疑是地上霜。举头望明月，",
    "把土豆洗净切成小块，锅里放油烧热，先放葱姜炒出香味，再",
    "人工智能在医院里能做什么？医生们的看法",
)


class Change(NamedTuple):
    """How far outputs moved, of the model with the adapter beside it to the merged one.

    Attributes:
        largest: the largest change of a logit, as a share of the largest logit.
        mean: the mean change, as a share of the logits' standard deviation.
        same_choice: share of the positions whose likeliest token (or label) is the same.
    """

    largest: float
    mean: float
    same_choice: float


def merge_directory(
    model: str | Path | None,
    adapter: Path,
    target: Path,
    *,
    bits: int | None = None,
    compares: bool = True,
) -> Change | None:
    """Write a model with an adapter in its weights; writing holds a tensor at a time in memory.

    Args:
        model: name or directory of the adapted model.
        adapter: its directory.
        target: is not there yet, or empty; filled only when all goes well.
        bits: 8 or 4: quantise the layers; None: weights are floats, of the model's own precision.
        compares: measure how the outputs changed, which loads both models in float32.

    Returns:
        What the outputs for `TEXTS` changed; None if that was not asked for.

    Raises:
        UsageError: the adapter is of another model, 4 bits are not possible, or ``target`` is used.
        PlugError: a file is damaged, the adapter's head does not fit its labels, or the disk is
            full.
    """
    refuse_used(target)
    base = find_model_directory(model)
    added = read_adapter(adapter, base)
    has_run = (adapter / RUN_FILE).is_file()
    if added.head and not has_run:
        raise UsageError(
            f"适配器 {adapter} 有输出层，却没有 {RUN_FILE}，不知道它的任务和标签。"
            "请用 peft 载入它，再保存 merge_and_unload() 返回的模型。"
        )
    config = PlugConfig.from_file(base / CONFIG_FILE)
    tokenizer = load_tokenizer(base)
    kind = kind_of(base, adapter=adapter) if has_run else None
    if kind is not None:
        check_head(added, num_outputs(kind))
    scheme = None if bits is None else Scheme.of(bits)
    merging = _Merging(base, config, added, scheme)
    entry = None if scheme is None else scheme.to_dict()
    with new_directory(target) as new:
        with WeightWriter(new, merging.specs) as writer:
            for name, tensor in merging.tensors():
                writer.write(name, tensor)
        write_configs(new, config, merging.specs, entry)
        if kind is not None:
            run = read_run(adapter)
            run.pop(BASE_KEY, None)
            run[MERGED_KEY] = merged_mark(base, adapter)
            write_json(new / RUN_FILE, run)
            task = find_task(run["settings"]["task"])
            _write_task(new, kind, task.kind)
        tokenizer.save(
            new,
            model_max_length=config.max_source_length,
            by_character=kind is not None and kind.by_character,
        )
        return _change(base, new, added, tokenizer) if compares else None


class _Merging:
    """What is written, tensor by tensor.

    Args:
        base: directory of the adapted model, in floats or quantised.
        config: of the model.
        added: the adapter.
        scheme: how the layers will be kept; None is floats.
    """

    def __init__(
        self, base: Path, config: PlugConfig, added: Adapter, scheme: Scheme | None
    ) -> None:
        self._directory = base
        self._added, self._scheme, self._old_scheme = added, scheme, read_scheme(base / CONFIG_FILE)
        with without_memory():
            plain = _model(config, added)
            kept = _model(config, added)
            if self._old_scheme is not None:
                quantize_modules(kept, self._old_scheme)
        self._shapes = weight_shapes(plain)
        check_shapes(added, self._shapes)
        self._places = {
            name: place
            for name, place in read_places(base).items()
            if name not in added.head and not (added.has_classifier and name.startswith(UNREAD))
        }
        check_names_and_shapes(
            base,
            {name: place.spec.shape for name, place in self._places.items()},
            {name: shape for name, shape in weight_shapes(kept).items() if name not in added.head},
        )
        for name, wanted in kept.state_dict().items():
            if name in self._places:
                check_saved(base, name, self._places[name].spec.dtype, wanted.dtype)
        self._layers = set(quantized_names(plain))
        self._generator = torch.Generator().manual_seed(0)  # a merge gives the same every time
        self.specs: dict[str, TensorSpec] = {}
        for name, shape in self._shapes.items():
            layer, _, part = name.rpartition(".")
            if name in added.head:
                self.specs[name] = TensorSpec(added.head[name].dtype, shape)
            elif layer not in self._layers or part != "weight":
                self.specs[name] = self._places[name].spec
            elif scheme is None:  # of a quantised weight, the precision that its bias has kept
                kept_in = name if self._old_scheme is None else f"{layer}.bias"
                self.specs[name] = TensorSpec(self._places[kept_in].spec.dtype, shape)
            else:
                for own, (dtype, own_shape) in scheme.tensors(shape[0], shape[1]).items():
                    self.specs[f"{layer}.{own}"] = TensorSpec(dtype, own_shape)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor of `specs`."""
        for name in self._shapes:
            layer, _, part = name.rpartition(".")
            if name in self._added.head:
                yield name, self._added.head[name]
            elif layer not in self._layers or part != "weight":
                yield from self._base({name: self._places[name]})
            else:
                for own, tensor in self._layer(layer).items():
                    yield f"{layer}.{own}", tensor

    def _layer(self, layer: str) -> dict[str, Tensor]:
        """A layer's weight with the adapter in it, rounded to what is written."""
        old = {} if self._old_scheme is None else self._old_scheme.tensors(*self._shape(layer))
        places = {f"{layer}.{own}": self._places[f"{layer}.{own}"] for own in old or ("weight",)}
        parts = {name.removeprefix(f"{layer}."): tensor for name, tensor in self._base(places)}
        low_rank = self._added.layers.get(layer)
        if low_rank is None and self._scheme == self._old_scheme:
            return parts
        weight = parts["weight"]
        if self._old_scheme is not None:
            weight = self._old_scheme.dequantize(parts, torch.float32)
        if self._scheme is not None:
            weight = weight.float()
        if low_rank is not None:
            weight = low_rank.merged(weight)
            check_finite(self._added.directory, [(f"{layer}.weight", weight)])
        if self._scheme is None:
            return {"weight": weight}
        if self._scheme == self._old_scheme:
            return self._scheme.requantize(weight, parts, self._generator)
        return self._scheme.quantize(weight)

    def _base(self, places: Mapping[str, Place]) -> Iterator[tuple[str, Tensor]]:
        """Tensors of the adapted model; NaN would be rounded to numbers, or be the adapter's."""
        return finite(self._directory, map_tensors(places))

    def _shape(self, layer: str) -> tuple[int, int]:
        out, inputs = self._shapes[f"{layer}.weight"]
        return out, inputs


def _model(config: PlugConfig, added: Adapter) -> nn.Module:
    """The modules of the merged model: with a head, no decoder."""
    if added.has_classifier:
        return EncoderClassifier(config, added.num_outputs)
    return Plug(config)


def _write_task(directory: Path, kind: Kind[Any, Any], name: KindName) -> None:
    """Have `config.json` say what `plug finetune` writes there, and drop what does not apply."""
    config = read_json(directory / CONFIG_FILE) | {"architectures": [kind.model_class]}
    if kind.labels:
        config["id2label"] = {str(index): label for index, label in enumerate(kind.labels)}
        config["label2id"] = kind.label_ids
    write_json(directory / CONFIG_FILE, config)
    if name != "generation":
        (directory / "generation_config.json").unlink(missing_ok=True)
        (directory / CONFIGURATION_FILE).unlink(missing_ok=True)
    write_finetuned_configuration(directory, name, kind.num_beams)


def _change(base: Path, merged: Path, added: Adapter, tokenizer: PlugTokenizer) -> Change:
    before = _outputs(base, added, tokenizer, added.directory)
    after = _outputs(merged, added, tokenizer, None)
    moved = (after - before).abs()
    return Change(
        largest=(moved.max() / before.abs().max()).item(),
        mean=(moved.mean() / before.std()).item(),
        same_choice=(after.argmax(-1) == before.argmax(-1)).float().mean().item(),
    )


def _outputs(
    directory: Path, added: Adapter, tokenizer: PlugTokenizer, adapter: Path | None
) -> Tensor:
    """Logits for `TEXTS`, (positions, tokens or labels), in float32 on the CPU."""
    model: Any
    if added.has_classifier:
        model = load_classifier(directory, added.num_outputs, adapter)
    else:
        model = load(directory, dtype=torch.float32, adapter=adapter)
    model.requires_grad_(False)  # but not in inference mode, where layers in integers round inputs
    found = []
    for text in TEXTS:
        ids = torch.tensor([[tokenizer.cls_token_id, *tokenizer.encode(text)]])
        if added.has_classifier:
            found.append(model(ids)[0])
        elif model.decoder is None:
            found.append(model.mlm_logits(model.encode(ids))[0])
        else:
            found.append(model.lm_logits(model.decode(ids, model.encode(ids)))[0])
    return torch.cat(found)

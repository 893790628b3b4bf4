"""Fine-tuned models for predictions, without `transformers`: the same weights, the same outputs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from plug.checkpoints.directory import CONFIG_FILE, RUN_FILE
from plug.checkpoints.headers import read_places
from plug.checkpoints.weights import check_names_and_shapes, finite, map_tensors
from plug.errors import PlugError
from plug.finetuning.kind import Kind
from plug.loading.adapters import Adapter, attach, check_shapes, read_adapter, shapes_of
from plug.loading.estimate import Room, weight_bytes
from plug.loading.load import load
from plug.loading.memory import free_memory
from plug.model.classifier import EncoderClassifier
from plug.model.configuration import PlugConfig
from plug.model.without_memory import without_memory
from plug.quantization.linear import quantize_modules
from plug.quantization.scheme import check_saved, is_quantized, read_scheme

# Parts of a pre-trained model that a classifier's directory may hold, and nothing reads.
UNREAD = ("decoder.", "mlm_head.", "sentence_head.")


def load_plain(
    kind: Kind[Any, Any], directory: Path, device: torch.device, adapter: Path | None = None
) -> Any:
    """What `Kind.predict` takes as the model, in float32; as it is saved where that does not fit.

    Args:
        kind: what the model was fine-tuned for.
        directory: of the model; with an adapter, of the one that it adapts.
        device: where it runs.
        adapter: directory of an adapter, with the head of the ``kind``.

    Raises:
        UsageError: the adapter is of another model.
        PlugError: weights are missing, damaged, NaN or infinite, or do not fit `config.json`; or
            the adapter's head does not fit its labels.
    """
    if not num_outputs(kind):
        dtype = _float32_if_it_fits(directory, device)
        return load(directory, device=device, dtype=dtype, adapter=adapter)
    classifier = load_classifier(directory, num_outputs(kind), adapter)
    return _Predicting(classifier, kind.model_class).to(device)


def num_outputs(kind: Kind[Any, Any]) -> int:
    """Return the rows of the head that a kind's models have; 0: they write, and have none."""
    if kind.model_class == "PlugForConditionalGeneration":
        return 0
    return len(kind.labels) or 2  # question answering has the two ends of an answer


def check_head(adapter: Adapter, rows: int) -> None:
    """Raise a `PlugError` unless an adapter's head has so many rows; 0: it has none."""
    if adapter.num_outputs != rows:
        raise PlugError(
            f"适配器 {adapter.directory} 的输出层有 {adapter.num_outputs} 行，而它的 {RUN_FILE}"
            f" 要 {rows} 行（每个标签一行；写作没有输出层）。请重新微调，或从备份恢复。"
        )


def _float32_if_it_fits(directory: Path, device: torch.device) -> torch.dtype | None:
    """float32, or None on a GPU whose memory it would take: the 27B has 104 GB so."""
    free = free_memory(device)
    if device.type != "cuda" or free is None:
        return torch.float32
    scheme = read_scheme(directory / CONFIG_FILE)
    config = PlugConfig.from_file(directory / CONFIG_FILE)
    weights = weight_bytes(config, 32 if scheme is None else scheme.bits, 4)
    return torch.float32 if Room().need(config, weights, 4).with_overhead().total < free else None


class _Predicting(nn.Module):
    """A classifier whose outputs have the names that `transformers` gives them."""

    def __init__(self, classifier: EncoderClassifier, model_class: str) -> None:
        super().__init__()
        self._classifier = classifier
        self._model_class = model_class

    @property
    def device(self) -> torch.device:
        return self._classifier.classifier.weight.device

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        token_type_ids: Tensor | None = None,
    ) -> SimpleNamespace:
        logits = self._classifier(input_ids, attention_mask, token_type_ids)
        match self._model_class:
            case "PlugForSequenceClassification":
                return SimpleNamespace(logits=logits[:, 0])
            case "PlugForQuestionAnswering":
                is_padding = attention_mask[..., None] == 0
                start, end = logits.float().masked_fill(is_padding, -torch.inf).unbind(-1)
                return SimpleNamespace(start_logits=start, end_logits=end)
            case _:
                return SimpleNamespace(logits=logits)


def load_classifier(
    directory: Path, num_labels: int, adapter: Path | None = None
) -> EncoderClassifier:
    """The encoder and its head in float32, with an adapter if there is one (as `load_plain`)."""
    added = None if adapter is None else read_adapter(adapter, directory)
    with without_memory():
        model = EncoderClassifier(PlugConfig.from_file(directory / CONFIG_FILE), num_labels)
        if (scheme := read_scheme(directory / CONFIG_FILE)) is not None:
            quantize_modules(model, scheme)
    if added is not None:
        check_head(added, num_labels)
        check_shapes(added, shapes_of(model))
    places = {
        name: place for name, place in read_places(directory).items() if not name.startswith(UNREAD)
    }
    head = {} if added is None else added.head  # in place of the model's own, if it has one
    places = {name: place for name, place in places.items() if name not in head}
    wanted = model.state_dict()
    shapes = {name: place.spec.shape for name, place in places.items()}
    check_names_and_shapes(
        directory,
        shapes | {name: tuple(tensor.shape) for name, tensor in head.items()},
        {name: tuple(tensor.shape) for name, tensor in wanted.items()},
    )
    for name, place in places.items():
        check_saved(directory, name, place.spec.dtype, wanted[name].dtype)
    weights = (
        (name, each if is_quantized(name, wanted[name].dtype) else each.float())
        for name, each in map_tensors(places)
    )
    state = dict(finite(directory, weights)) | {name: each.float() for name, each in head.items()}
    model.load_state_dict(state, assign=True)
    if added is not None:
        attach(model, replace(added, head={}))
    return model.eval()

"""Fine-tuned models for predictions, without `transformers`: the same weights, the same outputs."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from plug.checkpoints.directory import CONFIG_FILE
from plug.checkpoints.headers import read_places
from plug.checkpoints.weights import check_names_and_shapes, finite, map_tensors
from plug.errors import PlugError
from plug.finetuning.kind import Kind
from plug.loading.load import load
from plug.model.classifier import EncoderClassifier
from plug.model.configuration import PlugConfig
from plug.quantization.scheme import read_scheme

# Parts of a pre-trained model that a classifier's directory may hold, and nothing reads.
_UNREAD = ("decoder.", "mlm_head.", "sentence_head.")


def load_plain(kind: Kind[Any, Any], directory: Path, device: torch.device) -> Any:
    """What `Kind.predict` takes as the model, in float32.

    Raises:
        PlugError: weights are missing, damaged, NaN or infinite, or do not fit `config.json`.
    """
    if kind.model_class == "PlugForConditionalGeneration":
        return load(directory, device=device, dtype=torch.float32)
    num_labels = len(kind.labels) or 2  # question answering has the two ends of an answer
    return _Predicting(_load_classifier(directory, num_labels), kind.model_class).to(device)


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


def _load_classifier(directory: Path, num_labels: int) -> EncoderClassifier:
    if read_scheme(directory / CONFIG_FILE) is not None:
        raise PlugError(f"{directory} 是量化过的分类模型，还不支持。请用微调得到的原目录。")
    with torch.device("meta"):
        model = EncoderClassifier(PlugConfig.from_file(directory / CONFIG_FILE), num_labels)
    places = {
        name: place
        for name, place in read_places(directory).items()
        if not name.startswith(_UNREAD)
    }
    check_names_and_shapes(
        directory,
        {name: place.spec.shape for name, place in places.items()},
        {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()},
    )
    weights = ((name, tensor.float()) for name, tensor in map_tensors(places))
    model.load_state_dict(dict(finite(directory, weights)), assign=True)
    return model.eval()

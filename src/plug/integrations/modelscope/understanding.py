"""Pipelines for understanding: labels, entities, masks; answers in ModelScope's form."""

from __future__ import annotations

from typing import Any

from modelscope.pipelines.builder import PIPELINES

from plug.errors import UsageError
from plug.evaluation.metrics import entity_spans
from plug.finetuning.predict import Predictor
from plug.integrations.modelscope.base import PlugPipeline, device_of
from plug.zero_shot.encoder import TextEncoder
from plug.zero_shot.fill_mask import MASK, fill_mask

BATCH_SIZE = 32


class _Finetuned(PlugPipeline):
    """A pipeline over what `plug finetune` made. Arguments and errors as in `PlugPipeline`."""

    def __init__(self, model: Any, device: str = "gpu", **options: Any) -> None:
        super().__init__(model, device, **options)
        self.predictor = Predictor(self.directory, device_of(device))


@PIPELINES.register_module("nli", module_name="plug-text-classification", force=True)
@PIPELINES.register_module(
    "sentence-similarity", module_name="plug-text-classification", force=True
)
@PIPELINES.register_module(
    "text-classification", module_name="plug-text-classification", force=True
)
class PlugTextClassification(_Finetuned):
    """``{"scores": […], "labels": […]}``, the likeliest first."""

    known = frozenset({"topk", "batch_size"})

    def check(self, each: Any, place: str) -> None:
        parts = _parts(each)
        if not parts or not all(isinstance(part, str) for part in parts):
            raise UsageError(
                f"{place}应是文字、两段文字的元组，或 {{'text': …, 'text2': …}}，却是 {each!r}。"
            )

    def answer(self, inputs: list[Any], options: dict[str, Any]) -> list[dict[str, Any]]:
        """The ``topk`` likeliest labels of each input (all, for None)."""
        batch_size, topk = _count(options, "batch_size", BATCH_SIZE), _count(options, "topk", None)
        kind: Any = self.predictor.kind
        examples = [kind.example(_parts(each)) for each in inputs]
        probabilities = kind.probabilities(self.predictor.model, examples, batch_size=batch_size)
        best = probabilities.sort(descending=True, stable=True)
        return [
            {"scores": scores[:topk], "labels": [kind.labels[index] for index in order[:topk]]}
            for scores, order in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        ]


@PIPELINES.register_module(
    "named-entity-recognition", module_name="plug-token-classification", force=True
)
@PIPELINES.register_module(
    "token-classification", module_name="plug-token-classification", force=True
)
class PlugTokenClassification(_Finetuned):
    """``{"output": [{"type", "start", "end", "span"}, …]}``: entities, by characters."""

    known = frozenset({"batch_size"})

    def answer(self, inputs: list[str], options: dict[str, Any]) -> list[dict[str, Any]]:
        """The entities of each text."""
        batch_size = _count(options, "batch_size", BATCH_SIZE)
        examples = [self.predictor.kind.example([text]) for text in inputs]
        found = self.predictor(examples, batch_size=batch_size)
        return [
            {
                "output": [
                    {"type": kind, "start": start, "end": end, "span": text[start:end]}
                    for kind, start, end in entity_spans(tags)
                ]
            }
            for text, tags in zip(inputs, found, strict=True)
        ]


@PIPELINES.register_module("fill-mask", module_name="plug-generation", force=True)
class PlugFillMask(PlugPipeline):
    """``{"text": …}``: the text with the likeliest piece at each `[MASK]`."""

    def __init__(self, model: Any, device: str = "gpu", **options: Any) -> None:
        super().__init__(model, device, **options)
        self.encoder = TextEncoder(self.directory, device=device_of(device))

    def answer(self, inputs: list[str], options: dict[str, Any]) -> list[dict[str, Any]]:  # noqa: ARG002
        """Each text, filled."""
        return [{"text": self._fill(text)} for text in inputs]

    def _fill(self, text: str) -> str:
        for choices in fill_mask(text, top_k=1, model=self.encoder):
            text = text.replace(MASK, choices[0].text, 1)
        return text


def _parts(each: Any) -> tuple[Any, ...]:
    """The one or two texts of an input in any of ModelScope's forms; empty where it has none."""
    if isinstance(each, str):
        return (each,)
    if isinstance(each, dict) and "text" in each and each.keys() <= {"text", "text2"}:
        return tuple(each.values()) if "text2" not in each else (each["text"], each["text2"])
    return each if isinstance(each, tuple) else ()


def _count(options: dict[str, Any], name: str, default: int | None) -> Any:
    value = options.get(name, default)
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise UsageError(f"{name}={value!r} 应是不小于 1 的整数。")
    return value

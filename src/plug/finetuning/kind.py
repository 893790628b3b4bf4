"""`Kind`: what the four ways to fine-tune have in common; each is one file beside this one."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor

from plug.checkpoints.headers import read_places
from plug.errors import PlugError, UsageError
from plug.evaluation.report import Evaluation
from plug.finetuning.tasks import KindName
from plug.model.heads import IGNORE_INDEX, numbers
from plug.tokenization import PlugTokenizer

Features = dict[str, Any]  # arguments of a model's forward: id lists, or one number an example
OnProgress = Callable[[int], None]  # told how many examples are done
ExampleT = TypeVar("ExampleT")
PredictionT = TypeVar("PredictionT")

SAMPLES = 20  # examples that a report shows


class Kind(ABC, Generic[ExampleT, PredictionT]):
    """Between examples and a model: features, predictions, scores.

    Args:
        tokenizer: of the model.
        labels: of the task; empty where the kind has none.
        label_names: labels in words, where the data has them.
        source_length: tokens read at most, [CLS] and [SEP] counted.
        target_length: tokens written at most, or of an answer.
        num_beams: for generation; 1 is argmax.
        pairs: of classification: whether an example is two texts; None where nothing is known.
        tag_scheme: of labelling: what the training file's tags were written in.
    """

    model_class: ClassVar[str]
    by_character: ClassVar[bool] = False  # whether texts are cut into characters, not pieces
    reads_all: ClassVar[bool] = True  # in windows; else what is over ``source_length`` is cut off

    def __init__(
        self,
        tokenizer: PlugTokenizer,
        labels: Sequence[str] = (),
        label_names: dict[str, str] | None = None,
        *,
        source_length: int,
        target_length: int = 30,
        num_beams: int = 1,
        pairs: bool | None = None,
        tag_scheme: str | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.labels = list(labels)
        self.label_names = label_names or {}
        self.label_ids = {label: index for index, label in enumerate(self.labels)}
        self.source_length = source_length
        self.target_length = target_length
        self.num_beams = num_beams
        self.pairs = pairs
        self.tag_scheme = tag_scheme

    @classmethod
    def labels_of(cls, examples: Sequence[ExampleT], source: str) -> list[str]:  # noqa: ARG003
        """The labels that the training examples have, sorted; empty where the kind has none.

        Args:
            examples: to learn from.
            source: the file's name, for errors.

        Raises:
            UsageError: there is nothing to choose from, or one label is written in two ways.
        """
        return []

    @classmethod
    def facts_of(cls, examples: Sequence[ExampleT]) -> dict[str, Any]:  # noqa: ARG003
        """What else the training examples say: arguments of `Kind` by name."""
        return {}

    def to_dict(self) -> dict[str, Any]:
        """What `finetuning.json` keeps beside the settings, to make this kind again."""
        scheme = {} if self.tag_scheme is None else {"tag_scheme": self.tag_scheme}
        return {
            "labels": self.labels,
            "label_names": self.label_names,
            "pairs": self.pairs,
            **scheme,
        }

    @abstractmethod
    def check(self, examples: Sequence[ExampleT], *, training: bool) -> None:
        """Raise `UsageError` at an example that cannot be learnt from or scored."""

    @abstractmethod
    def features(self, examples: Sequence[ExampleT]) -> list[Features]:
        """What the model learns from: inputs and labels."""

    @abstractmethod
    def predict(
        self,
        model: Any,
        examples: Sequence[ExampleT],
        *,
        batch_size: int,
        on_progress: OnProgress | None = None,
    ) -> list[PredictionT]:
        """A prediction for each example, in order."""

    @abstractmethod
    def evaluate(
        self, examples: Sequence[ExampleT], predictions: Sequence[PredictionT]
    ) -> Evaluation:
        """Scores of predictions for examples that have answers."""

    @abstractmethod
    def example(self, parts: Sequence[str]) -> ExampleT:
        """What a user typed, as an example.

        Raises:
            UsageError: more or fewer parts than the kind takes.
        """

    @abstractmethod
    def record(self, example: ExampleT, prediction: PredictionT) -> dict[str, Any]:
        """An example and its prediction as users see them, for JSON."""

    def load_model(
        self,
        directory: Path,
        *,
        from_scratch: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> Any:
        """The model of a directory, with a head for this kind's labels.

        Raises:
            PlugError: the weights are damaged or do not fit, or miss more than the head.
        """
        cls, head = self._class_and_head()
        read_places(directory)  # what transformers would say of a damaged file is no sentence
        if from_scratch:
            return cls(cls.config_class.from_pretrained(directory, **head)).to(dtype)
        try:
            model, info = cls.from_pretrained(
                directory, dtype=dtype, output_loading_info=True, **head
            )
        except RuntimeError as error:
            raise PlugError(f"{directory} 的权重与 config.json 不符：{error}") from None
        missing = sorted(name for name in info["missing_keys"] if "classifier." not in name)
        if missing:
            raise PlugError(f"{directory} 缺少权重 {missing[:5]} 等 {len(missing)} 个。")
        return model

    def empty_model(self, directory: Path, *, dtype: torch.dtype) -> Any:
        """The model of `load_model` without memory for its weights; its head has its values.

        Raises:
            PlugError: the directory has weights that this model has no place for.
        """
        cls, head = self._class_and_head()
        with torch.device("meta"):
            model = cls(cls.config_class.from_pretrained(directory, **head)).to(dtype)
        model.check_saved_names(directory, read_places(directory))
        if hasattr(model, "classifier"):
            model.classifier = model.new_head(directory).to(dtype)
        return model

    def _class_and_head(self) -> tuple[Any, dict[str, Any]]:
        """The class of the model, and what its config says of the labels."""
        from transformers import logging

        from plug import hf as classes

        logging.set_verbosity_error()  # its notes on heads that are new
        logging.disable_progress_bar()
        head: dict[str, Any] = {}
        if self.labels:
            head = {"id2label": dict(enumerate(self.labels)), "label2id": self.label_ids}
        return getattr(classes, self.model_class), head


_KINDS: dict[KindName, tuple[str, str]] = {  # file beside this one, class
    "classification": ("classification", "Classification"),
    "labelling": ("labelling", "Labelling"),
    "reading": ("question_answering", "QuestionAnswering"),
    "generation": ("generation", "Generation"),
}


def find_kind(name: KindName) -> type[Kind[Any, Any]]:
    """The class of that name."""
    module, kind = _KINDS[name]
    return getattr(importlib.import_module(f"plug.finetuning.{module}"), kind)


def make_kind(name: KindName, *args: Any, **options: Any) -> Kind[Any, Any]:
    """The kind of that name; arguments as in `Kind`."""
    return find_kind(name)(*args, **options)


@dataclass(frozen=True, slots=True)
class Collator:
    """Pads features to the batch's longest: ids with [PAD], labels with -100."""

    pad_token_id: int

    def __call__(self, features: Sequence[Features]) -> dict[str, Tensor]:
        batch = {key: self._column(key, [each[key] for each in features]) for key in features[0]}
        lengths = torch.tensor([len(each["input_ids"]) for each in features])
        positions = torch.arange(batch["input_ids"].shape[1])
        batch["attention_mask"] = (positions < lengths[:, None]).long()
        return batch

    def _column(self, key: str, values: list[Any]) -> Tensor:
        if isinstance(values[0], list):
            padding = {"input_ids": self.pad_token_id, "labels": IGNORE_INDEX}.get(key, 0)
            longest = max(map(len, values))
            values = [value + [padding] * (longest - len(value)) for value in values]
        return torch.tensor(values)


def frame(
    tokenizer: PlugTokenizer, first: list[int], second: list[int] | None, length: int
) -> Features:
    """[CLS] first [SEP], or [CLS] first [SEP] second [SEP] with token type 1 on the latter.

    What is over ``length`` is cut from the end of the longer one, as in BERT.
    """
    over = len(first) + len(second or ()) + (2 if second is None else 3) - length
    if second is None:
        first = first[: len(first) - max(0, over)]
    elif over > 0:
        kept = len(first) + len(second) - over
        first_kept = min(len(first), max(kept - len(second), kept - kept // 2))
        first, second = first[:first_kept], second[: kept - first_kept]
    ids = [tokenizer.cls_token_id, *first, tokenizer.sep_token_id]
    tail = [] if second is None else [*second, tokenizer.sep_token_id]
    return {"input_ids": ids + tail, "token_type_ids": [0] * len(ids) + [1] * len(tail)}


def run_batches(
    model: Any,
    features: Sequence[Features],
    collate: Collator,
    batch_size: int,
    on_progress: OnProgress | None,
) -> Iterator[tuple[list[int], Any]]:
    """The model's outputs, batch by batch, the longest first; with the features' numbers.

    Raises:
        PlugError: outputs are NaN or infinite.
    """
    order = sorted(range(len(features)), key=lambda index: -len(features[index]["input_ids"]))
    done = 0
    with inference(model):
        for first in range(0, len(order), batch_size):
            indices = order[first : first + batch_size]
            batch = collate([features[index] for index in indices])
            output = model(**{key: value.to(model.device) for key, value in batch.items()})
            for name in ("logits", "start_logits", "end_logits"):
                if (logits := getattr(output, name, None)) is not None:
                    numbers(logits)
            yield indices, output
            done += len(indices)
            if on_progress:
                on_progress(done)


@contextmanager
def inference(model: Any) -> Iterator[None]:
    """No gradients, no dropout, and on a GPU bfloat16."""
    model.eval()
    kind = model.device.type
    with torch.inference_mode(), torch.autocast(kind, torch.bfloat16, enabled=kind == "cuda"):
        yield


def exactly(parts: Sequence[str], least: int, most: int, meaning: str) -> Sequence[str]:
    """``parts``, if there are as many as wanted.

    Raises:
        UsageError: otherwise, or one is empty.
    """
    if not all(part.strip() for part in parts):
        raise UsageError(f"这个任务要给{meaning}，却有空的，或只有空白。请给出文字。")
    if not least <= len(parts) <= most:
        raise UsageError(f"这个任务要给{meaning}，却给了 {len(parts)} 段文字。")
    return parts

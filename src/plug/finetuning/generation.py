"""Writing a text from the parts of a source: question generation and the like."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

from plug.distributed.fully_sharded import gathers_layers, with_own_parameters
from plug.errors import UsageError
from plug.evaluation.metrics import characters, rouge_l
from plug.evaluation.question_generation import score_generation
from plug.evaluation.report import Evaluation, Table, histogram_plot
from plug.finetuning.kind import SAMPLES, Features, Kind, OnProgress, exactly
from plug.finetuning.lora import without_peft
from plug.finetuning.readers import SEPARATOR, GenerationExample
from plug.generation.generator import Generator
from plug.generation.settings import GenerationSettings
from plug.model.plug import Plug
from plug.model.without_memory import without_memory

if TYPE_CHECKING:
    from plug.hf import PlugForConditionalGeneration

TokenIds = tuple[int, ...]


class Generation(Kind[GenerationExample, TokenIds]):
    """[CLS] part [SEP] part [SEP] is read, cut at the end; the target and [SEP] are written.

    Predictions are argmax, or a beam search with ``num_beams``.
    """

    model_class = "PlugForConditionalGeneration"
    reads_all = False

    def check(self, examples: Sequence[GenerationExample], *, training: bool) -> None:
        """A target longer than the limit cannot be learnt; it can be scored."""
        if not training:
            return
        targets = self.tokenizer.encode_batch([example.target or "" for example in examples])
        lengths = [len(target) + 1 for target in targets]  # [SEP] ends it
        over = [index for index, length in enumerate(lengths) if length > self.target_length]
        if over:
            raise UsageError(
                f"{examples[over[0]].place}要生成的文字有 {lengths[over[0]]} 个词元，超过上限"
                f" target_length={self.target_length}（共 {len(over)} 例如此）。"
                f"请删去它们，或用 --target-length {max(lengths)}。"
            )

    def features(self, examples: Sequence[GenerationExample]) -> list[Features]:
        targets = self.tokenizer.encode_batch([example.target or "" for example in examples])
        end = self.tokenizer.sep_token_id
        return [
            {"input_ids": [self.tokenizer.cls_token_id, *source, end], "labels": [*target, end]}
            for source, target in zip(self.sources(examples), targets, strict=True)
        ]

    def sources(self, examples: Sequence[GenerationExample]) -> list[list[int]]:
        """Ids of the parts with [SEP] between, without the outer [CLS] and [SEP]."""
        parts = self.tokenizer.encode_batch(
            list(chain.from_iterable(example.source for example in examples))
        )
        sources = []
        for example in examples:
            mine, parts = parts[: len(example.source)], parts[len(example.source) :]
            joined = list(chain.from_iterable([*ids, self.tokenizer.sep_token_id] for ids in mine))
            sources.append(joined[:-1][: self.source_length - 2])
        return sources

    def predict(
        self,
        model: Any,
        examples: Sequence[GenerationExample],
        *,
        batch_size: int,
        on_progress: OnProgress | None = None,
    ) -> list[TokenIds]:
        bare: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
        return with_own_parameters(
            bare, lambda: self._predict(model, examples, batch_size, on_progress)
        )

    def _predict(
        self,
        model: Any,
        examples: Sequence[GenerationExample],
        batch_size: int,
        on_progress: OnProgress | None,
    ) -> list[TokenIds]:
        generator = Generator(
            as_plug(model),
            self.tokenizer,
            graphs=False,
            stacks_weights=isinstance(model, Plug),  # else it is being trained
        )
        settings = GenerationSettings(
            out_length=self.target_length, do_sample=False, num_beams=self.num_beams
        )
        sources = self.sources(examples)
        order = sorted(range(len(sources)), key=lambda index: -len(sources[index]))
        found: dict[int, TokenIds] = {}
        for first in range(0, len(order), batch_size):
            indices = order[first : first + batch_size]
            batch: list[str | list[int]] = [sources[index] for index in indices]
            results = generator(batch, settings, seed=0, batch_size=batch_size)
            found |= {i: result.token_ids for i, result in zip(indices, results, strict=True)}
            if on_progress:
                on_progress(len(found))
        return [found[index] for index in range(len(examples))]

    def evaluate(
        self, examples: Sequence[GenerationExample], predictions: Sequence[TokenIds]
    ) -> Evaluation:
        references = [example.target or "" for example in examples]
        texts = [self.tokenizer.decode(ids, is_cut=True) for ids in predictions]
        overlaps = [
            rouge_l(characters(reference), characters(text))
            for reference, text in zip(references, texts, strict=True)
        ]
        sources = [SEPARATOR.join(example.source)[:200] for example in examples[:SAMPLES]]
        return Evaluation(
            metrics=score_generation(references, predictions, self.tokenizer),
            samples=Table(
                "样例",
                ("来源", "答案", "预测", "ROUGE-L"),
                list(zip(sources, references, texts, overlaps, strict=False)),
            ),
            plots=[histogram_plot("rouge", "各例的 ROUGE-L", overlaps, "ROUGE-L")],
        )

    def example(self, parts: Sequence[str]) -> GenerationExample:
        if len(parts) == 1:
            parts = parts[0].split(SEPARATOR)
        return GenerationExample(source=tuple(exactly(parts, 1, 8, "来源的一段或几段文字")))

    def record(self, example: GenerationExample, prediction: TokenIds) -> dict[str, Any]:
        source = SEPARATOR.join(example.source)
        return {"src_txt": source, "prediction": self.tokenizer.decode(prediction, is_cut=True)}


def as_plug(model: PlugForConditionalGeneration | Plug) -> Plug:
    """The same modules as a `Plug`, which is what `Generator` writes with."""
    if isinstance(model, Plug):
        return model
    bare: Any = model
    if hasattr(model, "get_base_model"):
        # What is sharded stays in peft's layers: copies of them would not see weights gathered.
        peft_model: Any = model
        bare = peft_model.get_base_model() if gathers_layers(model) else without_peft(model)
    with without_memory():
        plug = Plug(bare.config.to_plug_config())
    for name, _ in list(plug.named_children()):
        setattr(plug, name, getattr(bare, name))
    return plug

"""Batches of both stages. A batch is a pure function of the seed and the step.

So a resumed run continues exactly without any state of the loader, and N processes together see the
batch that one process would see. A *shape* is drawn for each batch: the length of its sequences, or
of source and target. Only documents that are long enough for the shape are read, so the encoder's
side has no padding and needs no attention mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from plug.errors import UsageError
from plug.pretraining.masking import Array, Masking
from plug.pretraining.palm import PalmExample, palm_example, passage_start
from plug.pretraining.structbert import (
    ANOTHER_DOCUMENT,
    NEXT,
    StructBertExample,
    pair_spans,
    structbert_example,
)
from plug.pretraining.tokens import Domain
from plug.tokenization import PlugTokenizer

Batch = dict[str, Tensor]
Shape = tuple[int, ...]  # (length,) in stage 1, (source, target) in stage 2; in tokens


@dataclass(frozen=True, slots=True)
class Document:
    """One document inside its domain's ids."""

    domain: Domain
    start: int
    end: int

    def is_same(self, other: Document) -> bool:
        return (self.domain.name, self.start) == (other.domain.name, other.start)

    def ids(self, begin: int, length: int) -> Array:
        return self.domain.tokens[begin : min(begin + length, self.end)].astype(np.int64)

    def boundaries(self) -> Array:
        left, right = np.searchsorted(self.domain.sentences, (self.start, self.end))
        return self.domain.sentences[left:right]


class DocumentSampler:
    """Draw a domain by its weight, then a document of a minimum length by its size.

    Args:
        domains: the corpus.
        exponent: a domain's weight is its number of tokens to this power (0: all domains alike).
        factors: by domain name, what its weight is multiplied by.
        least: the minimum length of a document, in tokens.

    Raises:
        UsageError: no document is long enough, or a factor names no domain.
    """

    def __init__(
        self,
        domains: Sequence[Domain],
        exponent: float,
        factors: dict[str, float],
        least: int,
    ) -> None:
        unknown = sorted(factors.keys() - {domain.name for domain in domains})
        if unknown:
            raise UsageError(f"domain_factors 里的领域 {unknown} 不在语料中。")
        self._domains: list[tuple[Domain, Array, npt.NDArray[np.float64]]] = []
        weights = []
        for domain in domains:
            sizes = np.diff(domain.documents)
            numbers = np.flatnonzero(sizes >= least)
            if not len(numbers):
                continue
            shares = np.cumsum(sizes[numbers], dtype=np.float64)
            self._domains.append((domain, numbers, shares / shares[-1]))
            weights.append(len(domain.tokens) ** exponent * factors.get(domain.name, 1.0))
        if not weights:
            raise UsageError(f"语料里没有一篇不短于 {least} 个词元的文档。请用更小的 shapes。")
        if not sum(weights):
            raise UsageError(
                f"domain_factors 让所有有不短于 {least} 个词元的文档的领域权重都成了 0。"
            )
        # documents that can be drawn: those of domains whose weight is not 0
        self.documents = sum(
            len(numbers)
            for (_, numbers, _), weight in zip(self._domains, weights, strict=True)
            if weight
        )
        self._weights = np.cumsum(np.asarray(weights) / sum(weights))

    def draw(self, rng: np.random.Generator) -> Document:
        # the last cumulated share may round to just below 1
        index = min(int(np.searchsorted(self._weights, rng.random())), len(self._weights) - 1)
        domain, numbers, shares = self._domains[index]
        number = numbers[min(int(np.searchsorted(shares, rng.random())), len(numbers) - 1)]
        return Document(domain, int(domain.documents[number]), int(domain.documents[number + 1]))


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchPlan:
    """What the batches of both stages are made from. `RunConfig` explains the settings."""

    domains: Sequence[Domain]
    tokenizer: PlugTokenizer
    shapes: Sequence[tuple[Shape, float]]
    batch_tokens: int
    domain_exponent: float
    domain_factors: dict[str, float]
    mlm_rate: float
    seed: int
    rank: int = 0
    world_size: int = 1


def global_batch_tokens(batch: Batch, batch_tokens: int) -> int:
    """Return the tokens of a step's whole batch, given one process's share of it."""
    each = sum(batch[k].shape[1] for k in ("input_ids", "decoder_input_ids") if k in batch)
    return batch_tokens // each * each


class _Batches(torch.utils.data.Dataset[Batch]):
    """What both stages share: they draw a shape, make this process's rows, and stack them."""

    def __init__(self, plan: BatchPlan) -> None:
        self.plan = plan
        least_rows = min(plan.batch_tokens // sum(shape) for shape, _ in plan.shapes)
        if least_rows < plan.world_size:
            raise UsageError(
                f"batch_tokens={plan.batch_tokens} 太小：最长的一种 shapes 只够 {least_rows} 条，"
                f"而每个进程（共 {plan.world_size} 个）至少要一条。"
            )
        tokenizer = plan.tokenizer
        self.masking = Masking(
            rate=plan.mlm_rate,
            mask_token_id=tokenizer.mask_token_id,
            first_random_id=max(tokenizer.special_ids) + 1,
            last_random_id=tokenizer.vocab_size,
        )
        self._samplers = {
            shape: DocumentSampler(
                plan.domains, plan.domain_exponent, plan.domain_factors, self.least_tokens(shape)
            )
            for shape, _ in plan.shapes
        }
        weights = np.asarray([weight for _, weight in plan.shapes], dtype=np.float64)
        self._shape_weights = weights / weights.sum()

    def __getitem__(self, step: int) -> Batch:
        plan = self.plan
        rng = np.random.default_rng((plan.seed, step))
        shape = plan.shapes[rng.choice(len(plan.shapes), p=self._shape_weights)][0]
        rows = plan.batch_tokens // sum(shape)
        first, end = (rows * rank // plan.world_size for rank in (plan.rank, plan.rank + 1))
        sampler, masking = self._samplers[shape], self.masking_at(step)
        examples = [
            self.example(shape, sampler, masking, np.random.default_rng((plan.seed, step, index)))
            for index in range(first, end)
        ]
        return {
            name: torch.from_numpy(np.stack([getattr(one, name) for one in examples]))
            for name in examples[0]._fields
        }

    def least_tokens(self, shape: Shape) -> int:
        """Return the minimum length of a document for this shape, in tokens."""
        raise NotImplementedError

    def masking_at(self, step: int) -> Masking | None:  # noqa: ARG002
        """Return how sequences are corrupted at ``step``; None leaves them clean."""
        return self.masking

    def example(
        self,
        shape: Shape,
        sampler: DocumentSampler,
        masking: Masking | None,
        rng: np.random.Generator,
    ) -> Any:
        """Return one example of this shape, a named tuple of arrays."""
        raise NotImplementedError


class StructBertBatches(_Batches):
    """Stage 1: two segments. The second is the next, the previous, or another document's."""

    def __init__(self, plan: BatchPlan, *, shuffle_rate: float, sentence_objective: bool) -> None:
        super().__init__(plan)
        self.shuffle_rate = shuffle_rate
        self.sentence_objective = sentence_objective
        for shape, sampler in self._samplers.items():
            if sentence_objective and sampler.documents < 2:
                raise UsageError(
                    f"语料里不短于 {self.least_tokens(shape)} 个词元的文档只有一篇，配不成"
                    "“另一篇文档”。请增加语料、用更小的 shapes，或设 sentence_objective=false。"
                )

    def least_tokens(self, shape: Shape) -> int:
        return shape[0] - 3  # [CLS] first [SEP] second [SEP]

    def example(
        self,
        shape: Shape,
        sampler: DocumentSampler,
        masking: Masking | None,
        rng: np.random.Generator,
    ) -> StructBertExample:
        assert masking is not None, "stage 1 always masks"
        tokenizer, room = self.plan.tokenizer, self.least_tokens(shape)
        first_length = int(rng.integers(room // 4, room - room // 4 + 1))
        lengths = (first_length, room - first_length)
        label = int(rng.integers(3)) if self.sentence_objective else NEXT
        document = sampler.draw(rng)
        inside = NEXT if label == ANOTHER_DOCUMENT else label
        first, second = pair_spans(
            document.boundaries(), document.start, document.end, lengths, inside, rng
        )
        source = document
        if label == ANOTHER_DOCUMENT:
            while (source := sampler.draw(rng)).is_same(document):
                pass
            _, second = pair_spans(
                source.boundaries(), source.start, source.end, lengths, inside, rng
            )
        return structbert_example(
            document.ids(first, lengths[0]),
            source.ids(second, lengths[1]),
            label if self.sentence_objective else None,
            cls_token_id=tokenizer.cls_token_id,
            sep_token_id=tokenizer.sep_token_id,
            masking=masking,
            shuffle_rate=self.shuffle_rate,
            rng=rng,
        )


class PalmBatches(_Batches):
    """Stage 2: the encoder reads the first part of a passage, the decoder writes the rest.

    The source is corrupted for masked LM before step ``clean_from``, and clean from then on.
    """

    def __init__(self, plan: BatchPlan, *, clean_from: int, whole_sentence_share: float) -> None:
        super().__init__(plan)
        self.clean_from = clean_from
        self.whole_sentence_share = whole_sentence_share

    def masking_at(self, step: int) -> Masking | None:
        return self.masking if step < self.clean_from else None

    def least_tokens(self, shape: Shape) -> int:
        source, target = shape
        return source - 2 + max(1, target // 4)  # a shorter target would be mostly padding

    def example(
        self,
        shape: Shape,
        sampler: DocumentSampler,
        masking: Masking | None,
        rng: np.random.Generator,
    ) -> PalmExample:
        tokenizer, (source, target) = self.plan.tokenizer, shape
        document = sampler.draw(rng)
        whole = rng.random() < self.whole_sentence_share
        begin = passage_start(
            document.boundaries(), document.start, document.end, (source - 2, target), whole, rng
        )
        cut = begin + source - 2
        return palm_example(
            document.ids(begin, source - 2),
            document.ids(cut, target),
            target_length=target,
            ends=cut + target >= document.end,
            cls_token_id=tokenizer.cls_token_id,
            sep_token_id=tokenizer.sep_token_id,
            pad_token_id=tokenizer.pad_token_id,
            masking=masking,
            rng=rng,
        )

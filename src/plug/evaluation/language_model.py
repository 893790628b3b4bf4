"""How well a model continues text: nats a token and nats a character of what comes next.

Of each document the encoder reads the first `source_length` tokens, and the decoder is scored,
teacher-forced, on up to `target_length` tokens that follow. Nats a character compare models of
different vocabularies; nats a token do not.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from plug.errors import UsageError
from plug.model.configuration import PlugConfig
from plug.model.heads import numbers
from plug.model.plug import Plug
from plug.tokenization import PlugTokenizer

IGNORE_INDEX = -100
LENGTH = 128  # tokens read, and scored, where the model has positions for them


@dataclass(frozen=True, slots=True)
class LanguageModelScore:
    """Sums over documents, and the ratios people compare."""

    documents: int = 0  # scored
    skipped: int = 0  # too short to have anything to score
    tokens: int = 0  # scored: those of the targets
    characters: int = 0  # of the original text, from the first target token to the last
    nats: float = 0.0  # minus the log-probability of all targets
    read: int = 0  # tokens of sources and targets
    unknown: int = 0  # [UNK] among them

    @property
    def nats_per_token(self) -> float:
        return self.nats / self.tokens

    @property
    def nats_per_character(self) -> float:
        return self.nats / self.characters

    @property
    def unknown_share(self) -> float:
        return self.unknown / self.read


class Example(NamedTuple):
    """One document, cut."""

    source: list[int]  # without [CLS] and [SEP]
    target: list[int]
    characters: int  # of the original text that the target covers


@torch.inference_mode()
def evaluate_language_model(
    model: Plug,
    tokenizer: PlugTokenizer,
    documents: Iterable[str],
    *,
    source_length: int | None = None,
    target_length: int | None = None,
    batch_size: int = 16,
) -> LanguageModelScore:
    """Score ``model`` on ``documents``; on the model's device, in its dtype, the loss in fp32.

    The source is `[CLS]` tokens `[SEP]`; the decoder starts from `[CLS]`, and the token that ends
    a text is not scored.

    Args:
        model: with a decoder.
        tokenizer: the model's.
        documents: each is cut into a source and a target.
        source_length: tokens read; None is `default_lengths`'.
        target_length: tokens scored after them, at most; None is `default_lengths`'.
        batch_size: documents at once.

    Raises:
        UsageError: the model has no decoder or another vocabulary, a length is out of its range,
            or no document is long enough to score.
    """
    default_source, default_target = default_lengths(model.config)
    source_length = default_source if source_length is None else source_length
    target_length = default_target if target_length is None else target_length
    _check(model.config, tokenizer, source_length, target_length, batch_size)
    counted = skipped = tokens = characters = read = unknown = 0
    nats = 0.0
    examples = (cut(text, tokenizer, source_length, target_length) for text in documents)
    for batch in _batches(examples, batch_size):
        kept = [example for example in batch if example.target]
        skipped += len(batch) - len(kept)
        if not kept:
            continue
        nats += _nats(model, tokenizer, kept)
        counted += len(kept)
        for source, target, covered in kept:
            tokens += len(target)
            characters += covered
            read += len(source) + len(target)
            unknown += (source + target).count(tokenizer.unk_token_id)
    if not counted:
        raise UsageError(
            f"{skipped} 篇文档都不超过 {source_length} 个词元，没有可评分的部分。"
            "请用更长的文本，或减小 --source-length。"
        )
    return LanguageModelScore(counted, skipped, tokens, characters, nats, read, unknown)


def default_lengths(config: PlugConfig) -> tuple[int, int]:
    """Return 128 source and 128 target tokens, or half of the model's positions if that is less."""
    length = min(LENGTH, config.max_position_embeddings // 2)
    return length, length


def cut(text: str, tokenizer: PlugTokenizer, source_length: int, target_length: int) -> Example:
    """Tokenize the document whole, then cut: no piece is broken at the border."""
    ids, offsets = tokenizer.encode_with_offsets(text)
    end = min(len(ids), source_length + target_length)
    target = ids[source_length:end]
    characters = offsets[end - 1][1] - offsets[source_length][0] if target else 0
    return Example(ids[:source_length], target, characters)


def _batches(examples: Iterable[Example], batch_size: int) -> Iterator[list[Example]]:
    iterator = iter(examples)
    while batch := list(islice(iterator, batch_size)):
        yield batch


def _nats(model: Plug, tokenizer: PlugTokenizer, batch: list[Example]) -> float:
    device = model.embeddings.word_embeddings.weight.device
    start = model.config.decoder_start_token_id
    pad = model.config.pad_token_id
    sources = [
        [tokenizer.cls_token_id, *example.source, tokenizer.sep_token_id] for example in batch
    ]
    input_ids = _pad(sources, pad, device)
    attention_mask = _pad([[1] * len(source) for source in sources], 0, device)
    decoder_input_ids = _pad([[start, *example.target[:-1]] for example in batch], pad, device)
    labels = _pad([example.target for example in batch], IGNORE_INDEX, device)
    encoded = model.encode(input_ids, attention_mask)
    logits = model.lm_logits(model.decode(decoder_input_ids, encoded, attention_mask))
    losses = F.cross_entropy(
        logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORE_INDEX, reduction="sum"
    )
    return float(numbers(losses))


def _pad(rows: list[list[int]], value: int, device: torch.device) -> Tensor:
    longest = max(map(len, rows))
    return torch.tensor([row + [value] * (longest - len(row)) for row in rows], device=device)


def _check(
    config: PlugConfig,
    tokenizer: PlugTokenizer,
    source_length: int,
    target_length: int,
    batch_size: int,
) -> None:
    longest = config.max_position_embeddings
    for name, length, most in (
        ("source_length", source_length, longest - 2),  # [CLS] and [SEP] stand around it
        ("target_length", target_length, longest),
    ):
        if not 1 <= length <= most:
            raise UsageError(f"{name}={length} 应在 1…{most} 之内（模型最多 {longest} 个位置）。")
    if batch_size < 1:
        raise UsageError(f"batch_size={batch_size} 应不小于 1。")
    if not config.num_decoder_layers:
        raise UsageError("这个模型只有编码器，不能续写，没法评分。请用第二阶段训练出的模型。")
    if tokenizer.vocab_size > config.vocab_size:
        raise UsageError(
            f"分词器有 {tokenizer.vocab_size} 个词元，多过模型的 {config.vocab_size} 个，不是一套。"
        )

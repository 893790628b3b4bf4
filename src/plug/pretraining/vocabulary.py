"""Train our own vocabulary on a corpus: `plug pretrain vocab`.

Byte-pair encoding over the cuts of `plug.tokenization.PRE_TOKENIZATION`. The vocabulary holds, in
this order: the special tokens, the 256 bytes, the most frequent characters, the merged pieces.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from tokenizers.trainers import BpeTrainer

from plug.errors import UsageError
from plug.pretraining.corpus import domain_name, read_documents
from plug.tokenization import BYTE_TOKENS, PRE_TOKENIZATION, PlugTokenizer
from plug.tokenizer_files import SPECIAL_TOKENS

# What Chinese text must be able to say whatever the corpus holds.
ALWAYS_PRESENT = "\n “”‘’—…，。、；：？！（）《》「」『』【】·～"
LONGEST_PIECE = 4  # characters; longer pieces are set phrases of laws and notices


def sample_documents(paths: Iterable[Path], characters_per_domain: int) -> Iterator[str]:
    """Documents of each domain, from the start of every file, up to its share of characters."""
    taken: Counter[str] = Counter()
    by_domain: dict[str, list[Path]] = {}
    for path in paths:
        by_domain.setdefault(domain_name(path), []).append(path)
    for domain, files in by_domain.items():
        for path in files:
            limit = taken[domain] + characters_per_domain / len(files)
            for document in read_documents(path):
                yield document
                taken[domain] += len(document)
                if taken[domain] >= limit:
                    break


def train(documents: Iterable[str], vocab_size: int, alphabet_size: int) -> PlugTokenizer:
    """A tokenizer of at most ``vocab_size`` pieces, ``alphabet_size`` of them single characters.

    The same documents in the same order give the same bytes.

    Raises:
        UsageError: ``vocab_size`` leaves no room beyond special tokens, bytes and characters, or
            ``alphabet_size`` none for what is always present.
    """
    fixed = [*SPECIAL_TOKENS.values(), *BYTE_TOKENS]
    if alphabet_size < len(ALWAYS_PRESENT):
        raise UsageError(f"单字个数 {alphabet_size} 太小，应不小于 {len(ALWAYS_PRESENT)}。")
    if vocab_size < len(fixed) + alphabet_size:
        raise UsageError(
            f"词表大小 {vocab_size} 放不下 {len(fixed)} 个特殊符号与字节和 {alphabet_size} 个单字。"
        )
    texts = list(documents)  # read twice: for their characters, then for their pieces
    alphabet = frequent_characters(texts, alphabet_size)
    trainee = Tokenizer(models.BPE())
    trainee.pre_tokenizer = pre_tokenizers.Split(Regex(PRE_TOKENIZATION), "isolated")
    trainer = BpeTrainer(
        vocab_size=vocab_size - len(fixed),
        limit_alphabet=len(alphabet),
        initial_alphabet=alphabet,
        max_token_length=LONGEST_PIECE,
        show_progress=False,
    )
    trainee.train_from_iterator(texts, trainer)
    trained = json.loads(trainee.to_str())["model"]
    learned = sorted(trained["vocab"], key=trained["vocab"].__getitem__)
    vocabulary = {piece: index for index, piece in enumerate([*fixed, *learned])}
    merges = [(left, right) for left, right in trained["merges"]]
    return PlugTokenizer.from_pieces(vocabulary, merges)


def frequent_characters(texts: Iterable[str], size: int) -> list[str]:
    """`ALWAYS_PRESENT` and the most frequent other characters, ``size`` in all, by code point.

    Of characters equally frequent the lower code points are taken. (`BpeTrainer` would choose among
    them by the order of a hash table, which differs from run to run.)
    """
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(text)
    others = sorted(counts.keys() - set(ALWAYS_PRESENT), key=lambda each: (-counts[each], each))
    return sorted([*ALWAYS_PRESENT, *others[: size - len(ALWAYS_PRESENT)]])

"""Scores of written text: BLEU-4 as the original scores it and strictly, ROUGE-L, and more.

The original compares what its tokenizer makes of both texts: lower-cased, [UNK] deleted, so that
what it cannot write does not count. The strict score deletes nothing: the reference is the text as
it is, case and all, and an [UNK] is a wrong character.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from plug.evaluation.metrics import characters, corpus_bleu, distinct, rouge_l
from plug.tokenization import PlugTokenizer

UNKNOWN = "\N{REPLACEMENT CHARACTER}"  # what the strict score sees of an [UNK]


def original_string(ids: Sequence[int], tokenizer: PlugTokenizer) -> str:
    """Text as the original scores it.

    Tokens are joined, `##` dropped, all from the first [SEP] on cut, [CLS] and [UNK] deleted.
    """
    kept = list(ids)
    if tokenizer.sep_token_id in kept:
        kept = kept[: kept.index(tokenizer.sep_token_id)]
    kept = [index for index in kept if index not in tokenizer.special_ids]
    if not tokenizer.is_original:
        return tokenizer.decode(kept, is_cut=True)
    tokens = [tokenizer.backend.id_to_token(index) or "" for index in kept]
    return "".join(tokens).replace("##", "")


def strict_string(ids: Sequence[int], tokenizer: PlugTokenizer) -> str:
    """Text as a reader sees it; each [UNK] is one character that no reference has."""
    return tokenizer.decode(ids, is_cut=True).replace("[UNK]", UNKNOWN)


def score_generation(
    references: Sequence[str], predictions: Sequence[Sequence[int]], tokenizer: PlugTokenizer
) -> dict[str, float]:
    """Corpus scores of predictions (token ids) against one reference text each.

    Returns:
        bleu4 (as the original scores it), bleu4_strict, rouge_l, exact_match (both strict),
        distinct_1, distinct_2 and length (mean, in characters) of the predictions.
    """
    encoded = tokenizer.encode_batch(references)
    theirs = [characters(original_string(ids, tokenizer)) for ids in encoded]
    ours = [characters(original_string(ids, tokenizer)) for ids in predictions]
    strict_theirs = [characters(text) for text in references]
    strict_ours = [characters(strict_string(ids, tokenizer)) for ids in predictions]
    pairs = list(zip(strict_theirs, strict_ours, strict=True))
    return {
        "bleu4": corpus_bleu([[text] for text in theirs], ours),
        "bleu4_strict": corpus_bleu([[text] for text in strict_theirs], strict_ours),
        "rouge_l": fmean(rouge_l(reference, text) for reference, text in pairs),
        "exact_match": fmean(reference == text for reference, text in pairs),
        "distinct_1": distinct(strict_ours, 1),
        "distinct_2": distinct(strict_ours, 2),
        "length": fmean(map(len, strict_ours)),
    }

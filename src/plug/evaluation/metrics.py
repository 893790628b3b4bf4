"""Scores of predictions against answers: pure functions, no model and no torch.

Texts are scored character by character: every non-blank character is its own token, as the
original scores them. All scores are shares from 0 to 1.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from typing import NamedTuple

Z_95 = 1.959963984540054  # 97.5th percentile of the normal distribution


class Interval(NamedTuple):
    """Ends of a 95% confidence interval."""

    low: float
    high: float


def wilson_interval(right: int, total: int, z: float = Z_95) -> Interval:
    """Confidence interval of a share ``right`` / ``total``.

    Source: Wilson 1927; Brown, Cai, DasGupta 2001, equation 4.
    """
    share, extra = right / total, z * z / total
    centre = (share + extra / 2) / (1 + extra)
    half = z / (1 + extra) * math.sqrt(share * (1 - share) / total + extra / (4 * total))
    return Interval(max(0.0, centre - half), min(1.0, centre + half))


def confusion_matrix(
    answers: Sequence[str], predictions: Sequence[str], labels: Sequence[str]
) -> list[list[int]]:
    """How often label i (rows) was called label j (columns)."""
    counts = Counter(zip(answers, predictions, strict=True))
    return [[counts[answer, prediction] for prediction in labels] for answer in labels]


def corpus_bleu(
    references: Sequence[Sequence[Sequence[Hashable]]],
    hypotheses: Sequence[Sequence[Hashable]],
    max_order: int = 4,
) -> float:
    """Corpus BLEU without smoothing: clipped n-gram precisions and the brevity penalty.

    Args:
        references: of each hypothesis one or more, in tokens; the one closest in length counts
            for the brevity penalty, the shorter where two are as close.
        hypotheses: in tokens.
        max_order: longest n-grams.

    Source: Papineni et al. 2002, section 2.3.
    """
    matches, totals = [0] * max_order, [0] * max_order
    reference_length = hypothesis_length = 0
    for candidates, hypothesis in zip(references, hypotheses, strict=True):
        hypothesis_length += len(hypothesis)
        reference_length += min(
            (abs(len(candidate) - len(hypothesis)), len(candidate)) for candidate in candidates
        )[1]
        for order in range(1, max_order + 1):
            allowed: Counter[tuple[Hashable, ...]] = Counter()
            for candidate in candidates:
                allowed |= ngrams(candidate, order)
            found = ngrams(hypothesis, order)
            matches[order - 1] += (found & allowed).total()
            totals[order - 1] += found.total()
    if not all(matches):
        return 0.0
    precisions = [match / total for match, total in zip(matches, totals, strict=True)]
    penalty = min(0.0, 1 - reference_length / hypothesis_length)
    return math.exp(penalty + sum(map(math.log, precisions)) / max_order)


def ngrams(tokens: Sequence[Hashable], order: int) -> Counter[tuple[Hashable, ...]]:
    """How often each n-gram of ``order`` tokens occurs."""
    return Counter(tuple(tokens[i : i + order]) for i in range(len(tokens) - order + 1))


def rouge_l(reference: Sequence[Hashable], hypothesis: Sequence[Hashable]) -> float:
    """F1 of the longest common subsequence.

    Source: Lin 2004, section 3.1, with beta 1.
    """
    common = longest_common_subsequence(reference, hypothesis)
    return 2 * common / (len(reference) + len(hypothesis)) if common else 0.0


def longest_common_subsequence(first: Sequence[Hashable], second: Sequence[Hashable]) -> int:
    """Length of the longest sequence that both hold in order, not necessarily in one piece."""
    row = [0] * (len(second) + 1)
    for one in first:
        diagonal = 0
        for index, other in enumerate(second, start=1):
            above = row[index]
            row[index] = diagonal + 1 if one == other else max(above, row[index - 1])
            diagonal = above
    return row[-1]


def longest_common_run(first: Sequence[Hashable], second: Sequence[Hashable]) -> int:
    """Length of the longest run of tokens that both hold in one piece."""
    best, row = 0, [0] * (len(second) + 1)
    for one in first:
        diagonal = 0
        for index, other in enumerate(second, start=1):
            diagonal, row[index] = row[index], diagonal + 1 if one == other else 0
            best = max(best, row[index])
    return best


def distinct(texts: Iterable[Sequence[Hashable]], order: int) -> float:
    """Share of n-grams that are unlike all others.

    Source: Li et al. 2016, arXiv:1510.03055, section 5.2.
    """
    counts: Counter[tuple[Hashable, ...]] = Counter()
    for tokens in texts:
        counts += ngrams(tokens, order)
    return len(counts) / counts.total() if counts else 0.0


def characters(text: str) -> list[str]:
    """Every non-blank character, a token each."""
    return [character for character in text if not character.isspace()]


def answer_exact_match(answers: Sequence[str], prediction: str) -> float:
    """1 where the prediction is one of the answers, case and Chinese punctuation left aside.

    Source: the evaluation script of CMRC2018.
    """
    return float(any(_without_marks(answer) == _without_marks(prediction) for answer in answers))


def answer_f1(answers: Sequence[str], prediction: str) -> float:
    """The best F1 over the answers, in the longest common run of words.

    A Chinese character is a word, and so is a run of Latin letters and digits.

    Source: the evaluation script of CMRC2018, which cuts Latin text by NLTK where this takes runs.
    """
    return max((_run_f1(_words(answer), _words(prediction)) for answer in answers), default=0.0)


def _run_f1(answer: list[str], prediction: list[str]) -> float:
    common = longest_common_run(answer, prediction)
    return 2 * common / (len(answer) + len(prediction)) if common else 0.0


_MARKS = frozenset("-:_*^/\\~`+=，。：？！“”；’《》·、「」（）－～『』")  # those of the script
_WORD = re.compile(r"[\u4e00-\u9fa5]|[^\W\u4e00-\u9fa5]+(?:[.,][^\W\u4e00-\u9fa5]+)*|[^\w\s]")


def _words(text: str) -> list[str]:
    return _WORD.findall(_without_marks(text))


def _without_marks(text: str) -> str:
    return "".join(character for character in text.lower().strip() if character not in _MARKS)


class Entity(NamedTuple):
    """A stretch of tokens and its type."""

    kind: str
    start: int
    end: int  # the token after the last


def entity_spans(tags: Sequence[str]) -> list[Entity]:
    """Entities of BIO tags, read strictly: B- begins one, I- of its type continues it.

    An I- that continues nothing belongs to no entity.
    """
    entities: list[Entity] = []
    for index, tag in enumerate(tags):
        if tag.startswith("B-"):
            entities.append(Entity(tag[2:], index, index + 1))
        elif tag.startswith("I-") and entities and entities[-1][::2] == (tag[2:], index):
            entities[-1] = entities[-1]._replace(end=index + 1)
    return entities


class EntityScore(NamedTuple):
    """Precision, recall and F1 of entities, and how many the answers hold."""

    precision: float
    recall: float
    f1: float
    support: int


def entity_scores(
    answers: Sequence[Sequence[str]], predictions: Sequence[Sequence[str]]
) -> tuple[EntityScore, dict[str, EntityScore]]:
    """Scores over all entities (micro), and by type in alphabetical order.

    An entity is right if its first token, last token and type are. A share of nothing is 0.

    Args:
        answers: BIO tags of each text.
        predictions: as many tags for each text.

    Source: Tjong Kim Sang and De Meulder 2003 (CoNLL), as `seqeval` counts it in strict mode.
    """
    wanted, found, right = Counter[str](), Counter[str](), Counter[str]()
    for answer, prediction in zip(answers, predictions, strict=True):
        theirs, ours = set(entity_spans(answer)), set(entity_spans(prediction))
        wanted.update(entity.kind for entity in theirs)
        found.update(entity.kind for entity in ours)
        right.update(entity.kind for entity in theirs & ours)
    by_kind = {
        kind: _entity_score(right[kind], found[kind], wanted[kind])
        for kind in sorted(wanted.keys() | found.keys())
    }
    return _entity_score(right.total(), found.total(), wanted.total()), by_kind


def _entity_score(right: int, found: int, wanted: int) -> EntityScore:
    return EntityScore(
        precision=right / found if found else 0.0,
        recall=right / wanted if wanted else 0.0,
        f1=2 * right / (found + wanted) if found + wanted else 0.0,
        support=wanted,
    )

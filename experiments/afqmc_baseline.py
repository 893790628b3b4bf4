"""What can be told of AFQMC without any pre-training: logistic regression on shared n-grams.

    python experiments/afqmc_baseline.py --data tasks/afqmc

Features of a pair are the characters and pairs of characters that both sentences have, and those
that one of them has. The best of a few strengths of regularization on the development file counts,
as the best epoch does in docs/results.md. Prints one JSON line.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any, cast

import numpy as np
import scipy.sparse
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression

from plug.finetuning.readers import ClassificationExample
from plug.finetuning.tasks import TASKS, read_examples

Pair = tuple[str, str, str]
STRENGTHS = (0.003, 0.01, 0.03, 0.1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    arguments = parser.parse_args()
    train, dev = (_pairs(next(arguments.data.glob(f"{part}.*"))) for part in ("train", "dev"))
    counter = CountVectorizer(analyzer="char", ngram_range=(1, 2), min_df=5, binary=True)
    counter.fit(text for first, second, _ in train for text in (first, second))

    def features(pairs: list[Pair]) -> Any:
        first, second = (counter.transform(pair[part] for pair in pairs) for part in range(2))
        return scipy.sparse.hstack([first.multiply(second), abs(first - second)])

    answers, wanted = (np.array([label for *_, label in part]) for part in (train, dev))
    inputs, asked = features(train), features(dev)
    accuracy = {}
    for strength in STRENGTHS:
        model = LogisticRegression(C=strength, max_iter=300).fit(inputs, answers)
        accuracy[strength] = round(float((model.predict(asked) == wanted).mean()), 4)
    best, majority = max(accuracy.values()), round(float((wanted == "0").mean()), 4)
    print(json.dumps({"majority": majority, "accuracy": best, "by_strength": accuracy}))


def _pairs(path: Path) -> list[Pair]:
    """Both texts and the label of each example."""
    examples = cast(list[ClassificationExample], read_examples(TASKS["afqmc"], path, answered=True))
    return [(each.text_a, each.text_b or "", each.label or "") for each in examples]


if __name__ == "__main__":
    main()

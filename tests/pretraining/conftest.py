"""A corpus and settings that train in a second."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from plug.pretraining.settings import RunConfig
from plug.pretraining.tokens import Domain, write_tokens
from plug.tokenization import PlugTokenizer

SUBJECTS = ["今天", "天气", "山上", "公园", "我们"]
VERBS = ["很好", "有座庙", "去看花", "看天"]


@pytest.fixture(autouse=True)
def quick(request: pytest.FixtureRequest) -> None:
    """Pictures are not drawn, but where a test asks for `drawn`."""
    request.getfixturevalue("undrawn")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small train faster on one thread, and do not wait where others use the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def chi_square() -> Callable[[list[int], list[float]], float]:
    """How far counts are from what shares of their sum would be."""

    def compute(observed: list[int], shares: list[float]) -> float:
        expected = np.asarray(shares) * sum(observed)
        return float(((np.asarray(observed) - expected) ** 2 / expected).sum())

    return compute


@pytest.fixture(scope="session")
def corpus_files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two domains, 60 documents each, of sentences made of few words: easily learned."""
    folder = tmp_path_factory.mktemp("corpus")
    rng = random.Random(0)
    files = []
    for name in ("novels-00", "news-00"):
        documents = [
            "".join(
                f"{rng.choice(SUBJECTS)}{rng.choice(VERBS)}，{rng.choice(VERBS)}。"
                for _ in range(rng.randint(12, 30))
            )
            for _ in range(60)
        ]
        files.append(folder / f"{name}.txt")
        files[-1].write_text("\n\n".join(documents), encoding="utf-8")
    return files


@pytest.fixture(scope="session")
def corpus(
    corpus_files: list[Path],
    tiny_tokenizer: PlugTokenizer,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """`corpus_files`, encoded."""
    folder = tmp_path_factory.mktemp("encoded") / "corpus"
    list(write_tokens(corpus_files, tiny_tokenizer, folder, heldout=0.05))
    return folder


@pytest.fixture
def settings(corpus: Path, tmp_path: Path) -> Callable[..., RunConfig]:
    """Settings of a short run into ``tmp_path/run``; stage 1's shape unless told otherwise."""

    def make(**changes: Any) -> RunConfig:
        defaults: dict[str, Any] = {
            "corpus": str(corpus),
            "output": str(tmp_path / "run"),
            "steps": 6,
            "shapes": [[32, 1.0]],
            "batch_tokens": 256,
            "learning_rate": 1e-3,
            "preset": "test",
            "precision": "fp32",
            "dropout": 0.0,
            "workers": 0,
            "log_every": 1,
        }
        return RunConfig(**(defaults | changes))

    return make


@pytest.fixture(scope="session")
def unique_domains() -> list[Domain]:
    """Two domains in which every token occurs once: where an id stands tells where it is from.

    Documents of 40 to 400 tokens; a sentence begins every 3 to 12 of them.
    """
    rng = np.random.default_rng(0)
    domains, first_id = [], 5
    for name in ("a", "b"):
        sizes = rng.integers(40, 400, 40)
        documents = np.concatenate(([0], np.cumsum(sizes)))
        starts: list[int] = []
        for begin, end in pairwise(documents):
            position = int(begin)
            while position < end:
                starts.append(position)
                position += int(rng.integers(3, 13))
        total = int(documents[-1])
        ids = np.arange(first_id, first_id + total, dtype=np.uint16)
        first_id += total
        domains.append(Domain(name, ids, documents, np.asarray(starts)))
    assert first_id < UNIQUE_VOCABULARY
    return domains


UNIQUE_VOCABULARY = 30000


class UniqueTokenizer:
    """What batches ask of a tokenizer, with room for `unique_domains`."""

    vocab_size = UNIQUE_VOCABULARY
    pad_token_id, unk_token_id, cls_token_id, sep_token_id, mask_token_id = range(5)
    special_ids = frozenset(range(5))


@pytest.fixture(scope="session")
def unique_tokenizer() -> Any:
    return UniqueTokenizer()

"""Training our own vocabulary: what it must hold, and that it learns pieces by frequency."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from plug.errors import UsageError
from plug.pretraining.vocabulary import ALWAYS_PRESENT, frequent_characters, sample_documents, train
from plug.tokenization import BYTE_TOKENS, SPECIAL_TOKENS


def test_the_most_frequent_pieces_are_learned_first() -> None:
    documents = ["山上。"] * 50 + ["庙里。"] * 30 + ["甲乙。"] * 2
    fixed = len(SPECIAL_TOKENS) + len(BYTE_TOKENS)
    alphabet = len(ALWAYS_PRESENT) + 6
    tokenizer = train(documents, fixed + alphabet + 2, alphabet)

    assert tokenizer.vocab_size == fixed + alphabet + 2
    assert [tokenizer.backend.id_to_token(i) for i in (-2 + tokenizer.vocab_size,)] == ["山上"]
    assert tokenizer.backend.id_to_token(tokenizer.vocab_size - 1) == "庙里"
    assert len(tokenizer.encode("甲乙")) == 2


def test_rare_characters_become_bytes() -> None:
    documents = ["山山山上上"] * 9 + ["鬱"]
    tokenizer = train(documents, 400, len(ALWAYS_PRESENT) + 2)
    assert len(tokenizer.encode("上")) == 1
    rare = [tokenizer.backend.id_to_token(i) for i in tokenizer.encode("鬱")]
    assert rare == [f"<0x{byte:02X}>" for byte in "鬱".encode()]


@pytest.mark.parametrize(("size", "alphabet"), [(100, 50), (300, 100), (400, 0), (400, -5)])
def test_sizes_that_do_not_fit(size: int, alphabet: int) -> None:
    with pytest.raises(UsageError):
        train(["山上。"], size, alphabet)


def test_each_domain_gives_its_share_from_every_file(tmp_path: Path) -> None:
    for name, text in (("a-00", "甲"), ("a-01", "乙"), ("b", "丙")):
        (tmp_path / f"{name}.txt").write_text("\n\n".join([text * 10] * 100), encoding="utf-8")
    drawn = "".join(sample_documents(sorted(tmp_path.iterdir()), 200))
    assert drawn.count("甲") == drawn.count("乙") == 100
    assert drawn.count("丙") == 200


TRAIN = """
import random, sys
from plug.pretraining.vocabulary import train
rng = random.Random(0)
characters = [chr(0x4E00 + index) for index in range(400)]  # nearly all equally frequent
texts = ["".join(rng.choices(characters, k=200)) + "。" for _ in range(40)]
sys.stdout.write(train(texts, 700, 150).backend.to_str())
"""


def test_two_runs_give_the_same_bytes() -> None:
    outputs = set()
    for seed in ("1", "2", "3"):
        environment = os.environ | {"PYTHONHASHSEED": seed, "RAYON_NUM_THREADS": seed}
        command = [sys.executable, "-c", TRAIN]
        ran = subprocess.run(command, capture_output=True, env=environment, check=True)
        outputs.add(ran.stdout)
    assert len(outputs) == 1


def test_of_characters_equally_frequent_the_first_by_code_point_are_taken() -> None:
    found = frequent_characters(["丙丙乙甲丁"], len(ALWAYS_PRESENT) + 3)
    assert set(found) - set(ALWAYS_PRESENT) == {"丙", "丁", "乙"}

"""`plug pretrain`: from text files to two stages of a model, and what it says about wrong use."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from plug.loading.load import load
from plug.pretraining.tokens import read_tokens
from plug.tokenization import PlugTokenizer

Run = Callable[..., tuple[int, str, str]]

CONFIG = """
corpus = "{folder}/corpus"
output = "{folder}/stage{stage}"
preset = "test"
steps = 2
shapes = {shapes}
batch_tokens = 256
learning_rate = 1e-3
precision = "fp32"
workers = 0
"""


@pytest.fixture
def text(tmp_path: Path) -> Path:
    rng = random.Random(0)
    words = ["今天", "天气", "很好", "我们", "公园", "看花"]
    documents = ["".join(f"{rng.choice(words)}，{rng.choice(words)}。" for _ in range(30))] * 40
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "news.txt").write_text("\n\n".join(documents), encoding="utf-8")
    return tmp_path / "text"


def test_from_text_to_a_model(text: Path, tmp_path: Path, run_plug: Run) -> None:
    vocab = ["pretrain", "vocab", "--corpus", text, "--size", 304, "--alphabet", 43]
    status, out, _ = run_plug(*vocab, "--output", tmp_path / "vocab")
    assert (status, out) == (0, f"{tmp_path / 'vocab'}：304 项\n")
    assert len(PlugTokenizer.load(tmp_path / "vocab").encode("今天很好")) == 2

    data = ["pretrain", "data", "--corpus", text, "--tokenizer", tmp_path / "vocab"]
    status, out, _ = run_plug(*data, "--output", tmp_path / "corpus", "--heldout", "0.1")
    (domain,) = read_tokens(tmp_path / "corpus")
    assert status == 0
    row = out.splitlines()[1].split()
    assert row[:3] == ["news", "36", "4"]
    assert int(row[4]) == len(domain.tokens)

    for stage, shapes in ((1, "[[32, 1.0]]"), (2, "[[16, 16, 1.0]]")):
        config = tmp_path / f"stage{stage}.toml"
        config.write_text(CONFIG.format(folder=tmp_path, stage=stage, shapes=shapes))
        options = ["--set", "model.num_decoder_layers=1", "--device", "cpu"]
        if stage == 2:
            options += ["--set", f"init_from={tmp_path / 'stage1' / 'model'}"]
        status, _, err = run_plug("pretrain", f"stage{stage}", "--config", config, *options)
        assert status == 0, err
        assert "2/2 步" in err
    model = load(tmp_path / "stage2" / "model")
    assert model.config.num_decoder_layers == 1
    assert model.config.num_emitted_tokens == 304
    assert model.config.vocab_size == 384  # whole tiles of 128


def test_wrong_use(text: Path, tmp_path: Path, run_plug: Run) -> None:
    vocab = ["pretrain", "vocab", "--corpus", text, "--output", tmp_path / "vocab"]
    for options, message in (
        (["--size", "100"], "词表大小 100"),
        (["--alphabet", "0"], "单字个数 0"),
        (["--characters-per-domain", "0"], "--characters-per-domain"),
        (["--corpus", tmp_path / "nowhere"], "不存在"),
    ):
        status, _, err = run_plug(*vocab, *options)
        assert status == 2, options
        assert message in err
        assert err.startswith("错误：")
        assert not (tmp_path / "vocab").exists()

    status, _, err = run_plug(
        "pretrain", "data", "--corpus", text, "--tokenizer", text, "--output", tmp_path / "corpus"
    )
    assert status == 2
    assert "没有 tokenizer.json" in err
    assert not (tmp_path / "corpus").exists()

    status, _, err = run_plug("pretrain", "stage1", "--config", tmp_path / "none.toml")
    assert (status, err) == (2, f"错误：设置文件 {tmp_path / 'none.toml'} 不存在。\n")


def test_a_vocabulary_is_not_overwritten_and_not_written_over_a_file(
    text: Path, tmp_path: Path, run_plug: Run
) -> None:
    vocab = ["pretrain", "vocab", "--corpus", text, "--size", 304, "--alphabet", 43]
    (tmp_path / "vocab").mkdir()
    (tmp_path / "vocab" / "tokenizer.json").write_text("mine")
    status, _, err = run_plug(*vocab, "--output", tmp_path / "vocab")
    assert status == 2
    assert "已有分词器" in err
    assert (tmp_path / "vocab" / "tokenizer.json").read_text() == "mine"

    status, _, err = run_plug(*vocab, "--output", tmp_path / "vocab" / "tokenizer.json")
    assert status == 2
    assert "已经存在" in err


def test_a_corpus_that_is_not_there_is_called_a_corpus(tmp_path: Path, run_plug: Run) -> None:
    config = tmp_path / "stage1.toml"
    config.write_text(CONFIG.format(folder=tmp_path, stage=1, shapes="[[32, 1.0]]"))
    status, _, err = run_plug("pretrain", "stage1", "--config", config, "--device", "cpu")
    assert (status, "里没有编码好的语料" in err) == (2, True), err
    assert not (tmp_path / "stage1").exists()

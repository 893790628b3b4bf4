from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from plug.evaluation.language_model import evaluate_language_model
from plug.model.plug import Plug
from plug.tokenization import PlugTokenizer

NEWS = ["今天天气很好，\n我们去看花。", "短", "山上有庙，今天我们去看。"]
POEMS = ["花好，山好，庙好。天气好！"]
LENGTHS = ("--source-length", 4, "--target-length", 6)


@pytest.fixture
def news(tmp_path: Path) -> Path:
    path = tmp_path / "news.txt"
    path.write_text("\n\n".join(NEWS) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def poems(tmp_path: Path) -> Path:
    path = tmp_path / "poems-00.jsonl.gz"
    lines = "".join(json.dumps({"text": text}) + "\n" for text in POEMS)
    path.write_bytes(gzip.compress(lines.encode()))
    return path


def test_one_file_gives_its_score(
    run_plug: Callable,
    model_directory: Path,
    tiny_model: Plug,
    tiny_tokenizer: PlugTokenizer,
    news: Path,
) -> None:
    ran = run_plug("evaluate", "lm", "--model", model_directory, "--text", news, "--json", *LENGTHS)
    report = json.loads(ran.out)
    score = evaluate_language_model(
        tiny_model, tiny_tokenizer, NEWS, source_length=4, target_length=6
    )
    assert (ran.status, ran.err) == (0, "")
    assert report["nats_per_token"] == pytest.approx(score.nats_per_token, rel=1e-5)
    assert report["nats_per_character"] == pytest.approx(score.nats_per_character, rel=1e-5)
    assert report["unknown_share"] == 0
    assert (report["documents"], report["skipped"]) == (2, 1)
    assert (report["tokens"], report["characters"]) == (score.tokens, score.characters)
    assert report["domains"]["news"]["nats_per_token"] == report["nats_per_token"]


def test_lengths_need_not_be_given_for_a_small_model(
    run_plug: Callable, model_directory: Path, tmp_path: Path
) -> None:
    (tmp_path / "long.txt").write_text("今天天气很好。" * 40, encoding="utf-8")

    ran = run_plug(
        "evaluate", "lm", "--model", model_directory, "--text", tmp_path / "long.txt", "--json"
    )

    assert (ran.status, ran.err) == (0, "")
    report = json.loads(ran.out)
    assert (report["source_length"], report["target_length"], report["tokens"]) == (48, 48, 48)


def test_several_files_give_each_domain_and_their_mean(
    run_plug: Callable, model_directory: Path, news: Path, poems: Path
) -> None:
    ran = run_plug(
        "evaluate", "lm", "--model", model_directory, "--text", news, poems, "--json", *LENGTHS
    )
    report = json.loads(ran.out)
    domains = report["domains"]
    assert list(domains) == ["news", "poems"]
    for key in ("nats_per_token", "nats_per_character", "unknown_share"):
        assert report[key] == pytest.approx((domains["news"][key] + domains["poems"][key]) / 2)
    for key in ("documents", "skipped", "tokens", "characters"):
        assert report[key] == domains["news"][key] + domains["poems"][key]


def test_shards_of_one_domain_are_scored_as_one(
    run_plug: Callable, model_directory: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "corpus"
    folder.mkdir()
    for shard, text in enumerate(NEWS):
        (folder / f"news-{shard:02}.txt").write_text(text, encoding="utf-8")
    ran = run_plug(
        "evaluate", "lm", "--model", model_directory, "--text", folder, "--json", *LENGTHS
    )
    report = json.loads(ran.out)
    assert list(report["domains"]) == ["news"]
    assert (report["documents"], report["skipped"]) == (2, 1)


def test_limit_takes_the_first_documents_of_each_domain(
    run_plug: Callable, model_directory: Path, news: Path
) -> None:
    ran = run_plug(
        *("evaluate", "lm", "--model", model_directory, "--text", news, "--json", *LENGTHS),
        *("--limit", 2),
    )
    assert [json.loads(ran.out)[key] for key in ("documents", "skipped")] == [1, 1]


def test_dtype_is_the_model_s(run_plug: Callable, model_directory: Path, news: Path) -> None:
    command = ("evaluate", "lm", "--model", model_directory, "--text", news, "--json", *LENGTHS)
    wide, narrow = (
        json.loads(run_plug(*command, "--device", "cpu", "--dtype", name).out)["nats_per_token"]
        for name in ("float32", "bfloat16")
    )
    assert wide != narrow
    assert narrow == pytest.approx(wide, rel=0.02)


def test_the_table_has_every_domain_and_the_mean(
    run_plug: Callable, model_directory: Path, news: Path, poems: Path
) -> None:
    command = ("evaluate", "lm", "--model", model_directory, "--text", news, poems, *LENGTHS)
    report = json.loads(run_plug(*command, "--json").out)
    shown = run_plug(*command).out
    for row in (report, *report["domains"].values()):
        assert f"{row['nats_per_character']:.4f}" in shown


def broken(content: bytes) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        path = folder / "broken.txt"
        path.write_bytes(content)
        return path

    return write


@pytest.mark.parametrize(
    ("make", "status", "complaint"),
    [
        (lambda folder: folder / "missing.txt", 2, "missing.txt 不存在"),
        (broken(b""), 2, "broken.txt 里没有任何文档"),
        (broken(b"\n \n\n"), 2, "broken.txt 里没有任何文档"),
        (broken(b"\x00\x01\x02"), 1, "broken.txt 第 1 行含有二进制字节"),
        (broken("今天\n".encode("gbk")), 1, "broken.txt 第 1 行不是 UTF-8 文本"),
        (broken("今天".encode()), 2, "1 篇文档都不超过 4 个词元"),
    ],
)
def test_bad_text_is_one_clear_line(
    run_plug: Callable,
    model_directory: Path,
    tmp_path: Path,
    make: Callable[[Path], Path],
    status: int,
    complaint: str,
) -> None:
    ran = run_plug("evaluate", "lm", "--model", model_directory, "--text", make(tmp_path), *LENGTHS)
    assert (ran.status, ran.out) == (status, "")
    assert complaint in ran.err
    assert ran.err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--model", "nowhere"], "nowhere"),
        (["--source-length", "95"], "source_length=95"),
        (["--device", "abacus"], "abacus"),
        pytest.param(
            ["--device", "cuda"],
            "cuda",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="has CUDA"),
        ),
    ],
)
def test_bad_options_are_status_2(
    run_plug: Callable, model_directory: Path, news: Path, arguments: list[str], complaint: str
) -> None:
    ran = run_plug(
        "evaluate", "lm", "--model", model_directory, "--text", news, *LENGTHS, *arguments
    )
    assert (ran.status, ran.out) == (2, "")
    assert complaint in ran.err

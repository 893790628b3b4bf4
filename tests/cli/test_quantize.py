from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from plug.loading.load import load
from plug.loading.save import save
from plug.model.configuration import PRESETS, PlugConfig
from plug.model.plug import Plug
from plug.quantization.linear import scheme_of
from plug.tokenization import PlugTokenizer


@pytest.fixture
def wide_directory(
    make_model: Callable[[PlugConfig], Plug], tiny_tokenizer: PlugTokenizer, tmp_path: Path
) -> Path:
    config = dataclasses.replace(PRESETS["test"], hidden_size=128, intermediate_size=256)
    save(make_model(config), tmp_path / "wide", tokenizer=tiny_tokenizer)
    return tmp_path / "wide"


@pytest.mark.parametrize("bits", [8, 4])
def test_what_it_writes_is_generated_with_and_evaluated(
    bits: int, run_plug: Callable, wide_directory: Path, tmp_path: Path
) -> None:
    small = tmp_path / "small"
    text = tmp_path / "news.txt"
    text.write_text("今天天气很好，我们去公园看花。山上有座庙", encoding="utf-8")

    done = run_plug("quantize", "--model", wide_directory, "--to", small, "--bits", bits)

    assert done.status == 0
    assert f"已写入 {small}" in done.out
    scheme = scheme_of(load(small))
    assert scheme is not None
    assert scheme.bits == bits
    said = run_plug("generate", "山上", "--model", small, "--out-length", 5, "--json")
    assert len(json.loads(said.out)["token_ids"]) <= 5
    lengths = ("--source-length", 4, "--target-length", 6)
    losses = [
        json.loads(
            run_plug("evaluate", "lm", "--model", each, "--text", text, *lengths, "--json").out
        )
        for each in (wide_directory, small)
    ]
    before, after = (loss["nats_per_character"] for loss in losses)
    assert after != before
    assert after == pytest.approx(before, rel=0.2)


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (["--bits", "5"], 2, "--bits 5 只能是 8 或 4"),
        (["--bits", "8", "--model", "nowhere"], 2, "找不到模型 nowhere"),
    ],
)
def test_wrong_use_is_explained(
    arguments: list[str], status: int, says: str, run_plug: Callable, tmp_path: Path
) -> None:
    done = run_plug("quantize", "--to", tmp_path / "small", *arguments)

    assert done.status == status
    assert says in done.err
    assert not (tmp_path / "small").exists()


def test_texts_to_calibrate_with(run_plug: Callable, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("今天天气很好。\n\n" * 20, encoding="utf-8")
    target = tmp_path / "out"

    ran = run_plug("quantize", "--to", target, "--bits", 4, "--calibration", short)
    assert ran.status == 2
    assert "只有 0 篇不短于 256 个词元，至少要 8 篇，最好一百篇以上。各篇之间空一行" in ran.err
    ran = run_plug("quantize", "--to", target, "--bits", 8, "--calibration", short)
    assert "--calibration 只用于 --bits 4" in ran.err
    assert not target.exists()

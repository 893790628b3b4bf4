"""Figures that pages quote are those of `benchmarks/results`, rounded as the page rounds them."""

from __future__ import annotations

import json
import re
from decimal import ROUND_HALF_UP, Decimal
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
TOKENS = 128  # written in each run of benchmarks/laptop.py mini
IN_TURN = "decode_27b_4bit_in_turn.json runs 2 results int4"  # the latest run of the new build

TWO = "eight_cards.json cards 2 write results"


def measured(address: str) -> Any:
    """The value at `FILE key key …` of a file of results."""
    name, *keys = address.split()
    value = json.loads((ROOT / "benchmarks" / "results" / name).read_text(encoding="utf-8"))
    for key in keys:
        value = value[int(key) if isinstance(value, list) else key]
    return value


def rounded(value: float, digits: int = 0) -> str:
    """A half goes up, and is a half as written: 74.85 becomes 74.9."""
    exponent = Decimal(1).scaleb(-digits)
    return f"{Decimal(str(value)).quantize(exponent, ROUND_HALF_UP):,}"


def mini(pair: str, who: str, texts: int = 1) -> str:
    """Tokens a second of `texts` texts together, from their seconds."""
    return rounded(texts * TOKENS / measured(f"laptop.json mini_pairs {pair} seconds {who}"))


def card(one: str, many: str) -> list[str]:
    return [
        f"{rounded(measured(f'{one} peak_gb'), 1)} GB",
        f"{rounded(measured(f'{one} batch1_tokens_per_s'))}",
        f"{rounded(measured(f'{many} batch32_tokens_per_s'))}",
    ]


def tuned(address: str) -> list[str]:
    run = measured(f"finetune_27b.json {address}")
    batch = f"2 × {run['batch']}" if address.startswith("two_cards") else str(run["batch"])
    return [batch, f"{rounded(run['peak_gb'], 1)} GB", rounded(run["tokens_per_s"])]


# The last cells of each row. The memory of plug-mini-zh is in no file of results.
WRITING = [
    [mini("shipped", "plug"), mini("batch32", "plug", texts=32)],
    [mini("int8", "plug"), ""],
    [mini("int4", "plug"), ""],
    [mini("shipped", "peer"), mini("batch32", "peer", texts=32)],
    [
        f"{rounded(measured('laptop.json laptop_27b peak_rss_gb'), 1)} GB",
        rounded(measured("laptop.json laptop_27b tokens_per_s"), 1),
        "",
    ],
    card("decode_27b.json results bf16", "decode_27b.json results bf16"),
    card("decode_27b.json results 8bit", "decode_27b.json results 8bit"),
    card(IN_TURN, "decode_27b.json results int4"),
    card("decode_27b.json peer", "decode_27b.json peer"),
    *(card(f"{TWO} {kind}", f"{TWO} {kind}") for kind in ("bf16", "8bit")),
]
FINE_TUNING = [
    tuned("results full"),
    tuned("results lora"),
    tuned("results lora8"),
    tuned("results lora8_recomputed"),
    tuned("results qlora"),
    tuned("two_cards whole_bf16"),
    tuned("two_cards lora"),
    tuned("peer lora"),
    tuned("peer qlora"),
]


def tables(page: str) -> list[list[list[str]]]:
    """The cells of each table of a page, heads left out."""
    text = (ROOT / page).read_text(encoding="utf-8")
    bodies = re.findall(r"^\|[- |]+\|\n((?:\|.*\|\n)+)", text, re.M)
    return [
        [[cell.strip() for cell in row.strip("|").split("|")] for row in body.splitlines()]
        for body in bodies
    ]


@pytest.mark.parametrize("page", ["README.md", "README.zh-CN.md"])
def test_figures_of_the_readme_are_the_measured_ones(page: str) -> None:
    writing, fine_tuning = tables(page)
    for rows, expected in ((writing, WRITING), (fine_tuning, FINE_TUNING)):
        assert len(rows) == len(expected)
        assert [row[-len(cells) :] for row, cells in zip(rows, expected, strict=True)] == expected


@pytest.mark.parametrize("ending", ["md", "zh-CN.md"])
def test_figures_of_the_guides_are_those_of_the_readme(ending: str) -> None:
    """Those of the first processor and of the card."""
    [rows] = [table for table in tables(f"docs/guides/no-gpu.{ending}") if len(table) == 11]
    ours = [row for row in WRITING[:8] if row != WRITING[3]]  # without `transformers`
    one_text = [row[-2] for row in ours]
    assert [rows[row][3] for row in (0, 1, 2, 8, 9, 10)] == one_text[:3] + one_text[4:]
    memory = [row[0] for row in WRITING[4:8]]
    assert [rows[row][2] for row in (3, 8, 9, 10)] == memory
    [rows] = [table for table in tables(f"docs/guides/27b.{ending}") if table[0][0] == "bf16"]
    assert [row[1:3] for row in rows] == [row[:2] for row in WRITING[5:8]]
    [rows] = [table for table in tables(f"docs/guides/27b.{ending}") if len(table[0]) == 6]
    runs = [
        measured(f"eight_cards.json cards {count} write results {kind}")
        for kind in ("bf16", "8bit")
        for count in (1, 2)
    ]
    assert [row[2:] for row in rows] == [
        [f"{rounded(run['peak_gb'], 1)} GB"]
        + [rounded(run[f"batch{batch}_tokens_per_s"]) for batch in (1, 32, 128)]
        for run in runs
    ]


def test_figures_of_the_page_on_speed_are_the_measured_ones() -> None:
    rows = tables("docs/performance.md")[0]
    for row, kind in zip(rows, ("bf16", "8bit", "int4"), strict=False):
        run = measured(f"decode_27b.json results {kind}")
        assert [cell.strip("*") for cell in row[1:]] == [
            rounded(run["batch1_tokens_per_s"]),
            rounded(run["batch32_tokens_per_s"]),
            f"{rounded(run['peak_gb'], 1)} GB",
            f"{rounded(run['batch1_encoder_ms'], 1)} ms",
        ]


def test_figures_of_the_page_on_quantising_are_the_measured_ones() -> None:
    [rows] = [table for table in tables("docs/quantization.md") if table[0][0] == "as it ships"]
    for row, name in zip(rows, ("shipped", "int8", "int4", "batch32", "in_flight32"), strict=True):
        pair = measured(f"laptop.json mini_pairs {name}")
        texts = 32 if "32" in name else 1
        least, most = pair["ratio_least_and_most"]
        assert row[1].strip("*") == mini(name, "plug", texts)
        assert row[2].endswith(f", {mini(name, 'peer', texts)}")
        assert row[3] == f"{rounded(pair['ratio'], 2)} ({rounded(least, 2)} to {rounded(most, 2)})"
        assert row[4] == rounded(pair["ratio_of_cpu_seconds"], 2)


def test_figures_of_the_page_on_adapters_are_the_measured_ones() -> None:
    [rows] = [table for table in tables("docs/finetuning.md") if "16 of 30 layers" in table[0][0]]
    modes = ["lora", "lora_batch4", None, "lora8", "lora8_recomputed", "qlora", "qlora_batch4"]
    for row, mode in zip(rows, [*modes, "qlora_bf16"], strict=False):
        if mode is not None:  # the third row has two runs of the peer
            assert row[1:4] == tuned(f"results {mode}")
    peers = [row for row in rows if row[0].startswith("`peft`")]
    for row, mode in zip(peers, ("lora", "qlora"), strict=True):
        runs = [measured(f"finetune_27b.json peer {mode}{size}") for size in ("", "_batch4")]
        assert row[2] == "; ".join(rounded(run["peak_gb"], 1) for run in runs) + " GB"
        assert row[3] == "; ".join(rounded(run["tokens_per_s"]) for run in runs)

"""The plan against arithmetic by hand, and what it refuses."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from plug.cli.pretrain import app
from plug.errors import UsageError
from plug.model.accounting import total
from plug.model.configuration import PRESETS
from plug.pretraining.plan import lines_of, make_plan
from plug.pretraining.plan_settings import CARDS, PlanSettings


def plan(**changes: Any) -> dict[str, Any]:
    return make_plan(PlanSettings(**changes))


def test_days_by_hand() -> None:
    """6 N D, the field's rule of thumb; here each half of the tokens meets its half of the model.

    24 encoder layers of 12 h^2 weights read the source; 6 decoder layers of 14 h^2 (the
    cross-attention's keys and values, 2 h^2 more, read the source) and the word table the target.
    """
    found = plan(cards=64, characters=3e10, tflops=400.0, failure_hours=1e9)
    square = 8192**2
    source = 24 * 12 * square + 6 * 2 * square
    target = 6 * 14 * square + 21504 * 8192
    operations = 6 * (source + target) / 2
    assert found["flops_per_token"] == pytest.approx(operations, rel=0.03)  # attention besides
    share = found["layout"]["recomputed"] / 30 / 3
    days = 3e10 * found["flops_per_token"] * (1 + share) / (64 * 400e12) / 86400
    assert found["days_without_failures"] == pytest.approx(days)
    assert found["days"] == pytest.approx(days, rel=0.01)
    assert found["cost"] == pytest.approx(found["days"] * 24 * 64 * CARDS["H100"].price)


def test_ten_times_the_text_takes_ten_times_as_long() -> None:
    few, many = (plan(characters=characters) for characters in (3e10, 3e11))
    assert many["days"] == pytest.approx(10 * few["days"], rel=0.01)
    assert many["layout"] == few["layout"]


def test_cards_that_fail_more_often_cost_time() -> None:
    days = [plan(cards=1024, failure_hours=hours)["days"] for hours in (1e6, 5e4, 2e3)]
    assert days == sorted(days)
    assert days[-1] > 1.02 * days[0]


def test_the_layout_fits_and_uses_all_cards() -> None:
    for cards in (8, 48, 64, 256):
        found = plan(cards=cards)
        layout = found["layout"]
        assert layout["shards"] * layout["replicas"] == cards
        assert found["memory_gb"] <= found["card_gb"]
        tokens = layout["examples"] * 1024 * cards
        assert found["accumulated"] * tokens >= 4_194_304


def test_more_cards_recompute_less() -> None:
    recomputed = [plan(cards=cards)["layout"]["recomputed"] for cards in (8, 16, 32, 64)]
    assert recomputed == sorted(recomputed, reverse=True)
    assert recomputed[0] > recomputed[-1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cards": 1}, "1 张 H100 放不下 27b.*至少要 5 张"),
        ({"batch_tokens": 1000}, "batch_tokens=1000 太小"),
        ({"source_length": 4000}, "长度 4000 超过了 27b 的 max_position_embeddings=2048"),
        ({"cards": 0}, "cards=0"),
        ({"card": "H101"}, "card='H101' 既不是 H100、.*，也不是显存的大小"),
        ({"card": "24GB"}, "card='24GB' 训练的速度不知道。请用 --tflops"),
        ({"preset": "长" * 300}, "不是规格名"),
        ({"preset": "28b"}, "preset='28b' 不是规格名（.*27b.*），那里也没有 config.json"),
        ({"characters": float("nan")}, "characters=nan"),
        ({"cards": 1024, "failure_hours": 1.0}, "训练不完：1024 张卡平均每 0.059 分钟坏一次"),
    ],
)
def test_wrong_plans(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        plan(**changes)


@pytest.mark.parametrize("cards", [2, 4])
def test_the_advised_number_of_cards_is_the_fewest_that_fit(cards: int) -> None:
    with pytest.raises(UsageError, match="至少要") as refused:
        plan(cards=cards)
    advised = re.search(r"至少要 (\d+) 张", str(refused.value))
    assert advised
    fewest = int(advised[1])
    assert plan(cards=fewest)["layout"]["shards"] == fewest
    with pytest.raises(UsageError, match="放不下"):
        plan(cards=fewest - 1)


def test_what_is_assumed_is_named() -> None:
    settings = PlanSettings(card="A100")
    text = "\n".join(lines_of(settings, make_plan(settings)))
    assert "实测" not in text  # nobody measured this card
    assert text.endswith("（--price）。")
    for name in ("--mfu", "--failure-hours", "--checkpoint-seconds", "--price", "--network"):
        assert name in text
    measured = "\n".join(lines_of(PlanSettings(), plan()))
    assert "实测：一张卡训练 27B 556 TFLOP/s" in measured
    assert "--scaling" in measured
    given = PlanSettings(tflops=700.0)
    assert "实测" not in "\n".join(lines_of(given, make_plan(given)))


def test_the_speed_is_the_measured_one_unless_told() -> None:
    assert plan(cards=64)["tflops"] == pytest.approx(556 * 0.8)
    assert plan(cards=64, scaling=1.0)["tflops"] == pytest.approx(556)
    assert plan(preset="mini", cards=1)["tflops"] == pytest.approx(778 / 2)  # another shape
    assert plan(card="A100", mfu=0.4)["tflops"] == pytest.approx(100)
    assert plan(tflops=700.0)["tflops"] == pytest.approx(700)
    assert plan(cards=64, fp8=True)["tflops"] == pytest.approx(794 * 0.8)
    with pytest.raises(UsageError, match="27b 在 A100 上用 FP8 训练的速度没有实测"):
        plan(card="A100", fp8=True)
    assert plan(card="A100", fp8=True, tflops=300.0)["tflops"] == pytest.approx(300)


def test_any_card_and_any_shape(tmp_path: Path) -> None:
    wide = dataclasses.replace(PRESETS["mini"], num_hidden_layers=16)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(wide.to_dict()), encoding="utf-8")
    settings = PlanSettings(preset=str(tmp_path), card="24GB", tflops=60.0, cards=4)
    found = make_plan(settings)
    assert found == make_plan(dataclasses.replace(settings, preset=str(file)))
    assert found["parameters"] == total(wide).parameters
    assert found["card_gb"] == 24
    assert found["memory_gb"] <= 24
    text = "\n".join(lines_of(settings, found))
    assert "价钱未知（--price）" in text
    assert text.endswith("（--restart-minutes）。")
    assert found["cost"] is None
    priced = dataclasses.replace(settings, price=2.0)
    assert make_plan(priced)["cost"] == pytest.approx(2 * found["card_hours"])
    file.write_text("{}x", encoding="utf-8")
    with pytest.raises(UsageError, match=r"config\.json"):
        make_plan(dataclasses.replace(settings, preset=str(tmp_path)))


def test_the_command() -> None:
    shown = CliRunner().invoke(app, ["plan", "--cards", "8", "--characters", "3e10", "--json"])
    assert shown.exit_code == 0, shown.output
    assert json.loads(shown.output)["layout"]["shards"] == 8
    assert "网格" in CliRunner().invoke(app, ["plan"]).output


DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize("name", ["pretraining-27b.md", "pretraining-27b.zh-CN.md"])
def test_the_page_s_table_is_what_the_plan_says(name: str) -> None:
    text = (DOCS / name).read_text(encoding="utf-8")
    rows = re.findall(r"^\| (?:8|64|256) \|.*$", text, re.M)
    plans = [plan(cards=n, characters=each) for n in (8, 64, 256) for each in (3e10, 3e11)]
    plans += [plan(cards=n, characters=3e11, fp8=True) for n in (8, 64, 256)]
    for row, found in zip(rows, plans, strict=True):
        layout, cells = found["layout"], [cell.strip() for cell in row.strip("|").split("|")]
        cells[7] = cells[7].split()[0]  # without the unit
        assert cells[2:] == [
            f"{layout['shards']} x {layout['replicas']}",
            str(layout["recomputed"]),
            f"{found['memory_gb']:.1f}",
            f"{found['days']:.1f}",
            f"{found['failures']:.1f}",
            f"{found['checkpoint_every_minutes']:.0f}",
            f"{found['cost'] / 1e4:.1f}",
        ]


def test_the_page_s_example_is_what_the_plan_says() -> None:
    text = (DOCS / "pretraining-27b.md").read_text(encoding="utf-8")
    settings = PlanSettings(cards=64, characters=3e11)
    example = "\n".join(lines_of(settings, make_plan(settings))[:8])
    assert f"```text\n{example}\n```" in text

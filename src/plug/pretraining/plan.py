"""`plug pretrain plan`: what a pre-training run of some size would take. By formula, no torch."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from plug.errors import UsageError
from plug.loading.estimate import OVERHEAD_BYTES, Training, training_need
from plug.model.accounting import total, training_flops
from plug.model.configuration import PlugConfig
from plug.pretraining.failures import best_interval
from plug.pretraining.plan_settings import PlanSettings

MASKED_SHARE = 0.15
MOST_FILLED = 0.95  # of a card's memory; fragments take the rest
HOURS_A_DAY = 24
MOST_SHARDS = 4096  # cards that are tried where fewer do not hold the model


@dataclass(frozen=True, slots=True)
class Layout:
    """How the cards share the work.

    Attributes:
        shards: cards that share one copy of weights, gradients and states (FSDP2).
        replicas: copies; `shards` x `replicas` is the number of cards.
        examples: of one card at once.
        recomputed: layers whose activations are computed again.
        memory: bytes at the peak, on each card.
    """

    shards: int
    replicas: int
    examples: int
    recomputed: int
    memory: int


def make_plan(settings: PlanSettings) -> dict[str, Any]:
    """Return the plan: the layout, days and cost, what failures cost, and what was assumed.

    Raises:
        UsageError: the cards do not hold the model, or a batch is too small for them.
    """
    config, card = settings.config, settings.kind
    lengths = settings.source_length, settings.target_length
    longest = max(lengths)
    if longest > config.max_position_embeddings:
        raise UsageError(
            f"长度 {longest} 超过了 {settings.preset} 的 max_position_embeddings="
            f"{config.max_position_embeddings}。"
        )
    if settings.fp8 and not (settings.tflops or _measured(settings)):
        raise UsageError(
            f"{settings.preset} 在 {settings.card} 上用 FP8 训练的速度没有实测。"
            "请用 --tflops 给出，或去掉 --fp8。"
        )
    rate = settings.tflops * 1e12 or _rate(settings)
    layout = _find_layout(settings, config, rate)
    tokens = settings.characters / settings.characters_per_token
    each = training_flops(config, *lengths, every_parameter=True) / sum(lengths)
    layers = config.num_hidden_layers + config.num_decoder_layers
    # A recomputed layer makes a third forward pass beside forward and backward: one more of three.
    again = 1 + layout.recomputed / layers / 3
    hours = tokens * each * again / (rate * settings.cards) / 3600
    interval, with_failures = best_interval(
        hours,
        checkpoint=settings.checkpoint_seconds / 3600,
        failure_every=settings.failure_hours / settings.cards,
        restart=settings.restart_minutes / 60,
    )
    if with_failures == math.inf:
        every = settings.failure_hours / settings.cards
        raise UsageError(
            f"训练不完：{settings.cards} 张卡平均每 {every * 60:.2g} 分钟坏一次，"
            f"恢复一次要 {settings.restart_minutes:g} 分钟，存一次检查点要"
            f" {settings.checkpoint_seconds:g} 秒。"
            "请减少 cards，或改 failure_hours、restart_minutes、checkpoint_seconds。"
        )
    price = settings.price or card.price
    together = layout.examples * sum(lengths) * settings.cards
    return {
        "parameters": total(config).parameters,
        "tokens": tokens,
        "flops_per_token": each,
        "steps": math.ceil(tokens / settings.batch_tokens),
        "layout": asdict(layout),
        "accumulated": -(-settings.batch_tokens // together),
        "memory_gb": (layout.memory + OVERHEAD_BYTES) / 1e9,
        "card_gb": card.memory / 1e9,
        "days_without_failures": hours / HOURS_A_DAY,
        "failures": with_failures / (settings.failure_hours / settings.cards),
        "checkpoint_every_minutes": interval * 60,
        "days": with_failures / HOURS_A_DAY,
        "card_hours": with_failures * settings.cards,
        "cost": with_failures * settings.cards * price if price else None,
        "tflops": rate / 1e12,
        "price": price,
        "measured_in": card.source if _measured(settings) and not settings.tflops else "",
    }


def lines_of(settings: PlanSettings, plan: dict[str, Any]) -> list[str]:
    """Return the plan in Chinese, what was assumed last."""
    layout = plan["layout"]
    tokens = layout["examples"] * (settings.source_length + settings.target_length)
    card, shown = settings.kind, f"{_short(plan['tflops'])} TFLOP/s"
    cost = f"{plan['cost'] / 1e4:,.1f} 万元" if plan["price"] else "价钱未知（--price）"
    lines = [
        f"模型      {settings.preset}，{plan['parameters'] / 1e9:.1f}B 参数，"
        f"每个词元 {plan['flops_per_token'] / 1e9:.1f} GFLOP",
        f"数据      {settings.characters:.3g} 字 = {plan['tokens']:.3g} 词元，"
        f"{plan['steps']:,} 步，一步 {settings.batch_tokens:,} 词元",
        f"网格      {layout['shards']} 张卡分片（FSDP2）× {layout['replicas']} 份 = "
        f"{settings.cards} 张 {settings.card}",
        f"一张卡    一次 {tokens:,} 词元，累积 {plan['accumulated']} 次，重算"
        f" {layout['recomputed']} 层，显存 {plan['memory_gb']:.1f} / {plan['card_gb']:.0f} GB",
        f"速度      每张卡 {_short(plan['tflops'])} 模型 TFLOP/s",
        f"时间      {plan['days']:.1f} 天（没有故障时 {plan['days_without_failures']:.1f} 天，"
        f"预计故障 {plan['failures']:.1f} 次）",
        f"检查点    每 {_short(plan['checkpoint_every_minutes'])} 分钟一次（模拟出的最短总时间）",
        f"费用      {plan['card_hours']:,.0f} 卡时，{cost}",
        "",
    ]
    if settings.tflops:
        speed = f"每张卡训练的速度 {shown}（--tflops 所给）"
    elif plan["measured_in"]:
        what = "两张卡上用 FP8 训练 27B 的 4 + 1 层，每张" if settings.fp8 else "一张卡训练 27B"
        lines.append(f"实测：{what} {_measured(settings) / 1e12:.0f} TFLOP/s（{card.source}）。")
        speed = f"许多张卡时每张 {shown}，实测的 {settings.scaling:g}（--scaling 或 --tflops）"
    else:
        speed = f"每张卡训练的速度 {shown}，矩阵乘的 {settings.mfu:g}（--mfu 或 --tflops）"
    assumed = [
        speed,
        f"一个词元 {settings.characters_per_token:g} 字（--characters-per-token）",
        f"卡间每秒 {settings.network:g} GB（--network）",
        f"一张卡 {settings.failure_hours:,.0f} 小时坏一次（--failure-hours）",
        f"检查点停 {settings.checkpoint_seconds:g} 秒（--checkpoint-seconds）",
        f"故障后 {settings.restart_minutes:g} 分钟恢复（--restart-minutes）",
    ]
    if plan["price"]:
        assumed.append(f"一卡时 {plan['price']:g} 元（--price）")
    listed = [f"  {each}；" for each in assumed[:-1]]
    return [*lines, "假设，可用选项改：", *listed, f"  {assumed[-1]}。"]


def _short(number: float) -> str:
    """Without decimals, unless it is small."""
    return f"{number:.0f}" if number >= 10 else f"{number:.2g}"


def _measured(settings: PlanSettings) -> float:
    """Model operations a second of a card while it trains this shape; 0: nobody has measured."""
    card = settings.kind
    if settings.preset != "27b":
        return 0.0
    return card.training_fp8 if settings.fp8 else card.training


def _rate(settings: PlanSettings) -> float:
    if measured := _measured(settings):
        return measured * (settings.scaling if settings.cards > 1 else 1.0)
    return settings.kind.product * settings.mfu


def _find_layout(settings: PlanSettings, config: PlugConfig, rate: float) -> Layout:
    """The layout with the fewest recomputed layers, then the fewest shards."""
    cards, length = settings.cards, settings.source_length + settings.target_length
    # While a layer of P parameters computes 6 P operations a token, 6 P bytes of weights and
    # gradients are moved, in bf16: fewer tokens at once than this would wait for the network.
    least = max(1, round(rate / (settings.network * 1e9) / length))
    if least * length * cards > settings.batch_tokens:
        least = settings.batch_tokens // (cards * length)
    if not least:
        raise UsageError(
            f"batch_tokens={settings.batch_tokens} 太小：{cards} 张卡每张至少一段，共"
            f" {cards * length} 个词元。请加大 batch_tokens，或减少 cards。"
        )
    found = list(_layouts(settings, config, _divisors(cards), least))
    if found:
        return min(found, key=lambda each: (each.recomputed, each.shards))
    more = range(cards + 1, MOST_SHARDS + 1)  # memory falls with the number of shards
    place = bisect_left(more, True, key=lambda n: any(_layouts(settings, config, [n], least)))
    advice = (
        f"至少要 {more[place]} 张" if place < len(more) else f"{MOST_SHARDS} 张也不够，请换更大的卡"
    )
    raise UsageError(
        f"{cards} 张 {settings.card} 放不下 {settings.preset}（{settings.optimizer}，每张至少"
        f" {least * length} 个词元，所有层都重算）：{advice}。"
    )


def _layouts(
    settings: PlanSettings, config: PlugConfig, shards: list[int], least: int
) -> Iterator[Layout]:
    """For each number of shards that fits, the layout with the fewest recomputed layers."""
    layers = config.num_hidden_layers
    layers += config.num_decoder_layers if settings.target_length else 0
    room = MOST_FILLED * settings.kind.memory - OVERHEAD_BYTES
    accumulates = settings.batch_tokens > least * settings.cards * (
        settings.source_length + settings.target_length
    )

    def memory(count: int, recomputed: int) -> int:
        training = Training(
            batch_size=least,
            source_length=settings.source_length,
            target_length=settings.target_length,
            optimizer=settings.optimizer,
            recomputed=recomputed,
            accumulates=accumulates,
            dropout=False,
            cards=count,
            masked_share=MASKED_SHARE,
            half_stream=True,
            fp8=settings.fp8,
        )
        return training_need(config, training).total

    for count in shards:
        fewest = next((n for n in range(layers + 1) if memory(count, n) <= room), None)
        if fewest is not None:
            replicas = settings.cards // count
            yield Layout(count, replicas, least, fewest, memory(count, fewest))


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]

"""What `auto` picks, and what is said where nothing fits; the card is a number of bytes."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback

from plug.errors import PlugError, UsageError
from plug.finetuning import run
from plug.finetuning.memory import MODES, Case, best_way, decide, smallest_way, ways
from plug.finetuning.settings import FinetuneSettings
from plug.loading.estimate import Training
from plug.model.configuration import PRESETS, PlugConfig

GB = 10**9


def settings(**changes: Any) -> FinetuneSettings:
    values: dict[str, Any] = {"task": "cmrc2018_qg", "batch_size": 16, "model": "plug-27b"}
    return FinetuneSettings(train="", eval="", output="", **values | changes)


def case(room: int | None, *, bits: int | None = None, **changes: Any) -> Case:
    values: dict[str, Any] = {
        "config": PRESETS["27b"],
        "source_length": 384,
        "target_length": 32,
        "on_gpu": True,
    }
    return Case(bits=bits, room=None if room is None else room * GB, **values | changes)


def test_a_small_model_is_trained_whole_and_nothing_is_given_up() -> None:
    """What `plug finetune` did before there was `auto`."""
    asked = settings(batch_size=32)
    decision = decide(asked, case(24, config=PRESETS["mini"]))
    assert decision.settings == dataclasses.replace(asked, memory="full")
    assert "full adamw（float32）" in decision.told
    assert "为了放得下" not in decision.told


@pytest.mark.parametrize("room", [None, 8])
def test_on_a_cpu_a_small_model_is_trained_whole_in_silence(room: int | None) -> None:
    decision = decide(settings(), case(room, config=PRESETS["mini"], on_gpu=False))
    assert (decision.settings, decision.told) == (settings(memory="full"), "")


@pytest.mark.parametrize(
    ("room", "bits", "memory", "optimizer"),
    [
        (500, None, "full", "adamw"),
        (80, None, "full", "adafactor"),
        (56, None, "lora", "adamw"),
        (40, 8, "qlora", "adamw"),
        (24, 4, "qlora", "adamw"),
    ],
)
def test_the_27b_gets_the_best_that_fits(
    room: int, bits: int | None, memory: str, optimizer: str
) -> None:
    decision = decide(settings(), case(room, bits=bits))

    picked = decision.settings
    assert (picked.memory, picked.optimizer) == (memory, optimizer)
    assert picked.batch_size * picked.gradient_accumulation_steps == 16
    assert decision.way is not None
    assert decision.way.need.total < room * GB
    assert (
        f"预计显存峰值 {decision.way.need.total / GB:.1f} GB（空闲 {room}.0 GB）" in decision.told
    )
    recomputed = f"重算 30 层中的 {picked.recomputed_layers} 层"
    assert (recomputed in decision.told) == (picked.recomputed_layers > 0)


def test_cards_that_share_the_27b_train_every_weight_in_bfloat16() -> None:
    """8 cards of 24 GB, 32 examples a step; processes with whole copies have no such way."""
    decision = decide(settings(batch_size=4), case(24, cards=8, processes=8))
    picked = decision.settings
    assert (picked.memory, picked.optimizer) == ("full", "adamw8bit_fused")
    assert (picked.batch_size, picked.gradient_accumulation_steps) == (4, 1)
    assert "full adamw8bit_fused（bf16）" in decision.told
    assert decide(settings(batch_size=4), case(80, cards=8)).settings.optimizer == "adamw"
    needs_all = settings(batch_size=4, clip_grad_norm=0.5)
    assert decide(needs_all, case(24, cards=8)).settings.memory == "lora"
    assert decide(settings(), case(80, processes=2)).settings.memory == "lora"
    alone = settings(parallel={"sharding": "fsdp"})
    assert decide(alone, case(140)).settings.optimizer == "adamw8bit_fused"


def test_fewer_layers_are_recomputed_where_there_is_more_memory() -> None:
    counts = [
        decide(settings(), case(room, bits=4)).settings.recomputed_layers for room in (24, 40)
    ]
    assert counts[0] > counts[1] > 0


def test_a_step_keeps_its_examples_when_they_are_computed_in_parts() -> None:
    asked = settings(batch_size=48, gradient_accumulation_steps=2)
    decision = decide(asked, case(24, bits=4))
    picked = decision.settings
    assert picked.batch_size < 48
    assert picked.batch_size * picked.gradient_accumulation_steps == 96
    told = f"一步的 96 个例子分 {picked.gradient_accumulation_steps} 批算，每批 {picked.batch_size}"
    assert told in decision.told


def test_what_needs_all_gradients_is_not_fused() -> None:
    assert decide(settings(clip_grad_norm=0.5), case(80)).settings.memory == "lora"
    assert decide(settings(rslora=True), case(500)).settings.memory == "lora"
    with pytest.raises(PlugError, match=r"full adamw.*差 \d+"):
        decide(settings(fgm=1.0), case(80))


def test_evaluations_take_less_than_training() -> None:
    decision = decide(settings(), case(24, bits=4))
    assert decision.settings.eval_batch_size < 64
    assert f"评测一次 {decision.settings.eval_batch_size} 个例子（原为 64）" in decision.told


@pytest.mark.parametrize(
    ("changes", "room", "bits", "says", "says_not"),
    [
        ({}, 24, None, ["auto 的各种方式都放不下", "plug quantize --model plug-27b --bits 4"], []),
        ({}, 40, None, ["--bits 8", "--memory qlora"], ["--bits 4"]),
        ({}, 10, 4, ["qlora（4 位）", "请换显存更大的卡"], ["plug quantize"]),
        (
            {"memory": "full"}, 80, None,
            ["full 放不下：full adamw（float32）、一批 16 个例子", "--memory auto（会用 lora"],
            [],
        ),
        (
            {"memory": "lora"}, 70, None,
            ["--memory lora 放不下", "--set recomputed_layers=", "约需"], ["--batch-size"],
        ),
        ({"memory": "qlora"}, 17, 4, ["--batch-size", "gradient_accumulation_steps="], []),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_told_with_what_would(
    changes: dict[str, Any], room: int, bits: int | None, says: list[str], says_not: list[str]
) -> None:
    with pytest.raises(PlugError) as caught:
        decide(settings(**changes), case(room, bits=bits))
    message = str(caught.value)
    assert f"空闲 {room}.0 GB，差 " in message
    assert all(word in message for word in says), message
    assert not any(word in message for word in says_not), message


def test_what_is_asked_and_fits_is_left_as_it_is() -> None:
    asked = settings(memory="lora", recomputed_layers=20)
    decision = decide(asked, case(80))
    assert decision.settings == dataclasses.replace(
        asked, eval_batch_size=decision.settings.eval_batch_size
    )


def test_a_quantised_model_asked_for_every_weight_is_refused() -> None:
    with pytest.raises(UsageError, match="的权重是 4 位整数，不能训练每个权重"):
        decide(settings(fgm=1.0), case(80, bits=4))
    with pytest.raises(UsageError, match="rslora、dora 用于 LoRA"):
        decide(settings(fgm=1.0, dora=True), case(80))


@pytest.mark.parametrize(("memory", "host", "fits"), [
    ("full", 500, True), ("full", 200, False), ("lora", 64, True), ("lora", 40, False),
])  # fmt: skip
def test_offloading_asks_for_the_host_s_memory(memory: str, host: int, fits: bool) -> None:
    """27B: 16 bytes a parameter where every weight is trained, 2 beside adapters."""
    asked = settings(memory=memory, recomputed_layers=30)
    sharded = case(80, cards=8, offload=True, host=host * GB)
    if fits:
        assert decide(asked, sharded).settings.memory == memory
    else:
        with pytest.raises(PlugError, match=rf"offload 要把.*空闲 {host}\.0 GB，差 "):
            decide(asked, sharded)


def test_shards_that_fit_no_card_are_told_of_the_hosts_memory() -> None:
    asked = settings(memory="full", optimizer="adamw8bit", batch_size=4)
    with pytest.raises(PlugError) as error:
        decide(asked, case(32, cards=8))
    found = re.search(
        r"cpu_offload=true，显存约需 ([\d.]+) GB、内存约需 ([\d.]+) GB", str(error.value)
    )
    assert found is not None, error.value
    need, host = map(float, found.groups())
    assert need < 24
    assert host * 1e9 > 24e9 * 10  # a weight, its gradient in float32 and two states in 8 bits
    assert "--optimizer adamw8bit_fused，约需" in str(error.value)
    with pytest.raises(PlugError, match="差") as error:
        decide(asked, case(32))
    assert "cpu_offload" not in str(error.value)
    assert "adamw8bit_fused" not in str(error.value)
    clipped = dataclasses.replace(asked, clip_grad_norm=0.5)
    with pytest.raises(PlugError, match="cpu_offload") as error:
        decide(clipped, case(32, cards=8))
    assert "adamw8bit_fused" not in str(error.value)


def test_more_cards_take_less_each_and_offloading_the_least() -> None:
    def peak(**changes: Any) -> float:
        decision = decide(settings(recomputed_layers=30, memory="full"), case(900, **changes))
        assert decision.way is not None
        return decision.way.need.total / GB

    one, two, eight = peak(), peak(cards=2), peak(cards=8)
    assert one > two > eight > peak(cards=8, offload=True)
    assert 416 / 8 < eight < 416 / 8 + 25  # a share, and what is gathered and computed


def test_the_ways_of_a_mode_give_up_more_and_more() -> None:
    training = Training(batch_size=6, source_length=64, target_length=16)
    found = list(ways(PRESETS["mini"], MODES[0], training))
    assert [found[0].training.batch_size, found[-1].training.batch_size] == [6, 1]
    assert {way.training.batch_size * way.accumulated for way in found} == {6}
    assert smallest_way(PRESETS["mini"], MODES[0], training) in found
    fused = list(ways(PRESETS["mini"], MODES[1], training))
    assert {way.accumulated for way in fused} == {1}


def test_a_model_too_narrow_for_4_bits_has_no_way() -> None:
    training = Training(batch_size=6, source_length=64)
    assert best_way(PRESETS["test"], MODES[-1], training, 80 * GB) is None
    assert smallest_way(PRESETS["test"], MODES[-1], training) is None


# --- in a run -------------------------------------------------------------------------------------


@pytest.fixture
def tight(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """A run believes that it is on a GPU with so many bytes free."""
    before = run._case

    def make(room: int) -> None:
        monkeypatch.setattr(
            run,
            "_case",
            lambda *arguments: dataclasses.replace(before(*arguments), room=room, on_gpu=True),
        )

    return make


def test_a_run_does_what_auto_picked_and_goes_on_with_it(
    settings: Callable[..., FinetuneSettings],
    data: Callable[..., Path],
    tight: Callable[[int], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Resumed with the same command on a card with more room, it is the run that it was."""
    asked = settings("classification", data("classification"), precision="fp32", epochs=2.0)
    way = smallest(asked)
    tight(way)

    run.finetune(asked, device="cpu")

    kept = json.loads((Path(asked.output) / "finetuning.json").read_text())
    assert kept["settings"]["memory"] == "full"
    assert kept["settings"]["batch_size"] * kept["settings"]["gradient_accumulation_steps"] == 10
    assert kept["settings"]["batch_size"] < 10
    assert kept["asked"]["memory"] == "auto"
    assert kept["asked"]["batch_size"] == 10
    assert "为了放得下：一步的 10 个例子分" in capsys.readouterr().err
    assert run._as_before(Path(asked.output), asked, True).to_dict() == kept["settings"]


def test_what_auto_picked_is_kept_however_often_a_run_is_resumed(
    settings: Callable[..., FinetuneSettings],
    data: Callable[..., Path],
    tight: Callable[[int], None],
) -> None:
    """By the same command, and by one that names what was picked."""
    asked = settings("classification", data("classification"), precision="fp32", epochs=4.0)
    tight(smallest(asked))
    told = []
    for resume, again in ((False, asked), (True, asked), (True, asked), (True, None)):
        named = again or FinetuneSettings(**told[-1]["settings"])
        with pytest.raises(KeyboardInterrupt):
            run.finetune(named, device="cpu", resume=resume, callbacks=[StopAtCheckpoint()])
        told.append(json.loads((Path(asked.output) / "finetuning.json").read_text()))
    assert all(each["settings"] == told[0]["settings"] for each in told)
    assert told[0]["settings"] != asked.to_dict()
    assert told[0] == told[1] == told[2]


class StopAtCheckpoint(TrainerCallback):
    def on_save(self, *_: Any, **__: Any) -> None:
        raise KeyboardInterrupt


def smallest(asked: FinetuneSettings) -> int:
    """Bytes at which the tiny model's batch does not fit at once."""
    config = PlugConfig.from_file(Path(asked.model) / "config.json")
    training = Training(batch_size=10, source_length=8, half=False, recomputed=3, dropout=False)
    mode = dataclasses.replace(MODES[0], bits=32)
    whole = next(ways(config, mode, training)).need.with_overhead().total
    return whole - 1


def test_too_little_memory_is_said_before_anything_is_written(
    settings: Callable[..., FinetuneSettings],
    data: Callable[..., Path],
    tight: Callable[[int], None],
) -> None:
    asked = settings("classification", data("classification"))
    tight(1000)
    with pytest.raises(PlugError, match=r"--memory auto 的各种方式都放不下.*差"):
        run.finetune(asked, device="cpu")
    assert not Path(asked.output).exists() or not list(Path(asked.output).iterdir())

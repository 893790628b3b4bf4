from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from plug.model.configuration import PRESETS, PlugConfig
from plug.model.plug import Plug


def test_json_has_the_27b_s_figures(run_plug: Callable) -> None:
    """Spec sections 1 and 7; operations here include attention's own."""
    ran = run_plug("info", "--model", "27b", "--json")
    costs = json.loads(ran.out)
    assert ran.status == 0
    assert costs["config"] == PRESETS["27b"].to_dict()
    billions = {name: round(count / 1e9, 1) for name, count in costs["parameters"].items()}
    assert billions == {
        "embeddings": 0.2,
        "encoder": 19.3,
        "decoder": 6.4,
        "heads": 0.1,
        "total": 26.0,
    }
    assert sum(list(costs["parameters"].values())[:-1]) == costs["parameters"]["total"]
    assert {name: round(size / 1e9) for name, size in costs["bytes"].items()} == {
        "fp32": 104,
        "bf16": 52,
        "int8": 26,
        "int4": 14,
    }
    assert (costs["source_length"], costs["position"]) == (512, 128)
    attention = 24 * 4 * 8192 * 512  # a source token against 512
    assert round((costs["encoder_flops_per_token"] - attention) * 512 / 1e12, 1) == 19.8
    attention = 6 * 4 * 8192 * (512 + 128)
    assert round((costs["decoder_flops_per_token"] - attention) / 1e9, 1) == 11.6
    assert round(costs["decoder_weights_per_token"] / 1e9, 2) == 5.81
    assert costs["cache_bytes_per_token"] == 196_608
    assert {name: round(size / 1e9) for name, size in costs["generation_bytes"].items()} == {
        "fp32": 105,
        "bf16": 52,
        "int8": 27,
        "int4": 15,
    }


def test_a_directory_is_counted_from_its_config(
    run_plug: Callable, model_directory: Path, tiny_model: Plug
) -> None:
    costs = json.loads(run_plug("info", "--model", model_directory, "--json").out)
    assert costs["parameters"]["total"] == sum(p.numel() for p in tiny_model.parameters())
    assert (costs["source_length"], costs["position"]) == (96, 96)  # it has no more positions


def test_the_table_shows_what_the_json_holds(run_plug: Callable) -> None:
    shown = run_plug("info", "--model", "mini").out
    costs = json.loads(run_plug("info", "--model", "mini", "--json").out)
    for count in costs["parameters"].values():
        assert f"{count:,}" in shown
    for size in costs["bytes"].values():
        assert f"{size / 1e6:,.1f} MB" in shown
    assert f"{costs['decoder_flops_per_token'] / 1e9:.3f} GFLOP" in shown


def test_a_model_too_narrow_for_4_bits_is_said_to_have_none(run_plug: Callable) -> None:
    assert json.loads(run_plug("info", "--model", "test", "--json").out)["bytes"]["int4"] is None
    assert "不支持（宽度不是 128 的倍数）" in run_plug("info", "--model", "test").out


def test_lengths_change_attention_s_share(run_plug: Callable) -> None:
    def costs(*lengths: object) -> dict:
        return json.loads(run_plug("info", "--model", "27b", "--json", *lengths).out)

    short, long = costs("--source-length", 10), costs("--source-length", 1000)
    difference = long["decoder_flops_per_token"] - short["decoder_flops_per_token"]
    assert difference == 6 * 4 * 8192 * 990
    difference = long["encoder_flops_per_token"] - short["encoder_flops_per_token"]
    assert difference == 24 * 4 * 8192 * 990


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--model", "nowhere"], "nowhere"),
        (["--model", "27b", "--source-length", "2049"], "--source-length 2049 超过"),
        (["--model", "27b", "--position", "2049"], "--position 2049 超过"),
        (["--card", "24GB"], "--card 24GB 要与 --memory 一起用"),
        (["--cards", "2"], "--cards 2 只用于训练"),
        (["--cards", "2", "--memory", "generate"], "--cards 2 只用于训练"),
        (["--tensor", "2", "--memory", "finetune"], "--tensor 2 只用于预训练"),
        (["--tensor", "3", "--memory", "pretrain", "--cards", "8"], "不能整除进程数 8"),
        (["--tensor", "3", "--memory", "pretrain", "--cards", "9"], "不能被 parallel.tensor=3"),
    ],
)
def test_bad_input_is_status_2(run_plug: Callable, arguments: list[str], complaint: str) -> None:
    ran = run_plug("info", *arguments)
    assert (ran.status, ran.out) == (2, "")
    assert ran.err.startswith("错误：")
    assert complaint in ran.err


def test_what_else_a_card_must_have_free_is_told(run_plug: Callable) -> None:
    """0.16 GB at the peak do not fit 0.5 GB: without a word that reads as a mistake."""
    ran = run_plug("info", "--memory", "finetune", "--card", "0.5GB")
    assert "够：峰值之外还要空着 0.54 GB" in ran.out


def test_ways_to_fine_tune_are_predicted_without_a_gpu(run_plug: Callable) -> None:
    """27B on 24 GB: 4 bits fit, and say how; 8 bits do not, and say what they would take."""
    ran = run_plug(
        *("info", "--preset", "27b", "--memory", "finetune", "--card", "24GB"),
        *("--batch-size", 16, "--source-length", 384, "--target-length", 32, "--json"),
    )
    told = json.loads(ran.out)
    assert (told["model"], told["card_bytes"], told["batch_size"]) == ("27b", 24 * 10**9, 16)
    by_name = {row["name"]: row for row in told["ways"]}
    small = by_name["qlora（4 位）"]
    assert small["fits"]
    assert 16e9 < small["peak_bytes"] < 23.5e9
    assert small["peak_bytes"] == sum(small["bytes"].values())
    assert small["recomputed_layers"] > 0
    assert small["batch_size"] * small["accumulated"] == 16
    fitting = {name for name, row in by_name.items() if row["fits"]}
    assert fitting == {"qlora（4 位）"}
    assert by_name["full adamw（float32）"]["peak_bytes"] > 400e9


@pytest.mark.parametrize(("use", "ways"), [("generate", 4), ("finetune", 10), ("pretrain", 9)])
def test_each_use_has_its_table(use: str, ways: int, run_plug: Callable) -> None:
    told = json.loads(run_plug("info", "--memory", use, "--model", "base", "--json").out)
    assert (told["memory"], len(told["ways"]), told["card_bytes"]) == (use, ways, None)
    shown = run_plug("info", "--memory", use, "--model", "base").out
    for row in told["ways"]:
        assert row["name"] in shown
        assert f"{row['peak_bytes'] / 1e9:.{1 if row['peak_bytes'] > 1e11 else 2}f}" in shown


def test_the_originals_cards_and_the_hosts_memory(run_plug: Callable) -> None:
    """Every weight in float32 goes to 8 cards with the shards in the host's memory."""
    command = ["info", "--preset", "27b", "--memory", "finetune", "--target-length", 30]
    command += ["--batch-size", 4, "--cards", 8, "--card", "24GB"]
    ways = json.loads(run_plug(*command, "--json").out)["ways"]
    fits = {way["name"]: way["fits"] for way in ways}
    assert [name for name, each in fits.items() if each] == [
        "full adamw8bit_fused（bf16）",
        "lora（bf16）",
        "full adamw cpu_offload",
    ]
    offloaded = ways[-1]
    assert offloaded["peak_bytes"] < 24e9
    assert 400e9 < offloaded["host_bytes"] < 430e9  # 16 bytes of each of 26 thousand million
    assert "各卡一共 416.5 GB" in run_plug(*command).out


def test_a_larger_batch_takes_more_and_more_cards_less_each(run_plug: Callable) -> None:
    def peaks(*options: object) -> dict[str, int]:
        ran = run_plug("info", "--memory", "finetune", "--model", "27b", "--json", *options)
        ways = reversed(json.loads(ran.out)["ways"])
        return {row["name"]: row["peak_bytes"] for row in ways if row["accumulated"] == 1}

    usual, many, shared = peaks(), peaks("--batch-size", 64), peaks("--cards", 8)
    assert all(many[name] > usual[name] for name in usual)
    assert set(shared) == {
        "full adamw（float32）",
        "full adamw8bit（float32）",
        "full adamw8bit_fused（bf16）",
        "lora（bf16）",
        "full adamw cpu_offload",
    }
    assert all(shared[name] < usual[name] for name in shared.keys() & usual.keys())


@pytest.mark.parametrize("card", ["24XB", "0", "much", "-3GB", "9" * 400])
def test_a_card_is_a_size(card: str, run_plug: Callable) -> None:
    ran = run_plug("info", "--memory", "generate", "--card", card)
    assert (ran.status, ran.out) == (2, "")
    assert f"--card {card} 不是显存的大小" in ran.err


def test_a_fine_tuned_classifier_has_no_decoder(
    run_plug: Callable, config: PlugConfig, tmp_path: Path
) -> None:
    hf = pytest.importorskip("plug.hf")
    values = config.to_dict() | {"num_labels": 5}
    model = hf.PlugForSequenceClassification(hf.PlugTransformersConfig(**values))
    model.save_pretrained(tmp_path / "classifier")

    costs = json.loads(run_plug("info", "--model", tmp_path / "classifier", "--json").out)

    assert costs["parameters"]["total"] == sum(x.numel() for x in model.parameters())
    assert costs["parameters"]["decoder"] == 0
    assert costs["parameters"]["heads"] == 5 * config.hidden_size + 5
    assert costs["bytes"]["fp32"] == 4 * costs["parameters"]["total"]
    assert costs["generation_bytes"] == {}
    shown = run_plug("info", "--model", tmp_path / "classifier")
    assert shown.status == 0
    assert "写作需要的显存" not in shown.out


def test_a_cpu_is_told_what_it_needs_and_has(run_plug: Callable) -> None:
    told = json.loads(run_plug("info", "--preset", "27b", "--device", "cpu", "--json").out)
    assert [row["bits"] for row in told["precisions"]] == [32, 16, 8, 4]
    [four] = [row for row in told["precisions"] if row["bits"] == 4]
    assert 14.9e9 < four["bytes"]["weights"] < 15e9  # 14.2 GB of the file, its words in float32
    assert four["need_bytes"] == sum(four["bytes"].values())
    if told["free_bytes"] is not None:
        assert four["fits"] == (four["need_bytes"] <= told["free_bytes"])
    shown = run_plug("info", "--preset", "test", "--device", "cpu").out
    assert "不支持" in shown  # too narrow for 4 bits
    assert told["instructions"] in shown


def test_a_directory_has_the_precision_it_was_saved_in(run_plug: Callable) -> None:
    told = json.loads(run_plug("info", "--device", "cpu", "--json").out)
    assert [row["bits"] for row in told["precisions"]] == [16]


def test_pre_training_on_a_card_recomputes_as_few_layers_as_fit(run_plug: Callable) -> None:
    options = ("--batch-size", "16", "--source-length", "512", "--target-length", "512")
    command = ("info", "--memory", "pretrain", "--model", "27b", "--cards", "64", "--json")
    rows = json.loads(run_plug(*command, *options, "--card", "80GB").out)["ways"]
    names = ["adamw", "adamw8bit", "adamw8bit fp8", "muon", "muon compile"]
    assert [row["name"] for row in rows] == names
    assert all(row["fits"] for row in rows[:4])
    assert rows[4]["recomputed_layers"] == 0
    assert rows[0]["recomputed_layers"] > rows[1]["recomputed_layers"] > 0
    assert rows[2]["recomputed_layers"] == 0  # what products read takes half
    assert rows[0]["bytes"]["optimizer"] > 3.9 * rows[1]["bytes"]["optimizer"]


def test_cards_that_compute_a_layer_together_take_less_each(run_plug: Callable) -> None:
    """As `[parallel] tensor` has it; compiled layers are not split."""
    command = ("info", "--memory", "pretrain", "--model", "27b", "--cards", "64")
    whole, split = (
        {row["name"]: row["bytes"] for row in json.loads(ran.out)["ways"]}
        for ran in (run_plug(*command, "--json", *more) for more in ((), ("--tensor", "8")))
    )
    assert split.keys() == whole.keys() - {"muon compile"}
    for name, found in split.items():
        assert found["optimizer"] == whole[name]["optimizer"]  # each value is on one card
        assert found["activations"] + found["workspace"] < 0.7 * (
            whole[name]["activations"] + whole[name]["workspace"]
        )
    shown = run_plug(*command, "--tensor", "8", "--card", "80GB").out
    assert "64 张（张量并行 8），每张" in shown

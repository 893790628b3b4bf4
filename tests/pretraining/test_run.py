"""The training loop: losses fall, resuming is exact, any split of a batch is the same step."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch

from plug.errors import PlugError, UsageError
from plug.loading.load import load
from plug.pretraining import losses
from plug.pretraining.batches import StructBertBatches
from plug.pretraining.record import FIELDS, MORE_FIELDS, Record, read_rows
from plug.pretraining.run import pretrain
from plug.pretraining.settings import RunConfig
from plug.pretraining.tokens import write_tokens
from plug.tokenization import PlugTokenizer

Settings = Callable[..., RunConfig]
SHAPES = {1: [[32, 1.0], [24, 1.0]], 2: [[24, 16, 1.0], [16, 24, 1.0]]}
TIMES = ("seconds", "tokens_per_second", "data_wait")


def log(config: RunConfig) -> list[dict[str, float]]:
    """The rows of a run's log, times aside."""
    rows = read_rows(Path(config.output) / "log.csv")
    return [{k: v for k, v in row.items() if k not in TIMES} for row in rows]


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return load(directory).state_dict()


def same_weights(first: Path, second: Path) -> bool:
    ours, theirs = weights(first), weights(second)
    return ours.keys() == theirs.keys() and all(ours[k].equal(theirs[k]) for k in ours)


@pytest.fixture
def interrupted(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, RunConfig, int], None]:
    """Runs a stage until Ctrl-C comes, just after a row of the log."""

    def run(stage: int, config: RunConfig, step: int) -> None:
        add = Record.add

        def stop(record: Record, row: dict[str, Any]) -> None:
            add(record, row)
            if row["step"] == step:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(Record, "add", stop)
            with pytest.raises(KeyboardInterrupt):
                pretrain(stage, config, device="cpu")

    return run


# --- both stages -----------------------------------------------------------------------------


@pytest.mark.usefixtures("drawn")
def test_stage_1_then_stage_2(
    settings: Settings, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    common = {"steps": 60, "batch_tokens": 1024, "learning_rate": 1e-2, "log_every": 5}
    first = settings(shapes=SHAPES[1], output=str(tmp_path / "one"), **common)
    pretrain(1, first, device="cpu")

    rows = log(first)
    assert [row["step"] for row in rows] == list(range(5, 61, 5))
    assert rows[-1]["mlm"] < 0.6 * rows[0]["mlm"]
    assert rows[-1]["word"] < 0.6 * rows[0]["word"]
    assert rows[0]["tokens"] == pytest.approx(5 * 1024, rel=0.02)
    assert 0 < rows[-1]["learning_rate"] < rows[3]["learning_rate"] <= 1e-2
    encoder = load(tmp_path / "one" / "model")
    assert encoder.config.num_decoder_layers == 0
    assert encoder.decoder is None
    assert PlugTokenizer.load(tmp_path / "one" / "model").encode("今天天气")
    assert (tmp_path / "one" / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "one" / "settings.json").read_text())["stage"] == 1
    assert "60/60 步" in capfd.readouterr().err

    second = settings(
        shapes=SHAPES[2],
        output=str(tmp_path / "two"),
        init_from=str(tmp_path / "one" / "model"),
        mlm_fraction=0.5,
        **common,
    )
    pretrain(2, second, device="cpu")

    rows = log(second)
    assert rows[-1]["lm"] < 0.6 * rows[0]["lm"]
    assert [row["step"] for row in rows if "mlm" in row] == list(range(5, 31, 5))
    assert load(tmp_path / "two" / "model").decoder is not None
    header = (tmp_path / "two" / "log.csv").read_text().split("\n")[0]
    assert header == ",".join([*FIELDS, "lm", "mlm", *MORE_FIELDS])


def test_stage_2_starts_from_the_weights_of_stage_1(settings: Settings, tmp_path: Path) -> None:
    first = settings(output=str(tmp_path / "one"), steps=3)
    pretrain(1, first, device="cpu")
    # a rate so small that no weight moves
    unmoved = {"shapes": SHAPES[2], "steps": 1, "learning_rate": 1e-30}
    stage1 = str(tmp_path / "one" / "model")
    for name, source in (("two", stage1), ("new", "")):
        pretrain(
            2,
            settings(output=str(tmp_path / name), init_from=source, **unmoved),
            device="cpu",
        )

    old, new = (weights(tmp_path / name / "model") for name in ("one", "new"))
    both = weights(tmp_path / "two" / "model")
    assert {name.split(".")[0] for name in old} == {
        "embeddings",
        "encoder",
        "mlm_head",
        "sentence_head",
    }
    assert all(both[name].equal(old[name]) for name in old)
    assert not both["encoder.layers.0.attention.q_proj.weight"].equal(
        new["encoder.layers.0.attention.q_proj.weight"]
    )
    assert any(name.startswith("decoder.layers.1.") for name in both)


# --- the same step, however it is made -------------------------------------------------------


def logs_agree(first: RunConfig, second: RunConfig, tolerance: float) -> None:
    ours, theirs = log(first), log(second)
    assert len(ours) == len(theirs) > 0
    for one, other in zip(ours, theirs, strict=True):
        assert one == pytest.approx(other, rel=tolerance, abs=tolerance)


@pytest.mark.parametrize("stage", [1, 2])
def test_micro_batches_are_the_whole_batch(stage: int, settings: Settings, tmp_path: Path) -> None:
    whole = settings(shapes=SHAPES[stage], output=str(tmp_path / "whole"))
    parts = settings(shapes=SHAPES[stage], output=str(tmp_path / "parts"), micro_batch_tokens=100)
    for config in (whole, parts):
        pretrain(stage, config, device="cpu")
    logs_agree(whole, parts, 2e-5)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_worker_processes_change_nothing(settings: Settings, tmp_path: Path) -> None:
    here = settings(shapes=SHAPES[1], output=str(tmp_path / "here"))
    workers = settings(shapes=SHAPES[1], output=str(tmp_path / "workers"), workers=2)
    for config in (here, workers):
        pretrain(1, config, device="cpu")
    assert log(here) == log(workers)


def test_bfloat16_stays_near_fp32(settings: Settings, tmp_path: Path) -> None:
    whole = settings(shapes=SHAPES[2], output=str(tmp_path / "fp32"))
    half = settings(shapes=SHAPES[2], output=str(tmp_path / "bf16"), precision="bf16")
    for config in (whole, half):
        pretrain(2, config, device="cpu")
    for one, other in zip(log(whole), log(half), strict=True):
        assert other["lm"] == pytest.approx(one["lm"], rel=0.02)
        assert other["lm"] != one["lm"]
    assert weights(tmp_path / "bf16" / "model")["encoder.final_norm.weight"].dtype == torch.float32


def test_objectives_that_are_switched_off_are_not_trained(settings: Settings) -> None:
    config = settings(sentence_objective=False, shuffle_rate=0.0, learning_rate=1e-2)
    pretrain(1, config, device="cpu")
    assert all(row.keys() & {"mlm", "word", "sentence"} == {"mlm"} for row in log(config))


def test_a_batch_without_a_free_trigram_is_no_reason_to_fail(settings: Settings) -> None:
    config = settings(shapes=[[14, 1.0]], batch_tokens=14, steps=60, mlm_rate=0.5)
    pretrain(1, config, device="cpu")
    words = [row["word"] for row in log(config)]
    assert 0 in words
    assert max(words) > 1
    assert len(words) == 60


# --- resuming --------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("stage", [1, 2])
def test_a_resumed_run_is_the_uninterrupted_one(
    stage: int,
    optimizer: str,
    settings: Settings,
    interrupted: Callable[[int, RunConfig, int], None],
    tmp_path: Path,
) -> None:
    """With dropout; the interruption comes two steps after a checkpoint, whose rows are redone."""
    made = {
        "shapes": SHAPES[stage],
        "steps": 8,
        "checkpoint_every": 3,
        "dropout": 0.1,
        "optimizer": optimizer,
        "mlm_fraction": 0.6,
    }
    whole = settings(output=str(tmp_path / "whole"), **made)
    pretrain(stage, whole, device="cpu")
    broken = settings(output=str(tmp_path / "broken"), **made)
    interrupted(stage, broken, 5)
    assert [row["step"] for row in log(broken)] == [1, 2, 3, 4, 5]
    assert not (tmp_path / "broken" / "model").exists()

    pretrain(stage, broken, resume=True, device="cpu")

    assert log(broken) == log(whole)
    assert same_weights(tmp_path / "broken" / "model", tmp_path / "whole" / "model")
    rows = read_rows(tmp_path / "broken" / "log.csv")
    seconds = [row["seconds"] for row in rows]
    assert seconds == sorted(seconds)


def test_dropout_is_applied_while_training_and_not_saved(
    settings: Settings, tmp_path: Path
) -> None:
    runs = [settings(output=str(tmp_path / str(p)), dropout=p) for p in (0.0, 0.5)]
    for config in runs:
        pretrain(1, config, device="cpu")
    assert log(runs[0])[0]["mlm"] != log(runs[1])[0]["mlm"]
    saved = load(tmp_path / "0.5" / "model").config
    assert saved.hidden_dropout_prob == saved.attention_probs_dropout_prob == 0.1


@pytest.fixture
def checkpointed(
    settings: Settings, interrupted: Callable[[int, RunConfig, int], None]
) -> RunConfig:
    """A run that was interrupted at step 4, with a checkpoint of step 3."""
    config = settings(steps=7, checkpoint_every=3)
    interrupted(1, config, 4)
    return config


@pytest.mark.usefixtures("checkpointed")
def test_settings_that_change_the_run_are_refused_on_resume(settings: Settings) -> None:
    with pytest.raises(UsageError, match="batch_tokens、seed"):
        pretrain(
            1,
            settings(steps=7, checkpoint_every=3, seed=2, batch_tokens=128),
            resume=True,
            device="cpu",
        )
    with pytest.raises(UsageError, match=r"不同之处：.*stage"):
        pretrain(2, settings(steps=7, shapes=SHAPES[2]), resume=True, device="cpu")
    pretrain(1, settings(steps=7, checkpoint_every=2, log_every=2), resume=True, device="cpu")


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_another_number_of_processes_on_resume(
    dropout: float,
    settings: Settings,
    interrupted: Callable[[int, RunConfig, int], None],
) -> None:
    """Refused where dropout would be drawn otherwise; without it the run is the same."""
    config = settings(steps=7, checkpoint_every=3, dropout=dropout)
    interrupted(1, config, 4)
    path = Path(config.output) / "checkpoint" / "training_state.pt"
    torch.save(torch.load(path) | {"world_size": 2}, path)
    if dropout:
        with pytest.raises(UsageError, match=r"用 2 个进程训练的，现在有 1 个.*nproc-per-node 2"):
            pretrain(1, config, resume=True, device="cpu")
        assert not (Path(config.output) / "model").exists()
    else:
        pretrain(1, config, resume=True, device="cpu")
        assert (Path(config.output) / "model").is_dir()


def test_resuming_without_a_checkpoint(settings: Settings, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="没有可以接着训练的检查点"):
        pretrain(1, settings(), resume=True, device="cpu")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("training_state.pt", b"no pickle"),
        ("training_state.pt", b""),
        ("training_state.pt", None),  # cut in half
        ("model.safetensors", None),
        ("config.json", b"{"),
    ],
)
def test_a_corrupt_checkpoint_is_one_line(
    file: str, content: bytes | None, checkpointed: RunConfig
) -> None:
    path = Path(checkpointed.output) / "checkpoint" / file
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2] if content is None else content)
    before = log(checkpointed)
    with pytest.raises(PlugError) as caught:
        pretrain(1, checkpointed, resume=True, device="cpu")
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert log(checkpointed) == before


def test_a_checkpoint_of_something_else(checkpointed: RunConfig) -> None:
    path = Path(checkpointed.output) / "checkpoint" / "training_state.pt"
    torch.save({"weights": torch.zeros(3)}, path)
    with pytest.raises(PlugError, match="已损坏"):
        pretrain(1, checkpointed, resume=True, device="cpu")


def test_a_checkpoint_whose_adamw_was_not_fused_is_resumed(checkpointed: RunConfig) -> None:
    """As earlier versions wrote them on a CPU."""
    path = Path(checkpointed.output) / "checkpoint" / "training_state.pt"
    values = torch.load(path)
    for group in values["optimizers"][0]["param_groups"]:
        assert group["fused"]
        group["fused"] = False
    torch.save(values, path)
    pretrain(1, checkpointed, resume=True, device="cpu")
    assert log(checkpointed)[-1]["step"] == checkpointed.steps


# --- what a machine may lack -----------------------------------------------------------------


@pytest.mark.parametrize("share", [0.3, 1.5])  # of the weights: of those, or of Adam's moments
def test_a_full_disk_keeps_the_old_checkpoint(
    share: float,
    checkpointed: RunConfig,
    full_disk: Callable[[int], AbstractContextManager[None]],
    contents: Callable[[Path], dict[str, bytes]],
) -> None:
    checkpoint = Path(checkpointed.output) / "checkpoint"
    before = contents(checkpoint)
    limit = int(share * (checkpoint / "model.safetensors").stat().st_size)
    with full_disk(limit), pytest.raises(PlugError, match=r"没有改动.*磁盘空间") as caught:
        pretrain(1, checkpointed, resume=True, device="cpu")
    assert "\n" not in str(caught.value)
    assert contents(checkpoint) == before
    assert {path.name for path in checkpoint.parent.iterdir()} == {
        "checkpoint",
        "log.csv",
        "settings.json",
    }
    pretrain(1, checkpointed, resume=True, device="cpu")
    assert [row["step"] for row in log(checkpointed)] == list(range(1, 8))


def test_a_full_disk_while_logging(
    settings: Settings, full_disk: Callable[[int], AbstractContextManager[None]]
) -> None:
    with full_disk(1400), pytest.raises(PlugError, match=r"没能写入 .*/run：File too large"):
        pretrain(1, settings(steps=30), device="cpu")


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_worker_that_dies(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    parent = os.getpid()

    def die(*_: object) -> None:
        assert os.getpid() != parent
        os._exit(9)

    monkeypatch.setattr(StructBertBatches, "example", die)
    with pytest.raises(PlugError, match="生成批次的进程意外退出"):
        pretrain(1, settings(workers=1), device="cpu")


def test_too_little_gpu_memory_is_one_line(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(losses, "structbert_losses", full)
    with pytest.raises(PlugError, match="micro_batch_tokens（现在是 65536）"):
        pretrain(1, settings(), device="cpu")


def test_a_loss_that_is_no_number_stops_the_run_before_it_is_saved(settings: Settings) -> None:
    """Checkpoints come between the rows of the log, and are looked at all the same."""
    config = settings(
        steps=50, learning_rate=1e30, clip_grad_norm=1e30, log_every=50, checkpoint_every=1
    )
    with pytest.raises(PlugError, match=r"第 \d+ 步的 .*不再是有限的数.*learning_rate"):
        pretrain(1, config, device="cpu")
    state = weights(Path(config.output) / "checkpoint")
    assert all(tensor.isfinite().all() for tensor in state.values())


# --- wrong use -------------------------------------------------------------------------------


def test_an_output_that_holds_something(settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "log.csv").write_text("mine")
    with pytest.raises(UsageError, match="已有内容"):
        pretrain(1, settings(), device="cpu")
    assert (tmp_path / "run" / "log.csv").read_text() == "mine"
    with pytest.raises(UsageError, match="是一个文件"):
        pretrain(1, settings(output=str(tmp_path / "run" / "log.csv")), device="cpu")


def test_an_empty_output_is_fine(settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    pretrain(1, settings(steps=1), device="cpu")
    assert (tmp_path / "run" / "model" / "config.json").is_file()


@pytest.mark.parametrize(
    ("stage", "changes", "message"),
    [
        (1, {"corpus": "/nowhere"}, "/nowhere"),
        (1, {"shapes": [[32, 16, 1.0]]}, "shapes"),
        (2, {"shapes": [[32, 1.0]]}, "shapes"),
        (1, {"shapes": [[5000, 1.0]], "batch_tokens": 5000}, "max_position_embeddings"),
        (1, {"shapes": [[90, 1.0]], "batch_tokens": 89}, "batch_tokens"),
        (1, {"model": {"hiden_size": 64}}, "hiden_size"),
        (1, {"model": {"hidden_size": 33}}, "num_attention_heads"),
        (1, {"model": {"vocab_size": 64}}, "vocab_size"),
        (1, {"model": {"type_vocab_size": 1}}, "type_vocab_size"),
        (1, {"dropout": 1.0}, "dropout"),
        (2, {"model": {"num_decoder_layers": 0}, "shapes": SHAPES[2]}, "解码器"),
        (1, {"domain_factors": {"poems": 2.0}}, "poems"),
        (1, {"init_from": "nowhere"}, "nowhere"),
    ],
)
def test_settings_that_do_not_fit(
    stage: int, changes: dict[str, Any], message: str, settings: Settings, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        pretrain(stage, settings(**changes), device="cpu")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("device", ["nonsense", "cuda:99", "meta", ""])
def test_a_device_that_is_none(device: str, settings: Settings, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"用不了设备 '{device}'"):
        pretrain(1, settings(), device=device)
    assert not (tmp_path / "run").exists()


def test_a_model_of_another_shape_or_vocabulary_is_no_start(
    settings: Settings, corpus_files: list[Path], corpus: Path, tmp_path: Path
) -> None:
    pretrain(1, settings(steps=1, output=str(tmp_path / "one")), device="cpu")
    stage1 = str(tmp_path / "one" / "model")
    with pytest.raises(UsageError, match=r"intermediate_size 是 \d+，这里要 256"):
        pretrain(
            2,
            settings(init_from=stage1, shapes=SHAPES[2], model={"intermediate_size": 256}),
            device="cpu",
        )
    vocabulary = PlugTokenizer.load(corpus).backend.get_vocab()
    swapped = vocabulary | {"山": vocabulary["庙"], "庙": vocabulary["山"]}
    other = PlugTokenizer.from_pieces(swapped, [])
    list(write_tokens(corpus_files, other, tmp_path / "other"))
    with pytest.raises(UsageError, match="词表"):
        pretrain(
            2,
            settings(init_from=stage1, shapes=SHAPES[2], corpus=str(tmp_path / "other")),
            device="cpu",
        )

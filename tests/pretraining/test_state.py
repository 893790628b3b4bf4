"""What a stopped run is resumed from, whatever stopped it, and what is refused and why."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from plug import files
from plug.distributed.processes import Processes
from plug.errors import PlugError, UsageError
from plug.files import BusyError
from plug.loading.load import load
from plug.pretraining.record import read_rows
from plug.pretraining.run import pretrain
from plug.pretraining.settings import RunConfig
from plug.pretraining.state import check_output, read_saved, write_settings

Settings = Callable[..., RunConfig]
ALONE = Processes(0, 1, torch.device("cpu"))


def test_each_message_advises_what_the_other_way_takes(settings: Settings, tmp_path: Path) -> None:
    output = tmp_path / "run"
    check_output(output, resume=False)
    with pytest.raises(UsageError, match=r"没有可以接着训练的检查点.*去掉 --resume"):
        check_output(output, resume=True)

    output.mkdir()
    (output / ".lock").touch()  # a run was killed as it began
    check_output(output, resume=False)
    with pytest.raises(UsageError, match="去掉 --resume"):
        check_output(output, resume=True)

    write_settings(output, 1, settings())
    check_output(output, resume=True)
    with pytest.raises(UsageError, match=r"已有内容.*请加 --resume"):
        check_output(output, resume=False)

    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "letter").touch()
    for resume in (False, True):
        with pytest.raises(UsageError, match="不是一次训练"):
            check_output(tmp_path / "other", resume=resume)


def test_a_run_stopped_before_its_first_checkpoint_begins_anew(
    settings: Settings, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = settings()
    output = tmp_path / "run"
    output.mkdir()
    write_settings(output, 1, config)
    (output / "log.csv").write_text("step,tok")
    with pytest.raises(UsageError, match="不同之处：seed"):
        pretrain(1, settings(seed=2), resume=True, device="cpu")
    pretrain(1, config, resume=True, device="cpu")
    assert "还没有检查点，从头开始" in capfd.readouterr().err
    assert len(read_rows(output / "log.csv")) == config.steps

    pretrain(1, config, resume=True, device="cpu")
    assert "已经完成" in capfd.readouterr().err
    (output / "settings.json").write_text("{")
    with pytest.raises(PlugError, match=r"settings\.json 已损坏"):
        read_saved(output, 1, config, ALONE, "")


def test_a_checkpoint_hidden_between_two_renames_is_found(
    settings: Settings, tmp_path: Path
) -> None:
    config = settings(steps=5, checkpoint_every=3)
    pretrain(1, config, device="cpu")
    output = tmp_path / "run"
    shutil.rmtree(output / "model")
    (output / "checkpoint").rename(output / ".checkpoint.old-99")
    (output / ".checkpoint.partial-99").mkdir()
    pretrain(1, config, resume=True, device="cpu")
    assert [row["step"] for row in read_rows(output / "log.csv")] == [1, 2, 3, 4, 5]
    assert sorted(path.name for path in output.iterdir()) == [
        "checkpoint",
        "log.csv",
        "loss.png",
        "model",
        "report",
        "settings.json",
    ]


def test_two_runs_with_one_output(settings: Settings, tmp_path: Path) -> None:
    with files.hold(tmp_path / "run"), pytest.raises(BusyError, match="正由另一个进程写入"):
        pretrain(1, settings(), device="cpu")


def test_a_run_killed_at_any_event_is_resumed_bit_for_bit(
    settings: Settings, tmp_path: Path, kill: Callable[..., bool]
) -> None:
    """Every 11th event; `tests/faults/kills.py` tries all, as system calls."""
    whole = settings(output=str(tmp_path / "whole"), steps=4, checkpoint_every=2)
    pretrain(1, whole, device="cpu")
    expected = load(tmp_path / "whole" / "model").state_dict()
    config = settings(steps=4, checkpoint_every=2)
    output = tmp_path / "run"
    number, alive = -8, False
    while not alive:
        number += 11
        alive = not kill(lambda: pretrain(1, config, device="cpu"), number)
        if not alive:
            pretrain(1, config, resume=files.is_used(output), device="cpu")
        found = load(output / "model").state_dict()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        assert [row["step"] for row in read_rows(output / "log.csv")] == [1, 2, 3, 4]
        assert json.loads((output / "settings.json").read_text())["stage"] == 1
        shutil.rmtree(output)
    assert number > 60


def test_a_corpus_that_changed_since_the_checkpoint(settings: Settings, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    shutil.copytree(settings().corpus, corpus)
    config = settings(steps=5, checkpoint_every=3, corpus=str(corpus))
    pretrain(1, config, device="cpu")
    shutil.rmtree(tmp_path / "run" / "model")
    ids = np.load(corpus / "news.tokens.npy")
    ids[3] += 1
    np.save(corpus / "news.tokens.npy", ids)
    with pytest.raises(UsageError, match=r"语料 .* 在检查点 .* 之后变了"):
        pretrain(1, config, resume=True, device="cpu")
    ids[3] -= 1
    np.save(corpus / "news.tokens.npy", ids)
    pretrain(1, config, resume=True, device="cpu")
    assert (tmp_path / "run" / "model" / "config.json").is_file()

"""Meters against counts by hand; the end page; TensorBoard where it is installed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from plug.errors import UsageError
from plug.model.configuration import PRESETS
from plug.model.plug import Plug
from plug.pretraining.batches import Batch
from plug.pretraining.run import pretrain
from plug.pretraining.settings import RunConfig
from plug.pretraining.watching import PROCESS_FIELDS, Meter, batch_flops

Settings = Callable[..., RunConfig]
BATCH = {
    "input_ids": torch.zeros(3, 14, dtype=torch.int64),
    "mlm_labels": torch.zeros(3, 2, dtype=torch.int64),
    "decoder_input_ids": torch.zeros(3, 6, dtype=torch.int64),
}


def test_operations_of_a_batch_are_those_that_pytorch_counts(tiny_model: Plug) -> None:
    """`FlopCounterMode` counts causal attention as a whole square; so does the difference."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    tiny_model.eval()
    config = tiny_model.config
    ids = torch.randint(5, 90, (3, 14))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        hidden = tiny_model.encode(ids)
        logits = tiny_model.lm_logits(tiny_model.decode(ids[:, :6], hidden)).sum()
        (logits + tiny_model.mlm_logits(hidden[:, :2]).sum()).backward()
    rows, target = 3, 6
    above = target * target - target * (target + 1) // 2  # pairs that the mask leaves out
    left_out = 3 * rows * config.num_decoder_layers * 4 * config.hidden_size * above
    assert counter.get_total_flops() == pytest.approx(
        batch_flops(config, BATCH) + left_out, rel=0.05
    )


def test_a_meter_counts_tokens_and_waiting() -> None:
    meter = Meter(PRESETS["test"], torch.device("cpu"))

    def slowly() -> Iterator[Batch]:
        for _ in range(3):
            time.sleep(0.02)
            yield BATCH

    assert len(list(meter.batches(slowly()))) == 3
    read = meter.read()
    assert [*read] == PROCESS_FIELDS[2:]
    assert 0.5 < read["data_wait"] <= 1
    assert 0 < read["tokens_per_second"] <= 3 * 60 / 0.06
    assert read["mfu"] == read["memory_gb"] == 0  # no card
    time.sleep(0.01)
    assert meter.read()["tokens_per_second"] == 0


def test_the_end_page(settings: Settings, tmp_path: Path) -> None:
    pretrain(1, settings(steps=4), device="cpu")
    page = (tmp_path / "run" / "report" / "report.md").read_text()
    assert "# 预训练第 1 阶段" in page
    assert "| loss_mlm |" in page
    assert "| learning_rate | 0.001 |" in page
    assert "跳过的步" not in page  # there was none
    pictures = {path.name for path in (tmp_path / "run" / "report").glob("*.png")}
    assert {"loss.png", "grad_norm.png", "tokens_per_second.png"} <= pictures
    assert "mfu.png" not in pictures  # nothing to show on a CPU
    assert not (tmp_path / "run" / "processes.csv").exists()


def test_without_tensorboard_one_sentence_and_nothing_written(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("plug.pretraining.watching.find_spec", lambda _: None)
    with pytest.raises(UsageError, match=r"plug-zh\[tensorboard\]"):
        pretrain(1, settings(tensorboard=True), device="cpu")
    assert not (tmp_path / "run").exists()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_files(settings: Settings, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    pretrain(1, settings(steps=4, tensorboard=True), device="cpu")
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("mlm")] == [1, 2, 3, 4]
    assert {"tokens_per_second", "grad_norm", "learning_rate"} <= set(events.Tags()["scalars"])

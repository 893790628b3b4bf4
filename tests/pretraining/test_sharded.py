"""Pre-training of which no process holds the whole model: as one process with all of it."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import random
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from plug.distributed.processes import Processes
from plug.errors import UsageError
from plug.loading.estimate import OVERHEAD_BYTES
from plug.loading.from_checkpoint import convert_checkpoint
from plug.loading.save import save
from plug.model.configuration import PRESETS
from plug.model.plug import Plug
from plug.pretraining import run
from plug.pretraining.memory import need_of
from plug.pretraining.record import read_rows
from plug.pretraining.run import pretrain
from plug.pretraining.settings import RunConfig
from plug.tokenization import PlugTokenizer

Make = Callable[..., RunConfig]
Together = Callable[..., list[Any]]
FSDP = {"sharding": "fsdp"}
TENSOR = {"parallel": {"tensor": 2}}
HAS_TORCHAO = importlib.util.find_spec("torchao") is not None
OPTIMIZERS = ["adamw", "muon", *(["adamw8bit"] if HAS_TORCHAO else [])]
SHAPES = {1: [[32, 1.0]], 2: [[24, 16, 1.0], [16, 16, 1.0]]}


def same_rows(output: Path, expected: Path, *names: str) -> None:
    """Losses, and norms relative to their size, within 1e-5; the same steps and passages."""
    ours, theirs = (read_rows(path / "log.csv") for path in (output, expected))
    assert [row["step"] for row in ours] == [row["step"] for row in theirs]
    for row, other in zip(ours, theirs, strict=True):
        assert row["tokens"] == other["tokens"]
        assert row.keys() - {"memory_gb"} == other.keys() - {"memory_gb"}
        for name in other.keys() & set(names):
            how = {"rel": 1e-5} if name == "grad_norm" else {"abs": 1e-5}
            assert row[name] == pytest.approx(other[name], **how), (row["step"], name)


@pytest.fixture
def beginning(tiny_tokenizer: PlugTokenizer, tmp_path: Path) -> Path:
    """A whole model, to begin stage 2 from: what is drawn anew differs for sharded runs."""
    config = dataclasses.replace(
        PRESETS["test"], vocab_size=384, num_emitted_tokens=tiny_tokenizer.vocab_size
    )
    torch.manual_seed(0)
    save(Plug(config), tmp_path / "beginning", tokenizer=tiny_tokenizer)
    return tmp_path / "beginning"


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_two_and_four_processes_learn_as_one_that_holds_all(
    optimizer: str, beginning: Path, settings: Make, run_together: Together, tmp_path: Path
) -> None:
    """Batches of 6 or 8 rows, also in parts of 1: some processes have fewer rows than parts."""
    made = {"shapes": SHAPES[2], "batch_tokens": 255, "mlm_fraction": 0.6, "optimizer": optimizer}
    made |= {"init_from": str(beginning)}
    pretrain(2, settings(output=str(tmp_path / "one"), **made), device="cpu")
    expected = load_file(tmp_path / "one" / "model" / "model.safetensors")
    for count, tokens in ((2, 65536), (4, 30)):
        output = tmp_path / f"{count}"
        shared = settings(output=str(output), parallel=FSDP, micro_batch_tokens=tokens, **made)
        answers = run_together(count, "pretrain", stage=2, settings=asdict(shared))
        same_rows(output, tmp_path / "one", "lm", "mlm", "grad_norm")
        held = [answer["held"] for answer in answers]
        assert max(held) < 1.2 * sum(held) / count  # each holds its share
        found = load_file(output / "model" / "model.safetensors")
        torch.testing.assert_close(found, expected, rtol=0, atol=3e-4)
        for name in ("config.json", "tokenizer.json", "generation_config.json"):
            ours, theirs = (tmp_path / x / "model" / name for x in (f"{count}", "one"))
            assert ours.read_bytes() == theirs.read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])  # rows are too short to cut in 8 bits
def test_a_mesh_learns_as_one_process_that_holds_all(
    optimizer: str, beginning: Path, settings: Make, run_together: Together, tmp_path: Path
) -> None:
    """Data x tensor: 1 x 2 and 2 x 2, the batch whole and in parts; each value is held once."""
    made = {"shapes": SHAPES[2], "batch_tokens": 255, "mlm_fraction": 0.6, "optimizer": optimizer}
    made |= {"init_from": str(beginning), "clip_grad_norm": 0.5}
    pretrain(2, settings(output=str(tmp_path / "one"), **made), device="cpu")
    expected = load_file(tmp_path / "one" / "model" / "model.safetensors")
    for count, tokens in ((2, 65536), (4, 60)):
        output = tmp_path / f"{count}"
        shared = settings(
            output=str(output), parallel={"tensor": 2}, micro_batch_tokens=tokens, **made
        )
        answers = run_together(count, "pretrain", stage=2, settings=asdict(shared))
        same_rows(output, tmp_path / "one", "lm", "mlm", "grad_norm")
        held = [answer["held"] for answer in answers]
        assert max(held) < 1.2 / count * sum(x.nbytes for x in expected.values())
        found = load_file(output / "model" / "model.safetensors")
        torch.testing.assert_close(found, expected, rtol=0, atol=3e-4)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", [name for name in OPTIMIZERS if name != "muon"])  # see below
def test_runs_that_die_in_a_save_go_on_with_other_processes(
    optimizer: str, settings: Make, run_together: Together, tmp_path: Path
) -> None:
    """2, then 1, then 2 processes: no passage is lost or repeated; the last two are kept.

    Muon, and 4 processes, die five times in `test_five_kills_in_a_row_change_nothing`.
    """
    made = {"optimizer": optimizer, "steps": 10, "checkpoint_every": 2, "parallel": FSDP}
    whole = settings(output=str(tmp_path / "whole"), **made)
    run_together(2, "pretrain", stage=1, settings=asdict(whole))
    kept = sorted(path.name for path in (tmp_path / "whole" / "checkpoints").iterdir())
    assert kept == ["step-6", "step-8"]
    for name in kept:
        convert_checkpoint(tmp_path / "whole" / "checkpoints" / name, tmp_path / name)
        assert {path.name for path in (tmp_path / name).iterdir()} == {
            path.name for path in (tmp_path / "whole" / "model").iterdir()
        }
    states = [load_file(tmp_path / name / "model.safetensors") for name in kept]
    apart = [(states[0][name] - states[1][name]).abs().max() for name in states[0]]
    assert 0 < max(apart) < 2 * 3 * 1e-3  # two steps at this rate

    broken = asdict(settings(output=str(tmp_path / "broken"), **made))
    checkpoints = tmp_path / "broken" / "checkpoints"
    run_together(2, "pretrain", dies=True, stage=1, settings=broken, die_at=2)
    assert [path.name for path in checkpoints.glob("step-*")] == ["step-2"]
    run_together(1, "pretrain", dies=True, stage=1, settings=broken, resume=True, die_at=3)
    assert {path.name for path in checkpoints.glob("step-*")} == {"step-4", "step-6"}
    with pytest.raises(UsageError, match=r"parallel.sharding=fsdp 训练的，现在是 none"):
        pretrain(1, settings(output=str(tmp_path / "broken"), **made | {"parallel": {}}),
                 resume=True, device="cpu")  # fmt: skip
    run_together(2, "pretrain", stage=1, settings=broken, resume=True)
    same_rows(tmp_path / "broken", tmp_path / "whole", "mlm", "word", "sentence", "grad_norm")
    assert not [path for path in checkpoints.iterdir() if not path.name.startswith("step-")]


@pytest.mark.slow
def test_a_checkpoint_goes_on_with_another_mesh(
    settings: Make, run_together: Together, tmp_path: Path
) -> None:
    """2 x 2, then 1, then 2 that share data, then 2 that share layers; no passage is lost."""
    made = {"steps": 10, "optimizer": "muon"}
    whole = settings(output=str(tmp_path / "whole"), parallel=FSDP, **made)
    run_together(1, "pretrain", stage=1, settings=asdict(whole))
    made["checkpoint_every"] = 2
    output = str(tmp_path / "broken")
    meshes = [(4, {"tensor": 2}), (1, FSDP), (2, FSDP), (2, {"tensor": 2})]
    for number, (count, parallel) in enumerate(meshes):
        made_so = asdict(settings(output=output, parallel=parallel, **made))
        last = number == len(meshes) - 1
        # The first save of each process group goes on being written when the second one ends it.
        options = {} if last else {"dies": True, "die_at": 2}
        run_together(count, "pretrain", stage=1, settings=made_so, resume=number > 0, **options)
    same_rows(Path(output), tmp_path / "whole", "mlm", "word", "sentence", "grad_norm")
    found, expected = (
        load_file(tmp_path / name / "model" / "model.safetensors") for name in ("broken", "whole")
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=3e-4)


@pytest.mark.slow
def test_five_kills_in_a_row_change_nothing(
    settings: Make, run_together: Together, tmp_path: Path
) -> None:
    """4 -> 2 -> 4 processes and meshes; `kill -9` of one in a step, of all while one writes.

    Those that are left end by themselves, soon. No passage is lost or repeated.
    """
    rng = random.Random(0)
    made = {"steps": 12, "optimizer": "muon", "batch_tokens": 512, "parallel": FSDP}
    whole = settings(output=str(tmp_path / "whole"), **made)
    run_together(1, "pretrain", stage=1, settings=asdict(whole))
    ends: list[tuple[int, Any, dict[str, Any]]] = [
        (4, FSDP, {"die_at": 3}),
        (2, FSDP, {"kill": {"rank": 1, "step": 4, "seconds": rng.uniform(0, 0.2)}}),
        (4, {"tensor": 2}, {"kill": {"rank": 2, "step": 6, "seconds": rng.uniform(0, 0.2)}}),
        (2, {"tensor": 2}, {"die_at": 2}),
        (4, FSDP, {"kill": {"rank": 0, "step": 9, "seconds": rng.uniform(0, 0.2)}}),
        (4, FSDP, {}),
    ]
    output = tmp_path / "broken"
    for number, (count, parallel, end) in enumerate(ends):
        changed = {"output": str(output), "parallel": parallel, "checkpoint_every": 1}
        asked = asdict(settings(**(made | changed)))
        began = time.monotonic()
        run_together(count, "pretrain", dies=bool(end), stage=1, settings=asked,
                     resume=number > 0, **end)  # fmt: skip
        assert time.monotonic() - began < 180  # else they waited for the one that is gone
    same_rows(output, tmp_path / "whole", "mlm", "word", "sentence", "grad_norm")
    left = {path.name for path in (output / "checkpoints").iterdir()}
    assert left == {"step-10", "step-11"}


@pytest.mark.slow
def test_a_full_disk_in_a_checkpoint_is_a_sentence_and_loses_nothing(
    settings: Make, run_together: Together, tmp_path: Path
) -> None:
    made = {"parallel": FSDP}
    whole = settings(output=str(tmp_path / "whole"), **made)
    run_together(1, "pretrain", stage=1, settings=asdict(whole))
    broken = asdict(settings(output=str(tmp_path / "broken"), checkpoint_every=2, **made))
    told = run_together(2, "failing", stage=1, settings=broken, full_at=2)
    assert any("没能写入" in each and "请检查磁盘空间" in each for each in told), told
    checkpoints = tmp_path / "broken" / "checkpoints"
    assert [path.name for path in checkpoints.glob("step-*")] == ["step-2"]
    run_together(2, "pretrain", stage=1, settings=broken, resume=True)
    same_rows(tmp_path / "broken", tmp_path / "whole", "mlm", "word", "sentence", "grad_norm")


@pytest.mark.slow
def test_compiled_layers_are_sharded(
    settings: Make, run_together: Together, tmp_path: Path
) -> None:
    """A layer of each kind, since each is compiled in each process."""
    made = {"shapes": SHAPES[2][:1], "steps": 2}
    made |= {"model": {"num_hidden_layers": 1, "num_decoder_layers": 1}}
    for name, changes in (("plain", {}), ("compiled", {"compile": True})):
        asked = settings(output=str(tmp_path / name), parallel=FSDP, **made, **changes)
        run_together(2, "pretrain", stage=2, settings=asdict(asked))
    same_rows(tmp_path / "compiled", tmp_path / "plain", "lm", "mlm", "grad_norm")


@pytest.mark.slow
@pytest.mark.parametrize("parallel", [FSDP, {"tensor": 2}])
def test_a_broken_batch_of_one_process_is_passed_over_by_both(
    parallel: dict[str, Any], settings: Make, run_together: Together, tmp_path: Path
) -> None:
    """The same weights as where that step is passed over by its number."""
    made = {"parallel": parallel, "optimizer": "muon"}
    by_norm = settings(output=str(tmp_path / "norm"), skip_spikes=20.0, **made)
    run_together(2, "pretrain", stage=1, settings=asdict(by_norm), spoil=[1, 5])
    by_number = settings(output=str(tmp_path / "number"), skip_steps=[6], **made)
    run_together(2, "pretrain", stage=1, settings=asdict(by_number))
    ours, theirs = (load_file(tmp_path / n / "model/model.safetensors") for n in ("norm", "number"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    for name in ("norm", "number"):
        report = tmp_path / name / "report"
        assert "| 6 |" in (report / "report.md").read_text()
        assert all(map(math.isfinite, json.loads((report / "metrics.json").read_text()).values()))


def test_a_damaged_checkpoint_is_a_sentence(
    settings: Make, run_together: Together, tmp_path: Path
) -> None:
    made = asdict(settings(output=str(tmp_path / "run"), checkpoint_every=2, parallel=FSDP))
    run_together(2, "pretrain", stage=1, settings=made, dies=True, die_at=2)
    for file in (tmp_path / "run" / "checkpoints" / "step-2").glob("*.distcp"):
        file.write_bytes(file.read_bytes()[:99])
    told = run_together(2, "failing", stage=1, settings=made, resume=True)
    assert all("step-2 已损坏" in each for each in told)


def test_sharding_needs_a_launcher(
    settings: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = settings(parallel=FSDP)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pytest.raises(UsageError, match=r"torchrun --nproc-per-node"):
        pretrain(1, asked, device="cpu")
    with pytest.raises(UsageError, match=r"torchrun --nproc-per-node"):
        pretrain(1, settings(parallel={"tensor": 2}), device="cpu")
    assert not (tmp_path / "run").exists()
    for parallel, message in (({"sharding": "all"}, "sharding='all'"), (3, r"\[parallel\]")):
        with pytest.raises(UsageError, match=message):
            settings(parallel=parallel)
    with pytest.raises(UsageError, match="DeepSpeed"):
        settings(parallel={"deepspeed": "zero3.json"})
    with pytest.raises(UsageError, match="compile"):
        settings(parallel={"tensor": 2}, compile=True)
    for more in ({"sharding": "none"}, {"deepspeed": "zero3.json"}):
        with pytest.raises(UsageError, match=r"parallel.tensor=2"):
            settings(parallel={"tensor": 2, **more})


def test_auto_shards_what_does_not_fit_a_card(
    settings: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    made, model = settings(recomputation=2), PRESETS["test"]
    pair = Processes(0, 2, torch.device("cpu"))
    need = need_of(model, made, 1, 2, 1, 2) + OVERHEAD_BYTES
    monkeypatch.setattr(run, "Vote", lambda _: lambda number: number)
    for room, picked in ((need, "none"), (need - 1, "fsdp")):
        monkeypatch.setattr(run, "free_memory", lambda _, room=room: room)
        assert run.is_to_be_sharded(1, made, model, None, pair) == (picked == "fsdp")
        assert f"用 {picked}，" in capsys.readouterr().err
    assert not run.is_to_be_sharded(1, made, model, None, Processes(0, 1, torch.device("cpu")))
    # A resumed run goes on as it began.
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "training_state.pt").touch()
    assert not run.is_to_be_sharded(1, made, model, tmp_path, pair)
    (tmp_path / "checkpoints" / "step-2").mkdir(parents=True)
    (tmp_path / "checkpoints" / "step-2" / ".metadata").touch()
    monkeypatch.setattr(run, "free_memory", lambda _: need)
    assert run.is_to_be_sharded(1, made, model, tmp_path, pair)


@pytest.mark.parametrize(
    ("count", "changes", "message"),
    [
        (2, {"parallel": {"tensor": 3}}, "parallel.tensor=3 不能整除进程数 2"),
        (2, {**TENSOR, "model": {"num_attention_heads": 1}}, "num_attention_heads=1"),
        (2, {**TENSOR, "model": {"intermediate_size": 63}}, "intermediate_size=63"),
        (4, {**TENSOR, "batch_tokens": 32}, "每个进程（共 2 个）"),
    ],
)
def test_a_mesh_that_does_not_fit_is_a_sentence(
    count: int, changes: dict[str, Any], message: str, settings: Make, run_together: Together
) -> None:
    told = run_together(count, "failing", stage=1, settings=asdict(settings(**changes)))
    assert all(message in each for each in told)

"""Training checkpoints as model directories: every tensor, and what is refused."""

from __future__ import annotations

import dataclasses
import pickle
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file

from plug.errors import PlugError, UsageError
from plug.files import write_json
from plug.loading.from_checkpoint import convert_checkpoint, find_checkpoint
from plug.loading.load import load
from plug.loading.save import save
from plug.model.plug import Plug
from plug.tokenization import PlugTokenizer


def write_step(directory: Path, model: Plug, tokenizer: PlugTokenizer) -> Path:
    """A sharded checkpoint of pre-training, as one process writes it by torch's own `save`."""
    save(model, directory, tokenizer=tokenizer)
    (directory / "model.safetensors").unlink()
    write_json(directory / "state.json", {"step": 3})
    tensors = {f"model.{name}": x for name, x in model.state_dict().items()}
    states = {"optimizer/state.encoder.step": torch.tensor(3.0), "optimizer/lr": 0.1}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is alone
        dcp.save(tensors | states, checkpoint_id=directory)
    return directory


@pytest.fixture
def step(tiny_model: Plug, tiny_tokenizer: PlugTokenizer, tmp_path: Path) -> Path:
    return write_step(tmp_path / "run" / "checkpoints" / "step-3", tiny_model, tiny_tokenizer)


@pytest.mark.parametrize("given", ["run", "run/checkpoints", "run/checkpoints/step-3"])
def test_a_sharded_checkpoint_becomes_the_model(
    given: str, step: Path, tiny_model: Plug, tiny_tokenizer: PlugTokenizer, tmp_path: Path
) -> None:
    other = Plug(tiny_model.config)
    write_step(step.with_name("step-2"), other, tiny_tokenizer)
    told: list[tuple[int, int]] = []
    [note] = convert_checkpoint(
        tmp_path / given, tmp_path / "to", progress=lambda done, total: told.append((done, total))
    )
    assert str(step) in note  # the newest
    found = load_file(tmp_path / "to" / "model.safetensors")
    expected = tiny_model.state_dict()
    assert found.keys() == expected.keys()
    assert all(found[name].equal(expected[name]) for name in expected)
    assert told[-1][0] == told[-1][1] == sum(x.nbytes for x in expected.values())
    save(tiny_model, tmp_path / "saved", tokenizer=tiny_tokenizer)
    assert {x.name for x in (tmp_path / "to").iterdir()} == {
        x.name for x in (tmp_path / "saved").iterdir()
    }
    for path in (tmp_path / "saved").glob("*.json"):
        assert (tmp_path / "to" / path.name).read_bytes() == path.read_bytes()


def test_a_checkpoint_of_one_process_becomes_the_model_in_another_dtype(
    model_directory: Path, tiny_model: Plug, tmp_path: Path
) -> None:
    checkpoint = tmp_path / "run" / "checkpoint"
    shutil.copytree(model_directory, checkpoint)
    (checkpoint / "training_state.pt").touch()
    convert_checkpoint(tmp_path / "run", tmp_path / "to", dtype=torch.bfloat16)
    found = load(tmp_path / "to", dtype=None).state_dict()
    assert all(
        found[name].equal(x.to(torch.bfloat16)) for name, x in tiny_model.state_dict().items()
    )
    assert not (tmp_path / "to" / "training_state.pt").exists()


def refused(source: Path, target: Path) -> str:
    with pytest.raises(PlugError) as refusal:
        convert_checkpoint(source, target)
    assert not target.exists() or any(target.iterdir())
    assert "\n" not in str(refusal.value)
    return str(refusal.value)


def test_what_is_no_checkpoint_is_refused(
    step: Path, model_directory: Path, tmp_path: Path
) -> None:
    to = tmp_path / "to"
    assert "没有这个目录" in refused(tmp_path / "none", to)
    assert "不是训练的检查点" in refused(model_directory, to)
    write_json(tmp_path / "new" / "settings.json", {})
    assert "没有写完的检查点" in refused(tmp_path / "new", to)
    assert "已经存在" in refused(step, model_directory)
    (step / "config.json").unlink()
    assert "更早的版本" in refused(step, to)
    (step / ".metadata").unlink()
    assert "没有写完" in refused(step, to)
    hidden = step.rename(step.with_name(".step-3.partial-abcd"))
    assert "没有写完" in refused(hidden, to)
    adapter = tmp_path / "tuned" / "checkpoints" / "checkpoint-4"
    write_json(adapter / "trainer_state.json", {})
    write_json(adapter / "adapter_config.json", {})
    assert "只有适配器" in refused(tmp_path / "tuned", to)


def test_another_shape_and_damage_are_refused(
    step: Path, tiny_model: Plug, tiny_tokenizer: PlugTokenizer, tmp_path: Path
) -> None:
    to = tmp_path / "to"
    larger = Plug(dataclasses.replace(tiny_model.config, intermediate_size=48))
    save(larger, tmp_path / "larger", tokenizer=tiny_tokenizer)
    kept = (step / "config.json").read_bytes()
    shutil.copy(tmp_path / "larger" / "config.json", step)
    assert "形状不对" in refused(step, to)
    (step / "config.json").write_bytes(kept)
    [file] = step.glob("*.distcp")
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2])
    assert "已损坏" in refused(step, to)
    file.unlink()
    assert "已损坏" in refused(step, to)


def test_what_a_metadata_file_names_is_not_run(
    step: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    class Malicious:
        def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
            return print, ("run!",)

    (step / ".metadata").write_bytes(pickle.dumps(Malicious()))
    assert "names builtins.print" in refused(step, tmp_path / "to")
    assert "run!" not in capfd.readouterr().out


def test_values_that_are_no_numbers_are_refused(
    tiny_model: Plug, tiny_tokenizer: PlugTokenizer, tmp_path: Path
) -> None:
    tiny_model.encoder.final_norm.bias.data[0] = torch.inf
    step = write_step(tmp_path / "step-1", tiny_model, tiny_tokenizer)
    assert "encoder.final_norm.bias" in refused(step, tmp_path / "to")


def test_the_newest_whole_checkpoint_counts(step: Path) -> None:
    (step.with_name("step-10")).mkdir()
    (step.with_name(".step-11.partial-ab")).mkdir()
    assert find_checkpoint(step.parent.parent) == step
    with pytest.raises(UsageError):
        find_checkpoint(step.with_name("step-10"))

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import safetensors.torch
import torch

from plug.errors import PlugError, UsageError
from plug.loading.load import load
from plug.loading.save import save
from plug.model.plug import Plug

Contents = Callable[[Path], dict[str, bytes]]
FullDisk = Callable[[int], AbstractContextManager[None]]
SameBits = Callable[[Plug, Plug], None]
SHARD_BYTES = 20_000  # some tensors are larger, most are smaller


def test_the_safetensors_library_reads_one_file_as_it_was_saved(
    tiny_model: Plug, saved: Path
) -> None:
    found = safetensors.torch.load_file(saved / "model.safetensors")

    assert found.keys() == tiny_model.state_dict().keys()
    assert all(torch.equal(found[name], x) for name, x in tiny_model.state_dict().items())


def test_numbered_files_and_their_index_agree(tiny_model: Plug, tmp_path: Path) -> None:
    save(tiny_model, tmp_path / "model", tokenizer=None, max_shard_bytes=SHARD_BYTES)

    index = json.loads((tmp_path / "model/model.safetensors.index.json").read_text())
    names = sorted({*index["weight_map"].values()})
    assert names == [
        f"model-{n:05d}-of-{len(names):05d}.safetensors" for n in range(1, len(names) + 1)
    ]
    assert sorted(x.name for x in (tmp_path / "model").glob("*.safetensors")) == names
    found = {}
    for name in names:
        tensors = safetensors.torch.load_file(tmp_path / "model" / name)
        size = sum(tensor.nbytes for tensor in tensors.values())
        assert size <= SHARD_BYTES or len(tensors) == 1
        assert all(index["weight_map"][tensor] == name for tensor in tensors)
        found |= tensors
    assert all(torch.equal(found[name], x) for name, x in tiny_model.state_dict().items())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in found.values())


def test_mixed_precision_is_kept(tiny_model: Plug, tmp_path: Path) -> None:
    for name, parameter in tiny_model.named_parameters():
        if "norm" not in name:
            parameter.data = parameter.data.half()
    save(tiny_model, tmp_path / "model", tokenizer=None)

    found = safetensors.torch.load_file(tmp_path / "model/model.safetensors")

    assert {found[name].dtype for name in found} == {torch.float16, torch.float32}
    assert all(torch.equal(found[name], x) for name, x in tiny_model.state_dict().items())


def test_transformers_reads_ids_and_no_sampling(tiny_model: Plug, saved: Path) -> None:
    generation = pytest.importorskip("transformers").GenerationConfig.from_pretrained(saved)

    assert not generation.do_sample
    assert not generation.max_new_tokens
    assert not generation.repetition_penalty
    assert generation.decoder_start_token_id == tiny_model.config.decoder_start_token_id
    assert generation.eos_token_id == tiny_model.config.eos_token_id
    assert generation.pad_token_id == tiny_model.config.pad_token_id


@pytest.mark.parametrize("max_shard_bytes", [SHARD_BYTES, 10**9])
def test_a_full_disk_leaves_the_old_model(
    tiny_model: Plug,
    saved: Path,
    contents: Contents,
    full_disk: FullDisk,
    max_shard_bytes: int,
    assert_same_bits: SameBits,
) -> None:
    before = contents(saved.parent)
    other = Plug(tiny_model.config)

    with full_disk(30_000), pytest.raises(PlugError, match=r"没有改动.*磁盘空间"):
        save(other, saved, tokenizer=None, max_shard_bytes=max_shard_bytes)

    assert contents(saved.parent) == before
    assert_same_bits(load(saved), tiny_model)


def test_only_a_model_or_an_empty_directory_is_replaced(
    tiny_model: Plug, tmp_path: Path, assert_same_bits: SameBits
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/cat.jpg").touch()
    (tmp_path / "file").touch()

    save(tiny_model, tmp_path / "empty", tokenizer=None)
    for name in ("photos", "file"):
        with pytest.raises(UsageError, match=name):
            save(tiny_model, tmp_path / name, tokenizer=None)

    assert_same_bits(load(tmp_path / "empty"), tiny_model)
    assert (tmp_path / "photos/cat.jpg").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file", "photos"]

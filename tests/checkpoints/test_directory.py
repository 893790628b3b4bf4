from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import safetensors.torch
import torch

from plug.checkpoints.directory import find_model_directory, generation_defaults
from plug.errors import PlugError, UsageError
from plug.generation.settings import GenerationSettings
from plug.loading.load import load
from plug.loading.save import save
from plug.model.configuration import PlugConfig
from plug.model.plug import Plug

Contents = Callable[[Path], dict[str, bytes]]
FullDisk = Callable[[int], AbstractContextManager[None]]
SHARD_BYTES = 20_000  # some tensors are larger, most are smaller


@pytest.fixture
def saved(tiny_model: Plug, tmp_path: Path) -> Path:
    directory = tmp_path / "saved"
    save(tiny_model, directory, tokenizer=None)
    return directory


def assert_same_bits(actual: Plug, expected: Plug) -> None:
    wanted = expected.state_dict()
    found = actual.state_dict()
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("max_shard_bytes", [SHARD_BYTES, 10**9])
def test_loading_what_was_saved_gives_the_same_bits(
    tiny_model: Plug, tmp_path: Path, max_shard_bytes: int
) -> None:
    save(tiny_model, tmp_path / "new" / "model", tokenizer=None, max_shard_bytes=max_shard_bytes)

    loaded = load(tmp_path / "new" / "model")

    assert_same_bits(loaded, tiny_model)
    assert loaded.config == tiny_model.config
    assert not loaded.training
    assert all(parameter.requires_grad for parameter in loaded.parameters())


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


def test_an_encoder_alone_is_saved_and_loaded(
    config: PlugConfig, make_model: Callable[[PlugConfig], Plug], tmp_path: Path
) -> None:
    encoder = make_model(dataclasses.replace(config, num_decoder_layers=0))
    save(encoder, tmp_path / "stage1", tokenizer=None)

    loaded = load(tmp_path / "stage1")

    assert loaded.decoder is None
    assert_same_bits(loaded, encoder)
    assert not (tmp_path / "stage1/generation_config.json").exists()


def test_on_the_cpu_weights_become_float32_unless_asked_otherwise(
    tiny_model: Plug, tmp_path: Path
) -> None:
    save(tiny_model, tmp_path / "model", tokenizer=None, dtype=torch.bfloat16)
    rounded = {name: x.bfloat16() for name, x in tiny_model.state_dict().items()}

    assert json.loads((tmp_path / "model/config.json").read_text())["dtype"] == "bfloat16"
    for dtype, expected in ((None, torch.float32), (torch.bfloat16, torch.bfloat16)):
        for name, tensor in load(tmp_path / "model", dtype=dtype).state_dict().items():
            assert tensor.dtype == expected
            assert torch.equal(tensor, rounded[name].to(expected))


def test_mixed_precision_is_kept(tiny_model: Plug, tmp_path: Path) -> None:
    for name, parameter in tiny_model.named_parameters():
        if "norm" not in name:
            parameter.data = parameter.data.half()
    save(tiny_model, tmp_path / "model", tokenizer=None)

    found = safetensors.torch.load_file(tmp_path / "model/model.safetensors")

    assert {found[name].dtype for name in found} == {torch.float16, torch.float32}
    assert all(torch.equal(found[name], x) for name, x in tiny_model.state_dict().items())


@pytest.mark.gpu
def test_on_a_gpu_weights_keep_their_saved_dtype(tiny_model: Plug, tmp_path: Path) -> None:
    save(tiny_model, tmp_path / "model", tokenizer=None, dtype=torch.bfloat16)

    loaded = load(tmp_path / "model", device="cuda")

    assert_same_bits(loaded.cpu(), tiny_model.bfloat16())


def test_training_a_loaded_model_does_not_write_into_its_file(
    saved: Path, contents: Contents
) -> None:
    before = contents(saved)
    model = load(saved)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)

    assert contents(saved) == before


def test_a_loaded_model_outlives_its_directory(tiny_model: Plug, saved: Path) -> None:
    loaded = load(saved)
    with torch.no_grad():
        other = Plug(tiny_model.config)
    save(other, saved, tokenizer=None)

    assert_same_bits(loaded, tiny_model)
    assert_same_bits(load(saved), other)


def test_transformers_reads_the_sampling_defaults(tiny_model: Plug, saved: Path) -> None:
    generation = pytest.importorskip("transformers").GenerationConfig.from_pretrained(saved)

    assert generation.do_sample is True
    assert (generation.temperature, generation.top_k) == (0.9, 20)
    assert generation.max_new_tokens == 256
    assert generation.decoder_start_token_id == tiny_model.config.decoder_start_token_id
    assert generation.eos_token_id == tiny_model.config.eos_token_id
    assert generation.pad_token_id == tiny_model.config.pad_token_id


def _file(path: Path) -> None:
    path.write_text("not a directory")


def _empty(path: Path) -> None:
    path.mkdir()


def _config(text: str) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        path.mkdir()
        (path / "config.json").write_text(text)

    return write


def _original(path: Path) -> None:
    (path / "model").mkdir(parents=True)
    (path / "model/mp_rank_00_model_states.pt").touch()


def _unrelated(path: Path) -> None:
    path.mkdir()
    (path / "notes.txt").touch()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda _: None, "找不到"),
        (_file, "却是文件"),
        (_empty, "是空的"),
        (_unrelated, "没有 config.json"),
        (_original, "plug convert"),
        (_config('{"model_type": "bert"}'), "model_type='bert'"),
        (_config('{"hiden_size": 8}'), "hiden_size"),
        (_config('{"hidden_size": 8'), "JSON"),
        (_config("[]"), "JSON"),
    ],
)
def test_a_directory_that_is_no_model_is_wrong_use(
    make: Callable[[Path], None], message: str, tmp_path: Path
) -> None:
    make(tmp_path / "model")

    with pytest.raises(UsageError, match=message) as caught:
        load(tmp_path / "model")

    assert "\n" not in str(caught.value)
    assert str(tmp_path / "model") in str(caught.value)


def test_a_directory_may_have_the_shipped_models_name(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved.rename(saved.with_name("plug-mini-zh"))
    monkeypatch.chdir(saved.parent)

    assert find_model_directory("./plug-mini-zh") == Path("plug-mini-zh")


def _rewrite(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    def damage(directory: Path) -> None:
        tensors = safetensors.torch.load_file(directory / "model.safetensors")
        change(tensors)
        safetensors.torch.save_file(tensors, directory / "model.safetensors")

    return damage


def _overwrite(start: int, data: bytes) -> Callable[[Path], None]:
    def damage(directory: Path) -> None:
        content = bytearray((directory / "model.safetensors").read_bytes())
        content[start : start + len(data)] = data
        (directory / "model.safetensors").write_bytes(content)

    return damage


def _truncate(directory: Path) -> None:
    content = (directory / "model.safetensors").read_bytes()
    (directory / "model.safetensors").write_bytes(content[:-1])


def _index(text: str) -> Callable[[Path], None]:
    return lambda directory: _write(directory / "model.safetensors.index.json", text)


def _write(path: Path, text: str) -> None:
    path.write_text(text)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda directory: (directory / "model.safetensors").unlink(), "没有权重文件"),
        (lambda directory: (directory / "model.safetensors").write_bytes(b""), "已损坏"),
        (_overwrite(0, b"\xff" * 8), "已损坏"),  # the header's length
        (_overwrite(8, b"garbage!"), "已损坏"),  # the header
        (_truncate, "已损坏"),
        (_index("{"), "索引"),
        (_index('{"weight_map": []}'), "索引"),
        (_index('{"weight_map": {"a": "b.safetensors"}}'), "缺少权重文件 b.safetensors"),
        (_rewrite(lambda x: x.pop("mlm_head.bias")), "缺少 1 个张量：mlm_head.bias"),
        (_rewrite(lambda x: x.update(more=torch.ones(1))), "多出 1 个张量：more"),
        (
            _rewrite(lambda x: x.update({"mlm_head.bias": torch.ones(3)})),
            r"mlm_head.bias 是 \[3\]，应为 \[320\]",
        ),
        (_rewrite(lambda x: x.update({"mlm_head.bias": torch.ones(320).to(torch.int8)})), "int8"),
        (_rewrite(lambda x: x.update({"mlm_head.bias": torch.ones(320).double()})), "F64"),
    ],
)
def test_damaged_weights_are_one_clear_failure(
    damage: Callable[[Path], object], message: str, saved: Path
) -> None:
    damage(saved)

    with pytest.raises(PlugError, match=message) as caught:
        load(saved)

    assert caught.value.exit_code == 1
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("max_shard_bytes", [SHARD_BYTES, 10**9])
def test_a_full_disk_leaves_the_old_model(
    tiny_model: Plug, saved: Path, contents: Contents, full_disk: FullDisk, max_shard_bytes: int
) -> None:
    before = contents(saved.parent)
    other = Plug(tiny_model.config)

    with full_disk(30_000), pytest.raises(PlugError, match=r"没有改动.*磁盘空间"):
        save(other, saved, tokenizer=None, max_shard_bytes=max_shard_bytes)

    assert contents(saved.parent) == before
    assert_same_bits(load(saved), tiny_model)


def test_only_a_model_or_an_empty_directory_is_replaced(tiny_model: Plug, tmp_path: Path) -> None:
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


def test_files_are_readable_as_any_new_file_is(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    (tmp_path / "folder").mkdir()

    assert saved.stat().st_mode == (tmp_path / "folder").stat().st_mode
    for path in saved.iterdir():
        assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_saved_sampling_defaults_are_those_of_generate(config: PlugConfig) -> None:
    defaults, settings = generation_defaults(config), GenerationSettings()
    assert defaults["temperature"] == settings.temperature
    assert defaults["top_k"] == settings.top_k
    assert defaults["repetition_penalty"] == settings.penalty
    assert defaults["max_new_tokens"] == settings.out_length
    assert defaults["do_sample"] == settings.do_sample

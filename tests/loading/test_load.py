from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch

from plug.errors import PlugError, UsageError
from plug.loading.load import load
from plug.loading.save import save
from plug.model.configuration import PlugConfig
from plug.model.plug import Plug
from plug.quantization.convert import quantize_directory

Contents = Callable[[Path], dict[str, bytes]]
SameBits = Callable[[Plug, Plug], None]
SHARD_BYTES = 20_000  # some tensors are larger, most are smaller


@pytest.mark.parametrize("max_shard_bytes", [SHARD_BYTES, 10**9])
def test_loading_what_was_saved_gives_the_same_bits(
    tiny_model: Plug, tmp_path: Path, max_shard_bytes: int, assert_same_bits: SameBits
) -> None:
    save(tiny_model, tmp_path / "new" / "model", tokenizer=None, max_shard_bytes=max_shard_bytes)

    loaded = load(tmp_path / "new" / "model")

    assert_same_bits(loaded, tiny_model)
    assert loaded.config == tiny_model.config
    assert not loaded.training
    assert all(parameter.requires_grad for parameter in loaded.parameters())


def test_an_encoder_alone_is_saved_and_loaded(
    config: PlugConfig,
    make_model: Callable[[PlugConfig], Plug],
    tmp_path: Path,
    assert_same_bits: SameBits,
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


@pytest.mark.gpu
def test_on_a_gpu_weights_keep_their_saved_dtype(
    tiny_model: Plug, tmp_path: Path, assert_same_bits: SameBits
) -> None:
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


def test_a_loaded_model_outlives_its_directory(
    tiny_model: Plug, saved: Path, assert_same_bits: SameBits
) -> None:
    loaded = load(saved)
    with torch.no_grad():
        other = Plug(tiny_model.config)
    save(other, saved, tokenizer=None)

    assert_same_bits(loaded, tiny_model)
    assert_same_bits(load(saved), other)


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
        (_index("{"), "index.json 不是有效的 JSON"),
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


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_that_are_no_numbers_are_refused_by_name(
    value: float, dtype: torch.dtype, tiny_model: Plug, tmp_path: Path
) -> None:
    with torch.no_grad():
        tiny_model.get_parameter("encoder.layers.1.feed_forward.fc1.weight")[-1, -1] = value
    save(tiny_model, tmp_path / "model", tokenizer=None, dtype=dtype)

    for options in ({}, {"dtype": torch.bfloat16}, {"device_map": {"encoder.layers.2": "cpu"}}):
        with pytest.raises(PlugError, match=r"NaN 或无穷大：encoder\.layers\.1\.feed_forward\.fc1"):
            load(tmp_path / "model", **options)


@torch.inference_mode()
def test_a_streamed_layer_is_checked_when_it_arrives(tiny_model: Plug, tmp_path: Path) -> None:
    with torch.no_grad():
        tiny_model.get_parameter("encoder.layers.1.attention.q_proj.bias")[0] = float("nan")
    save(tiny_model, tmp_path / "model", tokenizer=None)
    model = load(tmp_path / "model", device_map={"encoder.layers.1": "cpu"})

    with pytest.raises(PlugError, match=r"encoder\.layers\.1\.attention\.q_proj\.bias"):
        model.encode(torch.tensor([[2, 9, 3]]))


@pytest.mark.parametrize(("bits", "part"), [(8, "scale"), (4, "scale"), (4, "center")])
def test_a_scale_that_is_no_number_is_refused(
    bits: int, part: str, config: PlugConfig, tmp_path: Path
) -> None:
    wide = dataclasses.replace(config, hidden_size=128, intermediate_size=128)
    save(Plug(wide), tmp_path / "model", tokenizer=None)
    quantize_directory(tmp_path / "model", tmp_path / "quantized", bits=bits)
    name = f"decoder.layers.0.feed_forward.fc2.{part}"
    tensors = safetensors.torch.load_file(tmp_path / "quantized" / "model.safetensors")
    tensors[name].view(-1)[-1] = float("nan")
    safetensors.torch.save_file(tensors, tmp_path / "quantized" / "model.safetensors")

    with pytest.raises(PlugError, match=name):
        load(tmp_path / "quantized")


def test_values_beyond_float16_are_refused_not_made_infinite(
    tiny_model: Plug, tmp_path: Path
) -> None:
    with torch.no_grad():
        tiny_model.mlm_head.bias[3] = 1e5
    save(tiny_model, tmp_path / "model", tokenizer=None)

    load(tmp_path / "model", dtype=torch.bfloat16)
    with pytest.raises(PlugError, match=r"mlm_head\.bias.*dtype"):
        load(tmp_path / "model", dtype=torch.float16)


@pytest.mark.gpu
def test_on_a_gpu_values_that_are_no_numbers_are_refused(tiny_model: Plug, tmp_path: Path) -> None:
    with torch.no_grad():
        tiny_model.mlm_head.bias[3] = float("nan")
    save(tiny_model, tmp_path / "model", tokenizer=None, dtype=torch.bfloat16)

    with pytest.raises(PlugError, match=r"mlm_head\.bias"):
        load(tmp_path / "model", device="cuda")

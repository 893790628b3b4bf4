from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from plug.checkpoints.original import export_original, import_original
from plug.errors import PlugError, UsageError
from plug.generation.generator import generate
from plug.loading.load import load
from plug.loading.save import save
from plug.model.configuration import PRESETS, PlugConfig
from plug.model.plug import Plug
from plug.quantization.convert import quantize_directory
from plug.quantization.linear import QuantizedLinear
from plug.quantization.scheme import Scheme
from plug.tokenization import PlugTokenizer

WIDE = dataclasses.replace(PRESETS["test"], hidden_size=128, intermediate_size=256)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


BOTH = pytest.mark.parametrize("bits", [8, 4])


@pytest.fixture
def wide_model(make_model: Callable[[PlugConfig], Plug]) -> Plug:
    return make_model(WIDE)


@pytest.fixture
def wide_directory(wide_model: Plug, tiny_tokenizer: PlugTokenizer, tmp_path: Path) -> Path:
    save(wide_model, tmp_path / "wide", tokenizer=tiny_tokenizer)
    return tmp_path / "wide"


def restored(weight: torch.Tensor, bits: int) -> torch.Tensor:
    scheme = Scheme.of(bits)
    return scheme.dequantize(scheme.quantize(weight), torch.float32)


# --- numbers --------------------------------------------------------------------------------------


def test_8_bits_are_half_a_step_of_each_output_channel_off_at_most() -> None:
    weight = torch.randn(5, 256) * torch.tensor([1e-6, 1e-2, 1.0, 30.0, 0.0])[:, None]

    steps = weight.abs().amax(1, keepdim=True) / 127
    assert ((restored(weight, 8) - weight).abs() <= steps * 0.501).all()


def test_4_bits_put_a_group_where_its_weights_are() -> None:
    weight = torch.randn(3, 256)
    weight[:, 128:] += 5  # far from zero: a symmetric grid would waste half of its levels

    error = (restored(weight, 4) - weight).abs()
    assert error[:, :128].max() < 0.5
    assert error[:, 128:].max() < 0.5
    # A uniform grid of 15 steps over about 5.2 standard deviations errs by step / sqrt(12).
    assert error.square().mean().sqrt() < 5.2 / 15 / 12**0.5 * 1.1


def test_4_bits_hold_what_has_16_levels_as_it_is() -> None:
    weight = (torch.randint(0, 16, (4, 256)) - 8) * 0.25
    weight[:, ::128], weight[:, 1::128] = -2.0, 1.75  # every group has the whole range

    assert torch.equal(restored(weight, 4), weight)


@BOTH
def test_constant_and_zero_weights_survive(bits: int) -> None:
    weight = torch.zeros(2, 128)
    weight[1] = 0.5

    torch.testing.assert_close(restored(weight, bits), weight, rtol=0.005, atol=0)


@BOTH
def test_a_weight_taken_in_parts_is_quantized_as_whole(
    bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheme, weight = Scheme.of(bits), torch.randn(7, 256)
    whole = scheme.quantize(weight)
    monkeypatch.setattr("plug.quantization.scheme._ELEMENTS_AT_ONCE", 3 * 256)

    parts = scheme.quantize(weight)

    assert all(torch.equal(parts[name], whole[name]) for name in whole)


@BOTH
@pytest.mark.parametrize("rows", [1, 3, 40])
def test_a_quantized_layer_is_the_linear_layer_of_its_restored_weight(bits: int, rows: int) -> None:
    scheme, weight, bias = Scheme.of(bits), torch.randn(64, 256), torch.randn(64)
    layer = QuantizedLinear(256, 64, scheme)
    layer.load_state_dict({**scheme.quantize(weight), "bias": bias})
    x = torch.randn(rows, 256)

    expected = torch.nn.functional.linear(x, restored(weight, bits), bias)
    # Inputs are rounded to 8 bits: a hundredth of a typical sum of 256 products, seldom three.
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=0.03 * 16)
    by_halves = layer.bfloat16()(x.bfloat16()).float()
    torch.testing.assert_close(by_halves, expected, rtol=0, atol=0.05 * 16)


@BOTH
def test_the_product_of_a_source_is_near(bits: int) -> None:
    scheme, weight, bias = Scheme.of(bits), torch.randn(64, 256), torch.randn(64)
    layer = QuantizedLinear(256, 64, scheme)
    layer.load_state_dict({**scheme.quantize(weight), "bias": bias})
    x = torch.randn(1, 40, 256)

    assert (layer.source_product()(x) - layer(x)).std() < 0.015 * 16


@BOTH
def test_the_product_of_a_step_is_near_and_a_row_does_not_depend_on_the_others(bits: int) -> None:
    scheme, weight, bias = Scheme.of(bits), torch.randn(64, 256), torch.randn(64)
    layer = QuantizedLinear(256, 64, scheme)
    layer.load_state_dict({**scheme.quantize(weight), "bias": bias})
    x = torch.randn(11, 1, 256) * torch.logspace(-1, 3, 11)[:, None, None]
    multiply = layer.step_product()

    together = multiply(x)

    assert together.shape == (11, 1, 64)
    for row, result in zip(x, together, strict=True):
        assert torch.equal(multiply(row[None])[0], result)
        expected = layer(row)
        # 8 bits over a row's range, or bfloat16: a hundredth of a typical sum of 256 products.
        assert (result - expected).std() < 0.01 * 16 * row.std()


# --- directories ----------------------------------------------------------------------------------


@BOTH
@torch.inference_mode()
def test_a_quantized_directory_loads_as_the_model_of_its_restored_weights(
    bits: int, wide_directory: Path, wide_model: Plug, tmp_path: Path
) -> None:
    quantize_directory(wide_directory, tmp_path / "small", bits=bits)
    model = load(tmp_path / "small")

    for name, module in wide_model.named_modules():
        if isinstance(module, torch.nn.Linear) and ".layers." in name:
            module.weight.data = restored(module.weight, bits)
    ids, written = torch.tensor([[2, 9, 8, 7, 3]]), torch.tensor([[2, 30, 31]])
    expected = wide_model.lm_logits(wide_model.decode(written, wide_model.encode(ids)))
    actual = model.lm_logits(model.decode(written, model.encode(ids)))
    # Inputs rounded to 8 bits in five layers; the logits are about 2 in size.
    assert (actual - expected).std() < 0.05 * expected.std()
    assert isinstance(model.encoder.layers[0].feed_forward.fc1, QuantizedLinear)
    assert type(model.mlm_head.dense) is torch.nn.Linear


@BOTH
def test_a_quantized_model_is_smaller_and_writes(
    bits: int, wide_directory: Path, tmp_path: Path
) -> None:
    quantize_directory(wide_directory, tmp_path / "small", bits=bits)

    config = json.loads((tmp_path / "small" / "config.json").read_text())
    assert config["quantization"] == Scheme.of(bits).to_dict()
    assert config["dtype"] == "float32"
    result = generate("山上", model=tmp_path / "small", out_length=9, seed=1, device="cpu")
    assert len(result.token_ids) == 9
    before, after = (
        (folder / "model.safetensors").stat().st_size
        for folder in (wide_directory, tmp_path / "small")
    )
    assert after < before * (0.42 if bits == 8 else 0.31)  # the word table stays as it is


@BOTH
def test_a_loaded_one_can_be_saved_again(bits: int, wide_directory: Path, tmp_path: Path) -> None:
    quantize_directory(wide_directory, tmp_path / "small", bits=bits)

    save(load(tmp_path / "small"), tmp_path / "again", tokenizer=None)

    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "small" / name).read_bytes()


@BOTH
def test_the_originals_shards_give_what_importing_first_gives(
    bits: int, wide_directory: Path, tmp_path: Path
) -> None:
    export_original(wide_directory, tmp_path / "original", 2)
    import_original(tmp_path / "original", tmp_path / "imported")

    notes = quantize_directory(tmp_path / "original", tmp_path / "straight", bits=bits)
    quantize_directory(tmp_path / "imported", tmp_path / "in-two", bits=bits)

    assert any("encoder_final_norm_passes=2" in note for note in notes)
    names = sorted(path.name for path in (tmp_path / "in-two").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "straight").iterdir())
    for name in names:
        if name != "model.safetensors":
            straight = (tmp_path / "straight" / name).read_bytes()
            assert straight == (tmp_path / "in-two" / name).read_bytes()
    straight, in_two = (
        load_file(tmp_path / folder / "model.safetensors") for folder in ("straight", "in-two")
    )
    assert straight.keys() == in_two.keys()
    assert all(torch.equal(straight[name], in_two[name]) for name in in_two)


# --- bad input ------------------------------------------------------------------------------------


def change_weights(directory: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    weights = load_file(directory / "model.safetensors")
    change(weights)
    save_file(weights, directory / "model.safetensors")


SCALE = "decoder.layers.1.feed_forward.fc2.scale"


@BOTH
def test_a_missing_or_misshapen_scale_is_named(
    bits: int, wide_directory: Path, tmp_path: Path
) -> None:
    quantize_directory(wide_directory, tmp_path / "small", bits=bits)
    change_weights(tmp_path / "small", lambda weights: weights.update({SCALE: torch.ones(3, 1)}))
    with pytest.raises(PlugError, match=rf"{SCALE} 是 \[3, 1\]"):
        load(tmp_path / "small")
    change_weights(tmp_path / "small", lambda weights: weights.pop(SCALE))
    with pytest.raises(PlugError, match=f"缺少 1 个张量：{SCALE}"):
        load(tmp_path / "small")


def test_a_truncated_file_is_refused(wide_directory: Path, tmp_path: Path) -> None:
    quantize_directory(wide_directory, tmp_path / "small", bits=8)
    file = tmp_path / "small" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])

    with pytest.raises(PlugError, match="已损坏"):
        load(tmp_path / "small")


def test_floats_where_integers_should_be_are_refused(wide_directory: Path, tmp_path: Path) -> None:
    quantize_directory(wide_directory, tmp_path / "small", bits=8)
    name = "encoder.layers.0.attention.q_proj.weight"
    change_weights(tmp_path / "small", lambda each: each.update({name: each[name].float()}))

    with pytest.raises(PlugError, match=f"{name} 是 torch.float32，应为 torch.int8"):
        load(tmp_path / "small")


@pytest.mark.parametrize("entry", [{"bits": 3}, {"bits": 4}, {"bits": 8, "kind": "fp8"}, "int8"])
def test_a_quantization_that_is_not_known_is_refused(entry: object, wide_directory: Path) -> None:
    path = wide_directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization": entry}))

    with pytest.raises(UsageError, match=r"量化|不认识|quantization"):
        load(wide_directory)


def test_another_order_within_bytes_is_refused(wide_directory: Path, tmp_path: Path) -> None:
    quantize_directory(wide_directory, tmp_path / "small", bits=4)
    file = tmp_path / "small" / "config.json"
    config = json.loads(file.read_text())
    del config["quantization"]["packing"]  # as directories were made before
    file.write_text(json.dumps(config))

    with pytest.raises(UsageError, match="重新量化"):
        load(tmp_path / "small")


def test_layers_that_cannot_be_parted_into_groups_are_refused(
    model_directory: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=r"宽度为 32.*--bits 8"):
        quantize_directory(model_directory, tmp_path / "small", bits=4)
    assert not (tmp_path / "small").exists()


def test_weights_that_are_no_numbers_are_refused(
    wide_model: Plug, tmp_path: Path, tiny_tokenizer: PlugTokenizer
) -> None:
    wide_model.encoder.layers[0].feed_forward.fc1.weight.data[3, 4] = float("nan")
    save(wide_model, tmp_path / "wide", tokenizer=tiny_tokenizer)

    with pytest.raises(PlugError, match=r"feed_forward\.fc1\.weight 里有 NaN"):
        quantize_directory(tmp_path / "wide", tmp_path / "small", bits=8)
    assert not (tmp_path / "small").exists()


def test_a_quantized_directory_is_refused_where_floats_are_needed(
    wide_directory: Path, tmp_path: Path
) -> None:
    quantize_directory(wide_directory, tmp_path / "small", bits=8)

    with pytest.raises(UsageError, match="量化过"):
        quantize_directory(tmp_path / "small", tmp_path / "smaller", bits=4)
    with pytest.raises(UsageError, match="量化过"):
        export_original(tmp_path / "small", tmp_path / "original", 1)
    with pytest.raises(UsageError, match="已经存在"):
        quantize_directory(wide_directory, tmp_path / "small", bits=8)


@BOTH
def test_a_fine_tuned_model_stays_one(bits: int, wide_directory: Path, tmp_path: Path) -> None:
    """Its task was dropped: `plug predict` of the quantised directory did not know it."""
    run = {"settings": {"task": "generation"}, "labels": []}
    (wide_directory / "finetuning.json").write_text(json.dumps(run))
    hub = {"task": "text-generation", "model": {"type": "plug", "num_beams": 3}}
    (wide_directory / "configuration.json").write_text(json.dumps(hub))

    quantize_directory(wide_directory, tmp_path / "quantized", bits=bits)

    for name, content in (("finetuning.json", run), ("configuration.json", hub)):
        assert json.loads((tmp_path / "quantized" / name).read_text()) == content

"""The original's checkpoints, cut here by hand, and those of ../shared, both ways."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import sys
from collections import OrderedDict
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor

from plug.checkpoints.original import export_original, import_original
from plug.cli import main
from plug.errors import PlugError, UsageError
from plug.loading.load import load
from plug.loading.save import save
from plug.model.configuration import PlugConfig
from plug.model.plug import Plug
from plug.tokenization import PlugTokenizer

Contents = Callable[[Path], dict[str, bytes]]
Shard = dict[str, Tensor]
NUM_SHARDS = 2
CONFIG = PlugConfig(  # every dimension unlike the others; 4 shards fit
    vocab_size=128,
    num_emitted_tokens=120,
    hidden_size=24,
    num_hidden_layers=3,
    num_decoder_layers=2,
    num_attention_heads=4,
    intermediate_size=40,
    max_position_embeddings=17,
    layer_norm_eps=1e-6,
    encoder_final_norm_passes=2,
)
ORIGINAL_CONFIG = {
    "vocab_size": 128,
    "original_vocab_size": 120,
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "dec_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "max_position_embeddings": 17,
    "type_vocab_size": 3,
    "layernorm_epsilon": 1e-6,
    "hidden_act": "gelu",
    "pre_ln": True,
    "fp16": False,
    "model_type": "plug",
}


def slice_by_hand(state: Shard, rank: int, num_shards: int) -> Shard:
    """What rank ``rank`` holds, row by row and head by head as the golden README describes it."""
    head_dim = CONFIG.head_dim
    heads = [h for h in range(4) if h * num_shards // 4 == rank]
    inner = [i for i in range(40) if i * num_shards // 40 == rank]
    words = [w for w in range(128) if w * num_shards // 128 == rank]
    units = [h * head_dim + i for h in heads for i in range(head_dim)]
    shard: Shard = OrderedDict()

    def put(name: str, module: str) -> None:
        for kind in ("weight", "bias"):
            if f"{module}.{kind}" in state:
                shard[f"{name}.{kind}"] = state[f"{module}.{kind}"].clone()

    def put_rows(name: str, modules: list[str], rows: list[int]) -> None:
        for kind in ("weight", "bias"):
            picked = [state[f"{module}.{kind}"][row] for module in modules for row in rows]
            shard[f"{name}.{kind}"] = torch.stack(picked)

    def put_columns(name: str, module: str, columns: list[int]) -> None:
        weight = state[f"{module}.weight"]
        shard[f"{name}.weight"] = torch.stack([weight[:, column] for column in columns], 1)
        shard[f"{name}.bias"] = state[f"{module}.bias"].clone()

    table = torch.stack([state["embeddings.word_embeddings.weight"][word] for word in words])
    shard["bert.embeddings.word_embeddings.weight"] = table
    put("bert.embeddings.position_embeddings", "embeddings.position_embeddings")
    put("bert.embeddings.token_type_embeddings", "embeddings.token_type_embeddings")
    put("bert.embeddings.LayerNorm", "embeddings.layer_norm")
    for index in range(3):
        ours, theirs = f"encoder.layers.{index}", f"bert.encoder.layer.{index}"
        attention = f"{ours}.attention"
        put(f"{theirs}.attention.LayerNorm", f"{ours}.attention_norm")
        fused = [f"{attention}.{part}_proj" for part in "qkv"]
        put_rows(f"{theirs}.attention.self.query_key_value", fused, units)
        put_columns(f"{theirs}.attention.output.dense", f"{attention}.out_proj", units)
        put_rows(f"{theirs}.intermediate.dense", [f"{ours}.feed_forward.fc1"], inner)
        put_columns(f"{theirs}.output.dense", f"{ours}.feed_forward.fc2", inner)
        put(f"{theirs}.LayerNorm", f"{ours}.feed_forward_norm")
    put("bert.encoder.LayerNorm", "encoder.final_norm")
    shard["bert.pooler.dense.weight"] = torch.rand(24, 24)
    shard["bert.pooler.dense.bias"] = torch.rand(24)
    shard["cls.predictions.decoder_weight"] = table
    shard["cls.predictions.bias"] = torch.stack([state["mlm_head.bias"][word] for word in words])
    put("cls.predictions.transform.dense", "mlm_head.dense")
    put("cls.predictions.transform.LayerNorm", "mlm_head.layer_norm")
    put("cls.seq_relationship", "sentence_head")
    for index in range(2):
        ours, theirs = f"decoder.layers.{index}", f"decoder.decoder.layer.{index}"
        put(f"{theirs}.input_layernorm", f"{ours}.self_attention_norm")
        fused = [f"{ours}.self_attention.{part}_proj" for part in "qkv"]
        put_rows(f"{theirs}.attention.query_key_value", fused, units)
        put_columns(f"{theirs}.attention.dense", f"{ours}.self_attention.out_proj", units)
        put(f"{theirs}.post_attention_layernorm", f"{ours}.cross_attention_norm")
        put_rows(f"{theirs}.cross_attention.query", [f"{ours}.cross_attention.q_proj"], units)
        fused = [f"{ours}.cross_attention.{part}_proj" for part in "kv"]
        put_rows(f"{theirs}.cross_attention.key_value", fused, units)
        put_columns(f"{theirs}.cross_attention.dense", f"{ours}.cross_attention.out_proj", units)
        put(f"{theirs}.post_cross_attention_layernorm", f"{ours}.feed_forward_norm")
        put_rows(f"{theirs}.intermediate", [f"{ours}.feed_forward.fc1"], inner)
        put_columns(f"{theirs}.output", f"{ours}.feed_forward.fc2", inner)
    put("decoder.decoder.final_layernorm", "decoder.final_norm")
    return shard


def shard_path(directory: Path, rank: int) -> Path:
    return directory / f"model/mp_rank_{rank:02d}_model_states.pt"


def write_original(model: Plug, directory: Path, num_shards: int) -> Path:
    (directory / "model").mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(ORIGINAL_CONFIG))
    for rank in range(num_shards):
        payload = {
            "module": slice_by_hand(model.state_dict(), rank, num_shards),
            "optimizer": None,
            "mp_world_size": num_shards,
        }
        torch.save(payload, shard_path(directory, rank))
    return directory


def read_shards(directory: Path) -> list[Shard]:
    paths = sorted((directory / "model").iterdir())
    return [torch.load(path, weights_only=True)["module"] for path in paths]


def assert_same_bits(actual: Shard, expected: Shard) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype, name
        assert torch.equal(actual[name], tensor), name


@pytest.fixture
def model(make_model: Callable[[PlugConfig], Plug]) -> Plug:
    return make_model(CONFIG)


@pytest.fixture
def original(model: Plug, tmp_path: Path) -> Path:
    return write_original(model, tmp_path / "original", NUM_SHARDS)


@pytest.mark.parametrize("num_shards", [1, 2, 4])
def test_slices_cut_by_hand_become_the_model_again(
    num_shards: int, model: Plug, tmp_path: Path
) -> None:
    source = write_original(model, tmp_path / "original", num_shards)

    notes = import_original(source, tmp_path / "model")

    loaded = load(tmp_path / "model")
    assert loaded.config == CONFIG
    assert_same_bits(loaded.state_dict(), model.state_dict())
    assert any("encoder_final_norm_passes=2" in note for note in notes)
    assert any("bert.pooler" in note for note in notes)


@pytest.mark.parametrize("num_shards", [1, 2, 4])
def test_a_model_becomes_the_slices_cut_by_hand(
    num_shards: int, model: Plug, tmp_path: Path
) -> None:
    save(model, tmp_path / "model", tokenizer=None)

    notes = export_original(tmp_path / "model", tmp_path / "original", num_shards)

    shards = read_shards(tmp_path / "original")
    assert len(shards) == num_shards
    for rank, shard in enumerate(shards):
        expected = slice_by_hand(model.state_dict(), rank, num_shards)
        for kind in ("weight", "bias"):
            expected[f"bert.pooler.dense.{kind}"].zero_()
        assert_same_bits(shard, expected)
        table = shard["bert.embeddings.word_embeddings.weight"]
        assert shard["cls.predictions.decoder_weight"].data_ptr() == table.data_ptr()
    assert any("bert.pooler" in note and "零" in note for note in notes)
    written = json.loads((tmp_path / "original/config.json").read_text())
    assert written | ORIGINAL_CONFIG == written
    configuration = json.loads((tmp_path / "original/configuration.json").read_text())
    assert configuration["model"]["model_parallel_size"] == num_shards


def test_the_tied_table_and_the_pooler_may_be_absent(
    original: Path, model: Plug, tmp_path: Path
) -> None:
    for rank in range(NUM_SHARDS):
        payload = torch.load(shard_path(original, rank), weights_only=True)
        for name in ("cls.predictions.decoder_weight", "bert.pooler.dense.weight"):
            del payload["module"][name]
        del payload["module"]["bert.pooler.dense.bias"], payload["mp_world_size"]
        torch.save(payload, shard_path(original, rank))

    import_original(original, tmp_path / "model")

    assert_same_bits(load(tmp_path / "model").state_dict(), model.state_dict())


def test_shards_of_torch_before_1_6_are_read(original: Path, model: Plug, tmp_path: Path) -> None:
    for rank in range(NUM_SHARDS):
        payload = torch.load(shard_path(original, rank), weights_only=True)
        torch.save(payload, shard_path(original, rank), _use_new_zipfile_serialization=False)

    import_original(original, tmp_path / "model")

    assert_same_bits(load(tmp_path / "model").state_dict(), model.state_dict())


def _halve(model: Plug) -> None:
    """As the reference's half mode: float16, but modules spelled `LayerNorm` float32."""
    for name, parameter in model.named_parameters():
        spelled_so = "norm" in name and not name.startswith("decoder.")
        parameter.data = parameter.data if spelled_so else parameter.data.half()


def test_every_tensor_keeps_its_own_dtype_both_ways(model: Plug, tmp_path: Path) -> None:
    _halve(model)
    source = write_original(model, tmp_path / "original", NUM_SHARDS)

    import_original(source, tmp_path / "model")
    export_original(tmp_path / "model", tmp_path / "back", 4)

    found = safetensors.torch.load_file(tmp_path / "model/model.safetensors")
    assert {x.dtype for x in found.values()} == {torch.float16, torch.float32}
    assert_same_bits(found, model.state_dict())
    assert json.loads((tmp_path / "model/config.json").read_text())["dtype"] == "float16"
    assert json.loads((tmp_path / "back/config.json").read_text())["fp16"] is True
    for rank, shard in enumerate(read_shards(tmp_path / "back")):
        expected = slice_by_hand(model.state_dict(), rank, 4)
        assert all(shard[n].dtype == x.dtype for n, x in expected.items() if "pooler" not in n)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_dtype_that_was_asked_for_is_everyones(
    dtype: torch.dtype, model: Plug, tmp_path: Path
) -> None:
    _halve(model)
    source = write_original(model, tmp_path / "original", NUM_SHARDS)

    import_original(source, tmp_path / "model", dtype=dtype)
    export_original(tmp_path / "model", tmp_path / "back", 1, dtype=torch.float32)

    found = safetensors.torch.load_file(tmp_path / "model/model.safetensors")
    assert_same_bits(found, {name: x.to(dtype) for name, x in model.state_dict().items()})
    (shard,) = read_shards(tmp_path / "back")
    assert {x.dtype for x in shard.values()} == {torch.float32}


def _edit(rank: int, change: Callable[[Shard], object]) -> Callable[[Path], None]:
    def damage(directory: Path) -> None:
        payload = torch.load(shard_path(directory, rank), weights_only=True)
        change(payload["module"])
        torch.save(payload, shard_path(directory, rank))

    return damage


def _remove(rank: int) -> Callable[[Path], None]:
    return lambda directory: shard_path(directory, rank).unlink()


def _truncate(keep: float) -> Callable[[Path], None]:
    def damage(directory: Path) -> None:
        content = shard_path(directory, 1).read_bytes()
        shard_path(directory, 1).write_bytes(content[: int(len(content) * keep)])

    return damage


def _save(payload: Any) -> Callable[[Path], None]:
    return lambda directory: torch.save(payload, shard_path(directory, 1))


class Malicious:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, ("malicious-code-ran",)


TABLE = "bert.embeddings.word_embeddings.weight"
NORM = "bert.encoder.LayerNorm.bias"
FC2 = "decoder.decoder.layer.1.output.weight"


def _set_nan(state: Shard) -> None:
    state[FC2][23, 3] = torch.nan


def _set_infinity(state: Shard) -> None:
    state[NORM][5] = torch.inf


def _untie(state: Shard) -> None:
    state["cls.predictions.decoder_weight"] = state[TABLE] + 1


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_remove(0), "缺少分片 mp_rank_00_model_states.pt（应有 2 片）"),
        (_remove(1), "缺少分片 mp_rank_01_model_states.pt（应有 2 片）"),
        (
            lambda directory: shutil.copy(shard_path(directory, 1), shard_path(directory, 2)),
            "有 3 个分片，而文件里写着 2 片",
        ),
        (_truncate(0.0), "mp_rank_01_model_states.pt：文件不完整"),
        (_truncate(0.5), "mp_rank_01_model_states.pt：文件不完整"),
        (_truncate(0.999), "mp_rank_01_model_states.pt：文件不完整"),
        (_edit(1, lambda x: x.pop(NORM)), f"缺少 1 个张量：{NORM}"),
        (_edit(1, lambda x: x.update(more=torch.ones(1))), "多出 1 个张量：more"),
        (_edit(1, lambda x: x.update({FC2: x[FC2].T})), f"{FC2} 是 [20, 24]，应为 [24, 20]"),
        (_edit(1, lambda x: x.update({FC2: x[FC2].half()})), "torch.float16"),
        (_edit(1, lambda x: x.update({FC2: x[FC2].to(torch.int8)})), "torch.int8"),
        (_edit(1, _set_nan), f"{FC2} 里有 NaN"),
        (_edit(1, _set_infinity), f"{NORM} 里有 NaN 或无穷大"),
        (_edit(1, _untie), "cls.predictions.decoder_weight"),
        (_save({"module": Malicious()}), "mp_rank_01_model_states.pt 里存的是"),
        (_save({"module": {"a": 1}}), "'a' 是 int 对象，不是张量"),
        (_save([1]), "没有 'module' 张量表"),
    ],
)
def test_a_bad_checkpoint_is_one_clear_failure_and_leaves_nothing(
    damage: Callable[[Path], object],
    message: str,
    original: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    damage(original)

    with pytest.raises(PlugError) as caught:
        import_original(original, tmp_path / "model")

    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 1
    assert [path.name for path in tmp_path.iterdir()] == ["original"]


def _set_config(**values: Any) -> Callable[[Path], None]:
    def write(directory: Path) -> None:
        (directory / "config.json").write_text(json.dumps(ORIGINAL_CONFIG | values))

    return write


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shutil.rmtree, "找不到目录"),
        (lambda directory: (directory / "config.json").unlink(), "没有 config.json"),
        (lambda directory: (directory / "config.json").write_text("{"), "JSON"),
        (lambda directory: shutil.rmtree(directory / "model"), "--to-original"),
        (_set_config(hidden_act="relu"), "hidden_act='relu'"),
        (_set_config(model_type="bert"), "model_type='bert'"),
        (_set_config(num_attention_heads=3), "num_attention_heads=3 不能平分成 2 片"),
        (_set_config(hidden_size="24"), "hidden_size"),
    ],
)
def test_a_directory_that_is_no_original_is_wrong_use(
    damage: Callable[[Path], object], message: str, original: Path, tmp_path: Path
) -> None:
    damage(original)

    with pytest.raises(UsageError, match=message):
        import_original(original, tmp_path / "model")

    assert not (tmp_path / "model").exists()


def test_config_keys_without_a_meaning_here_are_named(original: Path, tmp_path: Path) -> None:
    _set_config(new_key=1)(original)

    notes = import_original(original, tmp_path / "model")

    assert any("new_key" in note for note in notes)


def test_tensors_that_should_be_alike_in_all_shards_are_named_when_they_differ(
    original: Path, model: Plug, tmp_path: Path
) -> None:
    _edit(1, lambda x: x[NORM].add_(1))(original)

    notes = import_original(original, tmp_path / "model")

    assert any(NORM in note for note in notes)
    assert_same_bits(load(tmp_path / "model").state_dict(), model.state_dict())


def test_values_beyond_float16_are_not_rounded_to_infinity(original: Path, tmp_path: Path) -> None:
    _edit(1, lambda x: x[FC2].mul_(1e6))(original)

    with pytest.raises(PlugError, match="--dtype bfloat16"):
        import_original(original, tmp_path / "model", dtype=torch.float16)


def test_a_directory_in_use_is_never_overwritten(
    original: Path, tmp_path: Path, contents: Contents
) -> None:
    before = contents(original)

    with pytest.raises(UsageError, match="已经存在"):
        import_original(original, original)
    with pytest.raises(UsageError, match="已经存在"):
        import_original(original, tmp_path)

    assert contents(tmp_path) == {f"original/{name}": data for name, data in before.items()}


@pytest.mark.parametrize("limit", [5_000, 60_000])
def test_a_full_disk_leaves_nothing_half_written(
    limit: int,
    original: Path,
    tmp_path: Path,
    full_disk: Callable[[int], AbstractContextManager[None]],
) -> None:
    import_original(original, tmp_path / "model")

    for convert in (
        lambda: import_original(original, tmp_path / "new"),
        lambda: export_original(tmp_path / "model", tmp_path / "new", 2),
    ):
        with full_disk(limit), pytest.raises(PlugError, match="磁盘空间"):
            convert()
        assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "original"]


def _vocabulary(size: int) -> str:
    pieces = [f"字{index}" for index in range(size)]
    pieces[0] = "[PAD]"
    pieces[100:104] = ["[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    pieces[1] = "写"
    return "".join(f"{piece}\n" for piece in pieces)


def test_the_vocabulary_travels_both_ways(original: Path, tmp_path: Path) -> None:
    (original / "vocab.txt").write_text(_vocabulary(120), encoding="utf-8")

    import_original(original, tmp_path / "model")
    export_original(tmp_path / "model", tmp_path / "back", 2)

    assert PlugTokenizer.load(tmp_path / "model").encode("写") == [1]
    assert (tmp_path / "back/vocab.txt").read_text(encoding="utf-8") == _vocabulary(120)


def test_a_missing_vocabulary_is_said(original: Path, tmp_path: Path) -> None:
    notes = import_original(original, tmp_path / "model")
    assert any("没有 vocab.txt" in note for note in notes)

    notes = export_original(tmp_path / "model", tmp_path / "back", 2)
    assert any("没有写 vocab.txt" in note for note in notes)


def test_a_vocabulary_of_another_model_is_refused(original: Path, tmp_path: Path) -> None:
    (original / "vocab.txt").write_text(_vocabulary(119), encoding="utf-8")

    with pytest.raises(PlugError, match=r"vocab.txt 的分词器与模型不配"):
        import_original(original, tmp_path / "model")


@pytest.mark.parametrize(("num_shards", "message"), [(0, "不小于 1"), (3, "不能平分成 3 片")])
def test_a_number_of_shards_that_does_not_divide_is_wrong_use(
    num_shards: int, message: str, model: Plug, tmp_path: Path
) -> None:
    save(model, tmp_path / "model", tokenizer=None)

    with pytest.raises(UsageError, match=message):
        export_original(tmp_path / "model", tmp_path / "original", num_shards)


def test_an_encoder_alone_cannot_be_written_as_an_original(
    make_model: Callable[[PlugConfig], Plug], tmp_path: Path
) -> None:
    encoder = make_model(dataclasses.replace(CONFIG, num_decoder_layers=0))
    save(encoder, tmp_path / "stage1", tokenizer=None)

    with pytest.raises(UsageError, match="只有编码器"):
        export_original(tmp_path / "stage1", tmp_path / "original", 1)


def test_a_model_of_one_final_norm_is_written_with_a_warning(
    make_model: Callable[[PlugConfig], Plug], tmp_path: Path
) -> None:
    ours = make_model(dataclasses.replace(CONFIG, encoder_final_norm_passes=1))
    save(ours, tmp_path / "model", tokenizer=None)

    notes = export_original(tmp_path / "model", tmp_path / "original", 1)

    assert any("encoder_final_norm_passes=1" in note for note in notes)


def test_the_command_converts_and_says_what_it_did(
    original: Path,
    model: Plug,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def run(*arguments: object) -> int:
        monkeypatch.setattr(sys, "argv", ["plug", "convert", *map(str, arguments)])
        return main()

    ours, back = tmp_path / "model", tmp_path / "back"
    assert run("--from", original, "--to", ours, "--dtype", "float32") == 0
    assert "encoder_final_norm_passes=2" in capsys.readouterr().out
    assert run("--from", ours, "--to", back, "--to-original", 4) == 0
    assert str(back) in capsys.readouterr().out
    for rank, shard in enumerate(read_shards(back)):
        hand = slice_by_hand(model.state_dict(), rank, 4)
        assert all(torch.equal(shard[name], hand[name]) for name in hand if "pooler" not in name)

    assert run("--from", original, "--to", ours) == 2
    assert "已经存在" in capsys.readouterr().err
    _remove(1)(original)
    assert run("--from", original, "--to", tmp_path / "other") == 1
    assert capsys.readouterr().err.startswith("错误：")


@pytest.mark.shared
@pytest.mark.parametrize(("name", "num_shards"), [("mp8", 8), ("mp2", 8), ("mp2", 2)])
def test_golden_checkpoints_come_back_bit_for_bit(
    name: str, num_shards: int, golden: Path, tmp_path: Path
) -> None:
    check_round_trip(golden / "checkpoints" / name, num_shards, tmp_path)


def test_the_golden_half_checkpoint_comes_back_bit_for_bit(
    small_golden: Path, tmp_path: Path
) -> None:
    check_round_trip(small_golden / "checkpoints" / "mp2-fp16", 2, tmp_path)


def check_round_trip(source: Path, num_shards: int, tmp_path: Path) -> None:
    import_original(source, tmp_path / "model")
    export_original(tmp_path / "model", tmp_path / "back", num_shards)

    reference = source.with_name("mp8") if num_shards == 8 else source
    found = read_shards(tmp_path / "back")
    expected = read_shards(reference)
    assert len(found) == len(expected) == num_shards
    for actual, wanted in zip(found, expected, strict=True):
        assert list(actual.keys() ^ wanted.keys()) == []
        for tensor_name, tensor in wanted.items():
            if "pooler" not in tensor_name:
                assert actual[tensor_name].dtype == tensor.dtype
                assert actual[tensor_name].numpy().tobytes() == tensor.numpy().tobytes()
    for file in ("config.json", "configuration.json"):
        assert json.loads((tmp_path / "back" / file).read_text()) == json.loads(
            (reference / file).read_text()
        )


@pytest.mark.shared
def test_golden_shards_of_any_number_make_one_model(golden: Path, tmp_path: Path) -> None:
    for name in ("mp2", "mp8"):
        import_original(golden / "checkpoints" / name, tmp_path / name)

    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("mp2", "mp8")]
    assert np.array_equal(np.frombuffer(files[0], np.uint8), np.frombuffer(files[1], np.uint8))


def test_one_shard_under_two_names_is_refused(original: Path, tmp_path: Path) -> None:
    first, second = sorted((original / "model").glob("mp_rank_*"))
    shutil.copy(first, second)

    with pytest.raises(PlugError, match=rf"{second.name} 与 {first.name} 的内容相同"):
        import_original(original, tmp_path / "model")

    assert not (tmp_path / "model").exists()

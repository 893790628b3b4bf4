from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from plug.errors import UsageError
from plug.model.configuration import BOOKKEEPING_KEYS, PRESETS, PlugConfig


@pytest.mark.parametrize("name", PRESETS)
def test_a_config_survives_json(name: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(PRESETS[name].to_dict()), encoding="utf-8")
    assert PlugConfig.from_file(path) == PRESETS[name]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"hidden_size": "512"}, "hidden_size='512'"),
        ({"hidden_size": 512.0}, "hidden_size=512.0"),
        ({"layer_norm_eps": True}, "layer_norm_eps=True"),
        ({"pad_token_id": None}, "pad_token_id=None"),
        ({"vocab_size": 0}, "vocab_size=0"),
        ({"num_emitted_tokens": 0}, "num_emitted_tokens=0"),
        ({"hidden_size": -8}, "hidden_size=-8"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0"),
        ({"num_attention_heads": 0}, "num_attention_heads=0"),
        ({"intermediate_size": 0}, "intermediate_size=0"),
        ({"max_position_embeddings": 0}, "max_position_embeddings=0"),
        ({"type_vocab_size": 0}, "type_vocab_size=0"),
        ({"num_decoder_layers": -1}, "num_decoder_layers=-1"),
        ({"num_hidden_layers": 513}, "num_hidden_layers=513 太大，上限是 512"),
        ({"num_decoder_layers": 2**62}, "num_decoder_layers="),
        ({"hidden_size": 2**20}, "hidden_size=1048576 太大"),
        ({"vocab_size": 10**100}, "太大"),
        ({"layer_norm_eps": float("nan")}, "layer_norm_eps=nan"),
        ({"layer_norm_eps": 0}, "layer_norm_eps=0"),
        ({"layer_norm_eps": -1e-5}, "layer_norm_eps=-1e-05"),
        ({"initializer_range": float("inf")}, "initializer_range=inf"),
        ({"eos_token_id": 0}, "有重复"),
        ({"num_attention_heads": 5}, "hidden_size=32 不能被 num_attention_heads=5"),
        ({"num_emitted_tokens": 321}, "num_emitted_tokens=321 大于 vocab_size=320"),
        ({"encoder_final_norm_passes": 3}, "encoder_final_norm_passes=3"),
        ({"hidden_dropout_prob": 1.0}, "hidden_dropout_prob=1.0"),
        ({"attention_probs_dropout_prob": -0.1}, "attention_probs_dropout_prob=-0.1"),
        ({"pad_token_id": -1}, "pad_token_id=-1"),
        ({"unk_token_id": 320}, "unk_token_id=320"),
        ({"decoder_start_token_id": 320}, "decoder_start_token_id=320"),
        ({"eos_token_id": 320}, "eos_token_id=320"),
        ({"mask_token_id": 320}, "mask_token_id=320"),
    ],
)
def test_a_value_that_makes_no_sense_is_refused_by_name(
    changes: dict[str, Any], named: str
) -> None:
    with pytest.raises(UsageError) as caught:
        PlugConfig.from_dict(PRESETS["test"].to_dict() | changes)
    assert named in str(caught.value)


def test_an_encoder_alone_and_every_limit_itself_are_allowed() -> None:
    config = PlugConfig.from_dict(
        PRESETS["test"].to_dict()
        | {"num_decoder_layers": 0, "hidden_dropout_prob": 0, "pad_token_id": 319}
    )
    assert config.num_decoder_layers == 0
    assert config.hidden_dropout_prob == 0


def test_an_unknown_key_is_refused_by_name() -> None:
    with pytest.raises(UsageError, match="hiden_size"):
        PlugConfig.from_dict({"hiden_size": 512})


def test_the_keys_that_transformers_adds_are_passed_over() -> None:
    values = PRESETS["test"].to_dict() | dict.fromkeys(BOOKKEEPING_KEYS - {"model_type"}, "any")
    assert PlugConfig.from_dict(values) == PRESETS["test"]


def test_another_architecture_is_refused() -> None:
    with pytest.raises(UsageError, match=r"'bert'.*不是 PLUG 模型"):
        PlugConfig.from_dict({"model_type": "bert", "hidden_size": 768})


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"{", "不是有效的 JSON"),
        (b"\x80\x02", "不是有效的 JSON"),
        (b"", "不是有效的 JSON"),
        (b"[1]", "应是一个 JSON 对象"),
        (b'{"vocab": 3}', "不认识的键"),
    ],
)
def test_a_bad_config_file_is_named(content: bytes, complaint: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=complaint) as caught:
        PlugConfig.from_file(path)
    assert str(path) in str(caught.value)


def test_a_config_cannot_change_after_it_was_checked() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        PRESETS["test"].hidden_size = 33  # type: ignore[misc]


def test_the_27b_is_the_reference_s_shape() -> None:
    """Spec section 1; the head size is given there as well, so it checks the head count."""
    config = PRESETS["27b"]
    assert (config.vocab_size, config.num_emitted_tokens) == (21504, 21128)
    assert (config.hidden_size, config.head_dim, config.intermediate_size) == (8192, 64, 32768)
    assert (config.num_hidden_layers, config.num_decoder_layers) == (24, 6)
    assert (config.max_position_embeddings, config.type_vocab_size) == (2048, 3)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"tie_word_embeddings": False}, "tie_word_embeddings=False"),
        ({"is_encoder_decoder": False}, "is_encoder_decoder=False"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings=1 应为 bool"),
        ({"dtype": "float64"}, "dtype='float64' 不支持"),
        ({"architectures": "Plug"}, "architectures='Plug' 应为 list"),
        ({"id2label": []}, r"id2label=\[\] 应为 dict"),
        ({"model_type": "长" * 9999}, "……"),
    ],
)
def test_bookkeeping_that_contradicts_the_model_is_refused(
    changes: dict[str, Any], says: str, tmp_path: Path
) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(PRESETS["test"].to_dict() | changes), encoding="utf-8")

    with pytest.raises(UsageError, match=says) as caught:
        PlugConfig.from_file(path)

    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 500


def test_a_key_that_stands_twice_is_refused(tmp_path: Path) -> None:
    """`json` would take the last one without a word."""
    path = tmp_path / "config.json"
    path.write_text('{"hidden_size": 32, "hidden_size": 64}', encoding="utf-8")

    with pytest.raises(UsageError, match="两个键 'hidden_size'"):
        PlugConfig.from_file(path)

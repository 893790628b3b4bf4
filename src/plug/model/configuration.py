"""`PlugConfig`: the shape of one PLUG model, and the named sizes every command knows."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plug.errors import UsageError
from plug.jsonfiles import read_json, shown

# Written into config.json by `transformers` or by us for it; they say nothing about the shape. Each
# has the types that it may have, and null.
_BOOKKEEPING: dict[str, tuple[type, ...]] = {
    "architectures": (list,),
    "auto_map": (dict,),
    "chunk_size_feed_forward": (int,),
    "dtype": (str,),
    "id2label": (dict,),
    "is_encoder_decoder": (bool,),
    "label2id": (dict,),
    "model_type": (str,),
    "num_labels": (int,),
    "output_attentions": (bool,),
    "output_hidden_states": (bool,),
    "problem_type": (str,),
    "quantization": (dict,),
    "return_dict": (bool,),
    "tie_word_embeddings": (bool,),
    "torch_dtype": (str,),
    "transformers_version": (str,),
    "use_cache": (bool,),
}
BOOKKEEPING_KEYS = frozenset(_BOOKKEEPING)
DTYPE_NAMES = ("float32", "bfloat16", "float16")
# The largest sizes that are taken for meant: far above any model, and small enough that a damaged
# number is refused before it makes anything slow.
_LARGEST = {
    "vocab_size": 2**24,
    "hidden_size": 2**17,
    "num_hidden_layers": 512,
    "num_decoder_layers": 512,
    "num_attention_heads": 2**12,
    "intermediate_size": 2**19,
    "max_position_embeddings": 2**20,
    "type_vocab_size": 2**10,
}

ORIGINAL_SOURCE_LENGTH = 512  # tokens that the released 27B was trained to read (spec section 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class PlugConfig:
    """All that rebuilds a PLUG model; nothing about how it is trained or run.

    The defaults are the 27B's. Source: the reference code's `config.json` and spec section 1.
    """

    vocab_size: int = 21504  # rows of the word table; padded for tensor parallelism
    num_emitted_tokens: int = 21128  # ids from here on are padding rows and are never written
    hidden_size: int = 8192
    num_hidden_layers: int = 24  # encoder
    num_decoder_layers: int = 6  # 0: an encoder alone, what pre-training stage 1 leaves
    num_attention_heads: int = 128
    intermediate_size: int = 32768
    max_position_embeddings: int = 2048
    type_vocab_size: int = 3
    layer_norm_eps: float = 1e-5
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    initializer_range: float = 0.00707
    # The reference applies the encoder's final LayerNorm twice at inference, once in training.
    # Importing an original checkpoint sets 2, so that outputs equal the reference's.
    encoder_final_norm_passes: int = 1
    pad_token_id: int = 0
    unk_token_id: int = 100
    decoder_start_token_id: int = 101  # [CLS]
    eos_token_id: int = 102  # [SEP]
    mask_token_id: int = 103

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            wanted = float if field.type == "float" else int
            if isinstance(value, bool) or not isinstance(value, (int, wanted)):
                raise UsageError(
                    f"配置项 {field.name}={shown(value)} 应为数字（{wanted.__name__}）。"
                )
        at_least_one = (
            "vocab_size num_emitted_tokens hidden_size num_hidden_layers num_attention_heads "
            "intermediate_size max_position_embeddings type_vocab_size"
        )
        for name in at_least_one.split():
            if getattr(self, name) < 1:
                raise UsageError(f"配置项 {name}={getattr(self, name)} 应不小于 1。")
        for name, largest in _LARGEST.items():
            if getattr(self, name) > largest:
                raise UsageError(
                    f"配置项 {name}={shown(getattr(self, name))} 太大，上限是 {largest}。请检查它。"
                )
        if self.num_decoder_layers < 0:
            raise UsageError(f"配置项 num_decoder_layers={self.num_decoder_layers} 应不小于 0。")
        if self.hidden_size % self.num_attention_heads:
            raise UsageError(
                f"hidden_size={self.hidden_size} 不能被 num_attention_heads="
                f"{self.num_attention_heads} 整除。请选一个能整除它的头数。"
            )
        if self.num_emitted_tokens > self.vocab_size:
            raise UsageError(
                f"num_emitted_tokens={self.num_emitted_tokens} 大于 vocab_size={self.vocab_size}。"
            )
        if self.encoder_final_norm_passes not in (1, 2):
            raise UsageError(
                f"encoder_final_norm_passes={self.encoder_final_norm_passes}："
                "只能是 1（本项目的模型）或 2（导入的原版权重）。"
            )
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
            if not 0 <= getattr(self, name) < 1:
                raise UsageError(f"配置项 {name}={getattr(self, name)} 应在 [0, 1) 之内。")
        if not 0 < self.layer_norm_eps < 1:
            raise UsageError(f"配置项 layer_norm_eps={self.layer_norm_eps} 应在 (0, 1) 之内。")
        if not 0 <= self.initializer_range < 1:
            raise UsageError(
                f"配置项 initializer_range={self.initializer_range} 应在 [0, 1) 之内。"
            )
        special = ("pad", "unk", "decoder_start", "eos", "mask")
        for name in (f"{kind}_token_id" for kind in special):
            if not 0 <= getattr(self, name) < self.vocab_size:
                raise UsageError(
                    f"{name}={shown(getattr(self, name))} 不在词表 0…{self.vocab_size - 1} 内。"
                )
        ids = [getattr(self, f"{kind}_token_id") for kind in special]
        if len(set(ids)) < len(ids):
            raise UsageError(f"[PAD] [UNK] [CLS] [SEP] [MASK] 的编号 {ids} 有重复，应各不相同。")

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def max_source_length(self) -> int:
        """Tokens that the encoder reads at most, [CLS] and [SEP] counted.

        One for each position; an imported original has more positions than it was trained on.
        """
        longest = self.max_position_embeddings
        is_original = self.encoder_final_norm_passes == 2
        return min(longest, ORIGINAL_SOURCE_LENGTH) if is_original else longest

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> PlugConfig:
        """A config from the keys of a `config.json`.

        Raises:
            UsageError: another architecture, an unknown key, or a value that makes no sense.
        """
        model_type = values.get("model_type", "plug")
        if model_type != "plug":
            raise UsageError(f"model_type={shown(model_type)}：这不是 PLUG 模型（应为 'plug'）。")
        names = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(values.keys() - names - BOOKKEEPING_KEYS)
        if unknown:
            raise UsageError(f"配置里有不认识的键 {shown(unknown)}。请删去或改正拼写。")
        return cls(**{name: values[name] for name in names & values.keys()})

    @classmethod
    def from_file(cls, path: Path) -> PlugConfig:
        """Read a `config.json`.

        Raises:
            UsageError: the file is not a JSON object, or not a PLUG config.
        """
        values = read_config_file(path)
        try:
            _check_bookkeeping(values)
            return cls.from_dict(values)
        except UsageError as error:
            raise UsageError(f"{path}：{error}") from None

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def read_config_file(path: Path) -> dict[str, Any]:
    """Return the keys and values of a `config.json`, unchecked.

    Raises:
        UsageError: the file cannot be read, or is not a JSON object.
    """
    values = read_json(path, UsageError)
    if not isinstance(values, dict):
        raise UsageError(f"{path} 应是一个 JSON 对象。")
    return values


def _check_bookkeeping(values: dict[str, Any]) -> None:
    """Raise a `UsageError` where a key that is no size has a value that it cannot have."""
    for name, types in _BOOKKEEPING.items():
        value = values.get(name)
        if value is not None and type(value) not in types:
            raise UsageError(f"配置项 {name}={shown(value)} 应为 {types[0].__name__}。")
    for name in ("is_encoder_decoder", "tie_word_embeddings"):  # PLUG is nothing else
        if values.get(name) is False:
            raise UsageError(f"配置项 {name}=False：PLUG 只有 True 一种。请改正它。")
    for name in ("dtype", "torch_dtype"):
        if values.get(name) not in (None, "auto", *DTYPE_NAMES):
            raise UsageError(
                f"配置项 {name}={shown(values[name])} 不支持。可用：{'、'.join(DTYPE_NAMES)}。"
            )


_MINI_IDS = {
    "pad_token_id": 0,
    "unk_token_id": 1,
    "decoder_start_token_id": 2,
    "eos_token_id": 3,
    "mask_token_id": 4,
}
_SMALL: dict[str, Any] = {"initializer_range": 0.02, "max_position_embeddings": 1024}

PRESETS: dict[str, PlugConfig] = {  # every command finds a size by its name here
    "test": PlugConfig(
        vocab_size=320,
        num_emitted_tokens=320,
        hidden_size=32,
        num_hidden_layers=3,
        num_decoder_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=96,
        initializer_range=0.02,
        **_MINI_IDS,
    ),
    "mini": PlugConfig(
        vocab_size=12288,
        num_emitted_tokens=12288,
        hidden_size=512,
        num_hidden_layers=8,
        num_decoder_layers=6,
        num_attention_heads=8,
        intermediate_size=2048,
        **_SMALL,
        **_MINI_IDS,
    ),
    "base": PlugConfig(
        hidden_size=768,
        num_hidden_layers=12,
        num_decoder_layers=6,
        num_attention_heads=12,
        intermediate_size=3072,
        **_SMALL,
    ),
    "large": PlugConfig(
        hidden_size=1024,
        num_hidden_layers=24,
        num_decoder_layers=6,
        num_attention_heads=16,
        intermediate_size=4096,
        **_SMALL,
    ),
    "27b": PlugConfig(),
}

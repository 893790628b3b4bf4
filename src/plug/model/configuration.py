"""`PlugConfig`: the shape of one PLUG model, and the named sizes every command knows."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plug.errors import UsageError

# Written into config.json by `transformers` or by us for it; they say nothing about the shape.
BOOKKEEPING_KEYS = frozenset(
    {
        "architectures",
        "auto_map",
        "chunk_size_feed_forward",
        "dtype",
        "id2label",
        "is_encoder_decoder",
        "label2id",
        "model_type",
        "num_labels",
        "output_attentions",
        "output_hidden_states",
        "problem_type",
        "quantization",
        "return_dict",
        "tie_word_embeddings",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    }
)

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
                raise UsageError(f"配置项 {field.name}={value!r} 应为数字（{wanted.__name__}）。")
        at_least_one = (
            "vocab_size num_emitted_tokens hidden_size num_hidden_layers num_attention_heads "
            "intermediate_size max_position_embeddings type_vocab_size"
        )
        for name in at_least_one.split():
            if getattr(self, name) < 1:
                raise UsageError(f"配置项 {name}={getattr(self, name)} 应不小于 1。")
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
        special = ("pad", "unk", "decoder_start", "eos", "mask")
        for name in (f"{kind}_token_id" for kind in special):
            if not 0 <= getattr(self, name) < self.vocab_size:
                raise UsageError(
                    f"{name}={getattr(self, name)} 不在词表 0…{self.vocab_size - 1} 内。"
                )

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
            raise UsageError(f"model_type={model_type!r}：这不是 PLUG 模型（应为 'plug'）。")
        names = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(values.keys() - names - BOOKKEEPING_KEYS)
        if unknown:
            raise UsageError(f"配置里有不认识的键 {unknown}。请删去或改正拼写。")
        return cls(**{name: values[name] for name in names & values.keys()})

    @classmethod
    def from_file(cls, path: Path) -> PlugConfig:
        """Read a `config.json`.

        Raises:
            UsageError: the file is not a JSON object, or not a PLUG config.
        """
        values = read_config_file(path)
        try:
            return cls.from_dict(values)
        except UsageError as error:
            raise UsageError(f"{path}：{error}") from None

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def read_config_file(path: Path) -> dict[str, Any]:
    """The keys and values of a `config.json`, unchecked.

    Raises:
        UsageError: the file is not a JSON object.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UsageError(f"{path} 不是有效的 JSON：{error}。") from None
    if not isinstance(values, dict):
        raise UsageError(f"{path} 应是一个 JSON 对象。")
    return values


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

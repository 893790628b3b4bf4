"""What the original calls things, and how it cuts them: one table, read in both directions.

Column-parallel weights are cut on rows, row-parallel ones on columns, the word table on the
vocabulary; a fused `query_key_value` holds this rank's q, then k, then v, a `key_value` its k, then
v; all else is whole on every rank. Source: spec section 6 and the reference's loader.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from plug.checkpoints.directory import weight_shapes
from plug.checkpoints.weights import Region
from plug.errors import UsageError
from plug.model.configuration import BOOKKEEPING_KEYS, PlugConfig
from plug.model.plug import Plug
from plug.model.without_memory import without_memory

# Keys of the original's config.json and ours. What the original leaves out is the 27B's, both here
# and there.
CONFIG_KEYS = {
    "vocab_size": "vocab_size",
    "original_vocab_size": "num_emitted_tokens",
    "hidden_size": "hidden_size",
    "num_hidden_layers": "num_hidden_layers",
    "dec_hidden_layers": "num_decoder_layers",
    "num_attention_heads": "num_attention_heads",
    "intermediate_size": "intermediate_size",
    "max_position_embeddings": "max_position_embeddings",
    "type_vocab_size": "type_vocab_size",
    "layernorm_epsilon": "layer_norm_eps",
    "hidden_dropout_prob": "hidden_dropout_prob",
    "attention_probs_dropout_prob": "attention_probs_dropout_prob",
    "initializer_range": "initializer_range",
}
# Keys that change the mathematics, with the one value that ours has.
FIXED_KEYS = {"hidden_act": "gelu", "pre_ln": True, "attn_separate": False}
# How the original trains and in what precision; written with its defaults, not read.
TRAINING_KEYS = {
    "lr_decay_style": "linear",
    "weight_decay": 0.01,
    "clip_grad": 1.0,
    "warmup": 0.01,
    "fp32_layernorm": True,
    "fp32_embedding": False,
    "fp32_tokentypes": False,
    "deepspeed": False,
}
KNOWN_KEYS = {*CONFIG_KEYS, *FIXED_KEYS, *TRAINING_KEYS, "fp16", "model_type"}
MODEL_TYPES = (None, "plug", "plugNLU", "plugNLG")

POOLER = "bert.pooler.dense"  # in every file, read by nothing
TIED_TABLE = "cls.predictions.decoder_weight"  # the word table again, where it is saved
WORD_TABLE = "bert.embeddings.word_embeddings.weight"

Cut = Literal["rows", "columns", "whole"]
_ENCODER_LAYER: tuple[tuple[str, tuple[str, ...], Cut], ...] = (
    ("attention.LayerNorm", ("attention_norm",), "whole"),
    (
        "attention.self.query_key_value",
        ("attention.q_proj", "attention.k_proj", "attention.v_proj"),
        "rows",
    ),
    ("attention.output.dense", ("attention.out_proj",), "columns"),
    ("LayerNorm", ("feed_forward_norm",), "whole"),
    ("intermediate.dense", ("feed_forward.fc1",), "rows"),
    ("output.dense", ("feed_forward.fc2",), "columns"),
)
_DECODER_LAYER: tuple[tuple[str, tuple[str, ...], Cut], ...] = (
    ("input_layernorm", ("self_attention_norm",), "whole"),
    (
        "attention.query_key_value",
        ("self_attention.q_proj", "self_attention.k_proj", "self_attention.v_proj"),
        "rows",
    ),
    ("attention.dense", ("self_attention.out_proj",), "columns"),
    ("post_attention_layernorm", ("cross_attention_norm",), "whole"),
    ("cross_attention.query", ("cross_attention.q_proj",), "rows"),
    ("cross_attention.key_value", ("cross_attention.k_proj", "cross_attention.v_proj"), "rows"),
    ("cross_attention.dense", ("cross_attention.out_proj",), "columns"),
    ("post_cross_attention_layernorm", ("feed_forward_norm",), "whole"),
    ("intermediate", ("feed_forward.fc1",), "rows"),
    ("output", ("feed_forward.fc2",), "columns"),
)
_AROUND_LAYERS: tuple[tuple[str, tuple[str, ...], Cut], ...] = (
    ("bert.embeddings.word_embeddings", ("embeddings.word_embeddings",), "rows"),
    ("bert.embeddings.position_embeddings", ("embeddings.position_embeddings",), "whole"),
    ("bert.embeddings.token_type_embeddings", ("embeddings.token_type_embeddings",), "whole"),
    ("bert.embeddings.LayerNorm", ("embeddings.layer_norm",), "whole"),
    ("bert.encoder.LayerNorm", ("encoder.final_norm",), "whole"),
    ("cls.predictions", ("mlm_head",), "rows"),  # its bias, one a word
    ("cls.predictions.transform.dense", ("mlm_head.dense",), "whole"),
    ("cls.predictions.transform.LayerNorm", ("mlm_head.layer_norm",), "whole"),
    ("cls.seq_relationship", ("sentence_head",), "whole"),
    ("decoder.decoder.final_layernorm", ("decoder.final_norm",), "whole"),
)


class Entry(NamedTuple):
    """One tensor of a shard: the tensors of ours it holds in turn, and how they are cut."""

    ours: tuple[str, ...]
    shape: tuple[int, ...]  # of each of ours, uncut; they are alike
    axis: int | None  # cut along it; None is whole on every rank

    def region(self, rank: int, num_shards: int) -> Region:
        """The part of each of ours that ``rank`` holds."""
        if self.axis is None:
            return ...
        size = self.shape[self.axis] // num_shards
        return (slice(None),) * self.axis + (slice(rank * size, (rank + 1) * size),)

    def shard_shape(self, num_shards: int) -> tuple[int, ...]:
        shape = list(self.shape)
        if self.axis is not None:
            shape[self.axis] //= num_shards
        shape[0] *= len(self.ours)
        return tuple(shape)

    def num_elements(self, num_shards: int) -> int:
        """Numbers that one shard holds of it."""
        return math.prod(self.shard_shape(num_shards))


def tensor_table(config: PlugConfig) -> dict[str, Entry]:
    """Every tensor of a shard that the model uses, by its name in the original."""
    with without_memory():
        shapes = weight_shapes(Plug(config))
    modules = list(_AROUND_LAYERS)
    for count, layer, theirs, ours in (
        (config.num_hidden_layers, _ENCODER_LAYER, "bert.encoder.layer", "encoder.layers"),
        (config.num_decoder_layers, _DECODER_LAYER, "decoder.decoder.layer", "decoder.layers"),
    ):
        for index in range(count):
            for name, parts, cut in layer:
                prefixed = tuple(f"{ours}.{index}.{part}" for part in parts)
                modules.append((f"{theirs}.{index}.{name}", prefixed, cut))
    table = {}
    for name, parts, cut in modules:
        for kind in ("weight", "bias"):
            names = tuple(f"{part}.{kind}" for part in parts)
            if names[0] in shapes:  # tables have no bias
                axis = None if cut == "whole" else 0 if cut == "rows" else 1
                if kind == "bias" and cut == "columns":
                    axis = None  # added once, after the ranks are summed
                table[f"{name}.{kind}"] = Entry(names, shapes[names[0]], axis)
    return table


def read_original_config(values: Mapping[str, Any]) -> tuple[PlugConfig, list[str]]:
    """Our config from the original's keys, and notes on what was passed over.

    Raises:
        UsageError: another architecture, or values that ours has no mathematics for.
    """
    if values.get("model_type") not in MODEL_TYPES:
        raise UsageError(f"model_type={values['model_type']!r}：这不是原版 PLUG 的配置。")
    for key, wanted in FIXED_KEYS.items():
        if values.get(key, wanted) != wanted:
            raise UsageError(f"{key}={values[key]!r}：只支持 {wanted!r}。")
    unknown = sorted(values.keys() - KNOWN_KEYS - BOOKKEEPING_KEYS)
    notes = [f"没有用到配置里的这些键：{'、'.join(unknown)}。"] if unknown else []
    ours = {CONFIG_KEYS[key]: values[key] for key in CONFIG_KEYS.keys() & values.keys()}
    return PlugConfig(**ours, encoder_final_norm_passes=2), notes


def original_config(config: PlugConfig, *, half: bool) -> dict[str, Any]:
    """The original's `config.json`; ``half`` says that the weights are float16."""
    values = config.to_dict()
    shape = {theirs: values[ours] for theirs, ours in CONFIG_KEYS.items()}
    return shape | FIXED_KEYS | TRAINING_KEYS | {"fp16": half, "model_type": "plug"}


def original_configuration(num_shards: int) -> dict[str, Any]:
    """ModelScope's `configuration.json`: which pipeline, how many ranks, the sampling defaults."""
    return {
        "framework": "pytorch",
        "task": "text-generation",
        "model": {
            "type": "plug",
            "world_size": num_shards,
            "model_parallel_size": num_shards,
            "top_k": 20,
            "top_p": 0.0,
            "temperature": 0.9,
            "seed": 1234,
        },
        "megatron": {
            "version": "v1",
            "world_size": num_shards,
            "tensor_model_parallel_size": num_shards,
            "seed": 1234,
        },
        "pipeline": {"type": "plug-generation"},
    }

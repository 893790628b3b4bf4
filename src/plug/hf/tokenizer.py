"""`PlugTokenizerFast`: what `AutoTokenizer` makes of a model directory's `tokenizer.json`."""

from __future__ import annotations

import json
from typing import Any

from tokenizers import Regex, Tokenizer, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from plug.hf.config import local_path


class PlugTokenizerFast(PreTrainedTokenizerFast):
    """Gives the ids of `plug.PlugTokenizer`, between [CLS] and [SEP].

    "[SEP]" and the like, typed in a text, stay text; "[MASK]" is the mask, which
    `pipeline("fill-mask")` looks for.

    Where `tokenizer_config.json` says ``by_character``, a text is cut into characters first: so a
    model was trained that labels characters.
    """

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As `PreTrainedTokenizerFast.from_pretrained`; knows the name of the shipped model."""
        # Not in `__init__`: transformers rebuilds a tokenizer whose class has one, and adds "<s>".
        tokenizer = super().from_pretrained(
            local_path(pretrained_model_name_or_path), *args, **kwargs
        )
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        for token in state["added_tokens"]:  # `split_special_tokens` splits those that are special
            token["special"] = token["content"] != tokenizer.mask_token
        backend = Tokenizer.from_str(json.dumps(state))
        if tokenizer.init_kwargs.get("by_character"):
            by_character = pre_tokenizers.Split(Regex(r"(?m)."), "isolated")
            backend.pre_tokenizer = pre_tokenizers.Sequence([by_character, backend.pre_tokenizer])
        backend.encode_special_tokens = tokenizer.split_special_tokens
        tokenizer._tokenizer = backend
        return tokenizer

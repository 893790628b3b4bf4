#!/usr/bin/env bash
# Expected: a subclass of PreTrainedTokenizerFast whose `__init__` only calls its parent's loads the same vocabulary from
#   the same directory as its parent, and saves the same tokenizer_config.json.
# Happens (transformers 5.24.0): a class that has an `__init__` is rebuilt from vocabulary and merges in place of being read
#   from tokenizer.json. "<s>" and "</s>", which no file names, are added as new last ids, and save_pretrained writes the whole
#   vocabulary into tokenizer_config.json. Without an `__init__` neither happens.
# Hurts: whoever writes a tokenizer class of their own. The new ids are outside of the model's embeddings.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet transformers==5.24.0 tokenizers==0.23.3
cd "$folder"
"$folder/venv/bin/python" - <<'P'
import json
import pathlib

import transformers
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast


class Plain(PreTrainedTokenizerFast):
    pass


class WithInit(PreTrainedTokenizerFast):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)


pathlib.Path("m").mkdir()
backend = Tokenizer(models.BPE({"[UNK]": 0, "a": 1, "b": 2, "ab": 3}, [("a", "b")], unk_token="[UNK]"))
backend.save("m/tokenizer.json")
settings = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "[UNK]"}
pathlib.Path("m/tokenizer_config.json").write_text(json.dumps(settings))
found = {}
for each in (Plain, WithInit):
    tokenizer = each.from_pretrained("m")
    tokenizer.save_pretrained(each.__name__)
    saved = json.loads(pathlib.Path(each.__name__, "tokenizer_config.json").read_text())
    found[each.__name__] = (len(tokenizer), tokenizer.bos_token, "vocab" in saved)
print("transformers", transformers.__version__)
print("(length, bos_token, vocabulary in tokenizer_config.json):", found)
assert found == {"Plain": (4, None, False), "WithInit": (6, "<s>", True)}, "it changed"
P

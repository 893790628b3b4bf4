#!/usr/bin/env bash
# Expected: a tokenizer.json of the tokenizers library is the whole tokenizer. AutoTokenizer, or BertTokenizer, gives the ids that
#   Tokenizer.from_file gives, as in version 4; in version 5 the class is a wrapper of that library alone.
# Happens (transformers 5.24.0, tokenizers 0.23.3; 4.57.3 as it was): where tokenizer_config.json says BertTokenizer or BertTokenizerFast, or config.json says
#   a model of BERT, the words are taken from the file and everything else is built anew from the defaults of the class: normaliser, cutting
#   and post-processor of the file do not count. Full-width letters and marks that NFKC made half-width are [UNK]; numbers that were cut into
#   digits are not; a template without [CLS] has one. Nothing is printed, and save_pretrained writes the new parts over the old. Loaded as
#   PreTrainedTokenizerFast, or with that as tokenizer_class, the file is read as it is. Of other parts and classes: the finding on mBART's
#   normaliser in this folder.
# Hurts: whoever trained a Chinese WordPiece with tokenizers (NFKC, traditional to simplified, digits apart) and a model on it under version 4: after the move
#   the same directory gives other ids, in serving as in training, and the quality falls without an error.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
for version in 4.57.3 5.24.0; do
    python3.11 -m venv "$folder/$version"
done
"$folder/4.57.3/bin/pip" install --quiet transformers==4.57.3
"$folder/5.24.0/bin/pip" install --quiet transformers==5.24.0 tokenizers==0.23.3
cd "$folder"
cat >read.py <<'P'
import json
from pathlib import Path

import tokenizers
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

new = transformers.__version__.startswith("5")
words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"今天气很好,:", "ai", *"0123456789", *("##" + digit for digit in "0123456789")]
special = {"unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
text = "今天：ＡＩ，很好2024"
bert = {"normalizer": normalizers.BertNormalizer(), "pre_tokenizer": pre_tokenizers.BertPreTokenizer(),
        "post_processor": processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])}
changes = {
    "as BERT has it": {},
    "NFKC": {"normalizer": normalizers.Sequence([normalizers.NFKC(), normalizers.BertNormalizer()])},
    "digits": {"pre_tokenizer": pre_tokenizers.Sequence([pre_tokenizers.BertPreTokenizer(), pre_tokenizers.Digits(individual_digits=True)])},
    "no [CLS]": {"post_processor": processors.TemplateProcessing("$A [SEP]", special_tokens=[("[SEP]", 3)])},
}
print("transformers", transformers.__version__, "tokenizers", tokenizers.__version__)
for name, change in changes.items():
    whole = Tokenizer(models.WordPiece({word: id_ for id_, word in enumerate(words)}, unk_token="[UNK]"))
    whole.decoder = decoders.WordPiece()
    for part, value in (bert | change).items():
        setattr(whole, part, value)
    directory = Path(f"tokenizer {name}")
    directory.mkdir(exist_ok=True)
    whole.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer", **special}))
    meant = Tokenizer.from_file(str(directory / "tokenizer.json")).encode(text)
    found = AutoTokenizer.from_pretrained(directory)(text)["input_ids"]
    plain = PreTrainedTokenizerFast.from_pretrained(directory)(text)["input_ids"]
    print(f"{name}: {' '.join(meant.tokens)}" + ("" if found == meant.ids else f"\n  AutoTokenizer: {' '.join(words[id_] for id_ in found)}"))
    assert plain == meant.ids, "it changed"
    assert (found != meant.ids) == (new and bool(change)), "it changed"
P
for version in 4.57.3 5.24.0; do
    "$folder/$version/bin/python" -W ignore read.py
done

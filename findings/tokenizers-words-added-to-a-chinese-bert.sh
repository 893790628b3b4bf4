#!/usr/bin/env bash
# Expected: tokenizer.add_tokens(["李雷", "iPhone"]) gives tokens that tokenize() shows as they were added, that
#   convert_tokens_to_ids(tokenize(text)) finds, and that decode() writes as they were added.
# Happens (transformers 5.24.0, tokenizers 0.23.3): ids are right, names are not. An added word takes the form in which BertNormalizer
#   leaves text: tokenize() gives ' 李  雷 ' and 'iphone', convert_tokens_to_ids makes [UNK] of both, decode() writes " 李  雷 " and
#   "iphone". The word is also found in any text that normalises to it: "é", added, is found in every e. Since version 5 there is no
#   slow BertTokenizer, which kept names. AddedToken(word, normalized=False) is what was meant.
#   https://github.com/huggingface/tokenizers/issues/1165 (closed: as intended)
# Hurts: whoever adds names, terms or entity marks to a Chinese BERT, BART or CPT: code that goes by way of tokens (word alignment, masking
#   of whole words, vocabulary statistics) trains and scores [UNK], and answers come out with blanks and in lower case.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet transformers==5.24.0 tokenizers==0.23.3
cd "$folder"
"$folder/venv/bin/python" - <<'P'
import pathlib

import tokenizers
import transformers
from tokenizers import AddedToken
from transformers import BertTokenizer

pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"我和用打电话给", "h", "##e", "##y", "he", "##llo"]
pathlib.Path("vocab.txt").write_text("\n".join(pieces), encoding="utf-8")


def looked_at(added, text):
    tokenizer = BertTokenizer(vocab="vocab.txt")
    tokenizer.add_tokens(added)
    ids = tokenizer(text, add_special_tokens=False).input_ids
    tokens = tokenizer.tokenize(text)
    return ids, tokens, tokenizer.convert_tokens_to_ids(tokens), tokenizer.decode(ids)


print("transformers", transformers.__version__, "tokenizers", tokenizers.__version__)
text = "我用iPhone打给李雷"
first = len(pieces)
ids, tokens, again, decoded = looked_at(["李雷", "iPhone"], text)
print("add_tokens(['李雷', 'iPhone']):", ids, tokens, again, repr(decoded))
assert ids == [5, 7, first + 1, 8, 11, first] and again == [5, 7, 1, 8, 11, 1], "it changed"
assert tokens == ["我", "用", "iphone", "打", "给", " 李  雷 "] and decoded.endswith("给  李  雷 "), "it changed"

exact = [AddedToken(word, normalized=False) for word in ("李雷", "iPhone")]
ids, tokens, again, decoded = looked_at(exact, text)
print("normalized=False:              ", ids, tokens, again, repr(decoded))
assert ids == again and tokens[2] == "iPhone" and decoded == "我 用 iPhone 打 给 李雷", "it changed"

without, accent = looked_at([], "hello")[1], looked_at(["é"], "hello")[1]
print("'hello' is", without, "and after add_tokens(['é'])", accent)
assert without == ["he", "##llo"] and accent[:2] == ["h", "e"], "it changed"
P

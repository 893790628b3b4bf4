#!/usr/bin/env bash
# Expected: MBartTokenizer gives the pieces that its sentencepiece.bpe.model gives, as in version 4 and as MBart50Tokenizer, XLMRobertaTokenizer and
#   T5Tokenizer do: the model's normaliser (nmt_nfkc, SentencePiece's default) is a part of the file.
# Happens (transformers 5.24.0, sentencepiece 0.2.3): MBartTokenizer, DebertaV2Tokenizer and BigBirdTokenizer leave the normaliser out, also where
#   tokenizer.json, as version 4 saved it, has it. The vocabulary was made of normalised text and has ",", ":", "?", "(" and "2024" in
#   half width alone; so every ， ： ？ ！ （ ） ； and each full-width digit or letter of a Chinese text is <unk>. 。 and 、 are not
#   touched by NFKC and hide it. Nothing is printed.
# Hurts: whoever translates or summarises Chinese with mBART (mbart-large-cc25, zh_CN), or reads it with a Chinese DeBERTa-v2 with SentencePiece: after
#   the move to version 5 nearly each sentence has <unk> at its commas, in training as in use, and quality falls without an error.
#   Converting the text with unicodedata.normalize("NFKC", text) before the tokenizer brings most of it back.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet transformers==5.24.0 tokenizers==0.23.3 sentencepiece==0.2.3 protobuf==7.36.2
cd "$folder"
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" -W ignore - <<'P'
import json
import unicodedata
from pathlib import Path

import sentencepiece
import transformers
from transformers import BigBirdTokenizer, DebertaV2Tokenizer, MBart50Tokenizer, MBartTokenizer, T5Tokenizer, XLMRobertaTokenizer

transformers.logging.set_verbosity_error()
sentences = ["春天来了，花都开了。", "他问：“你去哪里？”", "今年（２０２４年）有３６６天！", "山上有座庙；庙里有个老和尚、小和尚。"]
Path("corpus.txt").write_text("\n".join(sentences * 50), encoding="utf-8")
sentencepiece.SentencePieceTrainer.train(input="corpus.txt", model_prefix="chinese", vocab_size=80, hard_vocab_limit=False,
                                         character_coverage=1.0, minloglevel=2)
processor = sentencepiece.SentencePieceProcessor(model_file="chinese.model")
classes = {MBartTokenizer: "sentencepiece.bpe.model", DebertaV2Tokenizer: "spm.model", BigBirdTokenizer: "spiece.model",
           MBart50Tokenizer: "sentencepiece.bpe.model", XLMRobertaTokenizer: "sentencepiece.bpe.model", T5Tokenizer: "spiece.model"}


def unknown(tokenizer, texts):
    """The pieces of these texts that the vocabulary lacks."""
    return [piece for text in texts for piece in tokenizer.tokenize(text) if piece not in tokenizer.get_vocab()]


print("transformers", transformers.__version__, "sentencepiece", sentencepiece.__version__)
print("sentencepiece:", processor.encode(sentences, out_type=str), "unknown:", sum(ids.count(0) for ids in processor.encode(sentences)))
normalised = [unicodedata.normalize("NFKC", text) for text in sentences]
missing = {}
for tokenizer_class, name in classes.items():
    folder = Path(tokenizer_class.__name__)
    folder.mkdir()
    (folder / name).write_bytes(Path("chinese.model").read_bytes())
    tokenizer = tokenizer_class.from_pretrained(folder)
    missing[tokenizer_class.__name__] = unknown(tokenizer, sentences)
    print(f"{tokenizer_class.__name__}: not in the vocabulary:", missing[tokenizer_class.__name__], "| of NFKC text:", unknown(tokenizer, normalised))
    assert not unknown(tokenizer, normalised), "it changed"
assert all(ids.count(0) == 0 for ids in processor.encode(sentences)), "it changed"
dropped = [name for name, pieces in missing.items() if any("，" in piece for piece in pieces)]
assert dropped == ["MBartTokenizer", "DebertaV2Tokenizer", "BigBirdTokenizer"] and not any(missing[name] for name in missing if name not in dropped), "it changed"

# A directory of version 4: tokenizer.json with the normaliser in it.
XLMRobertaTokenizer.from_pretrained("XLMRobertaTokenizer").save_pretrained("saved")
of_file = json.loads(Path("saved/tokenizer.json").read_text(encoding="utf-8"))["normalizer"]
config = json.loads(Path("saved/tokenizer_config.json").read_text())
Path("saved/tokenizer_config.json").write_text(json.dumps({**config, "tokenizer_class": "MBartTokenizer"}))
loaded = MBartTokenizer.from_pretrained("saved")
print("tokenizer.json has a normaliser:", of_file["type"], "| the MBartTokenizer loaded from it:", loaded.backend_tokenizer.normalizer)
assert of_file["type"] == "Precompiled" and loaded.backend_tokenizer.normalizer is None, "it changed"
P

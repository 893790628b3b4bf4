#!/usr/bin/env bash
# Expected: model.generate(stop_strings=["天来"], tokenizer=tokenizer) ends after 天来, also where every Chinese character is a token (the
#   Chinese BERT vocabulary, with which bart-base-chinese, CPT and Chinese T5s write). Documented as a list of strings that end a text.
# Happens (transformers 5.24.0): a single character works. Two or more are refused: "unable to identify tokens matching one or more of
#   the supplied stop string(s) … characters that are not in the tokenizer vocabulary", though both are in it. Tokens are compared as
#   decode() shows them, which is with a blank before each, so "天 来", as no user would write it, is what stops a text.
#   English is no better: "it's" is accepted and never stops; "it ' s" does.
# Hurts: whoever serves such a model with a stop string from a request: an error of status 500 that blames the vocabulary, or a text that
#   runs on to its last token.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet transformers==5.24.0 torch==2.13.0
cd "$folder"
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - <<'P'
import pathlib
import warnings

warnings.simplefilter("ignore")

import torch
import transformers
from transformers import BartConfig, BartForConditionalGeneration, BertTokenizer, LogitsProcessor

transformers.logging.set_verbosity_error()
letters = "abcdefghijklmnopqrstuvwxyz"
pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"春天来了。'", "it", *letters, *(f"##{letter}" for letter in letters)]
pathlib.Path("vocab.txt").write_text("\n".join(pieces), encoding="utf-8")
tokenizer = BertTokenizer(vocab="vocab.txt")
torch.manual_seed(0)
model = BartForConditionalGeneration(BartConfig(
    vocab_size=len(tokenizer), d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
    encoder_ffn_dim=16, decoder_ffn_dim=16, max_position_embeddings=64, decoder_start_token_id=2, bos_token_id=2, eos_token_id=3,
    pad_token_id=0, forced_eos_token_id=None)).eval()
WRITTEN = "春天来了。it's天。"
ids = tokenizer(WRITTEN, add_special_tokens=False).input_ids


class Dictated(LogitsProcessor):
    """Has the model write one text, so that no training is needed."""

    def __call__(self, input_ids, scores):
        dictated = torch.full_like(scores, -torch.inf)
        dictated[:, (ids + [3])[input_ids.shape[1] - 1]] = 0
        return dictated


def written(stop):
    source = tokenizer("春天", return_tensors="pt", return_token_type_ids=False)
    try:
        output = model.generate(**source, max_new_tokens=20, logits_processor=[Dictated()], stop_strings=[stop], tokenizer=tokenizer)
    except ValueError as error:
        assert "unable to identify tokens" in str(error), error
        return "ValueError: unable to identify tokens"
    return tokenizer.decode(output[0], skip_special_tokens=True)


print("transformers", transformers.__version__, "| unknown ids in the text:", ids.count(tokenizer.unk_token_id))
found = {stop: written(stop) for stop in ("来", "天来", "了。", "天 来", "it's", "it ' s")}
for stop, text in found.items():
    print(f"stop_strings=[{stop!r}]: {text}")
whole = "春 天 来 了 。 it ' s 天 。"
refused = "ValueError: unable to identify tokens"
assert found == {"来": "春 天 来", "天来": refused, "了。": refused, "天 来": "春 天 来", "it's": whole,
                 "it ' s": "春 天 来 了 。 it ' s"}, "it changed"
P

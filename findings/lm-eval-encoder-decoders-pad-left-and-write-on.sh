#!/usr/bin/env bash
# Expected: lm-evaluation-harness scores an encoder-decoder (backend "seq2seq", chosen by itself for BART and T5) with what generate() writes:
#   at most `max_gen_toks` new tokens, whatever the batch size, since a padded batch gives each text what it gets alone.
# Happens (lm_eval 0.4.13, transformers 5.24.0): (1) sources are padded on the LEFT, as is right for decoder-only models. BART, mBART and
#   Pegasus count positions from the first pad, so that a short source in a batch is read at positions that it never had, and another
#   text comes out. (2) The limit is the length of the longest source of the batch plus max_gen_toks; a decoder does not begin with its
#   source, and writes that much more: 41 tokens for 8. Stop strings are looked for only after as many tokens as the source has.
#   T5's relative positions are spared (1), not (2). tokenizer.padding_side is overridden.
# Hurts: whoever compares Chinese BARTs, mBARTs or mT5s with the harness: ROUGE, BLEU and exact match depend on --batch_size and on which
#   sources share a batch, with nothing printed. Only --batch_size 1 gives the texts of generate(), too long still.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet lm_eval==0.4.13 transformers==5.24.0 accelerate==1.15.0 "torch>=2.11,<2.14"
cd "$folder"
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" -W ignore - <<'P'
import logging
from importlib.metadata import version
from pathlib import Path

import torch
import transformers
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import BartConfig, BartForConditionalGeneration, BertTokenizer, T5Config, T5ForConditionalGeneration

transformers.logging.set_verbosity_error()
logging.disable(logging.WARNING)
short, long = "天地玄黄", "日月盈昃辰宿列张寒来暑往秋收冬藏" * 2
Path("vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *dict.fromkeys(short + long)]), encoding="utf-8")
tokenizer = BertTokenizer.from_pretrained(".", eos_token="[SEP]")
torch.manual_seed(0)
ids = {"vocab_size": len(tokenizer), "pad_token_id": 0, "eos_token_id": 3, "decoder_start_token_id": 2}
bart = BartConfig(d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=37,
                  decoder_ffn_dim=37, max_position_embeddings=128, init_std=0.5, bos_token_id=2, forced_eos_token_id=None, **ids)
t5 = T5Config(d_model=32, d_kv=8, d_ff=37, num_layers=2, num_heads=4, **ids)


def by_harness(model, batch_size):
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, max_length=128, device="cpu")
    options = {"until": ["。"], "max_gen_toks": 8, "do_sample": False}
    requests = [Instance("generate_until", {}, (text, dict(options)), index) for index, text in enumerate((short, long))]
    return [text.replace(" ", "") for text in lm.generate_until(requests, disable_tqdm=True)]


def by_generate(model, padding_side):
    batch = tokenizer([short, long], padding=True, padding_side=padding_side, return_tensors="pt", return_token_type_ids=False)
    texts = tokenizer.batch_decode(model.generate(**batch, max_new_tokens=8, do_sample=False), skip_special_tokens=True)
    return [text.replace(" ", "") for text in texts]


print("lm_eval", version("lm_eval"), "transformers", transformers.__version__)
found = {}
for model in (BartForConditionalGeneration(bart).eval(), T5ForConditionalGeneration(t5).eval()):
    name = type(model).__name__
    model.generation_config.suppress_tokens = [0, 1, 2, 3, 4]  # characters alone, and no end
    found[name] = alone, together, right = by_harness(model, 1), by_harness(model, 2), by_generate(model, "right")
    print(f"{name}, max_gen_toks=8: lengths {[len(text) for text in alone]} with batch_size=1, {[len(text) for text in together]} with 2")
    print(f"  for {short}: {alone[0][:8]} with batch_size=1, {together[0][:8]} with 2, with generate() {right[0]}")
    assert alone[0][:8] == right[0] and together[0][:8] == by_generate(model, "left")[0], "it changed"
    assert [len(text) for text in alone] == [8 + 1 + len(short), 8 + 1 + len(long)], "it changed"
    assert [len(text) for text in together] == [8 + 1 + len(long)] * 2, "it changed"
alone, together, _ = found["BartForConditionalGeneration"]
assert alone[0][:8] != together[0][:8], "it changed"
alone, together, _ = found["T5ForConditionalGeneration"]
assert alone[0][:8] == together[0][:8] and alone[0] != together[0], "it changed"
P

#!/usr/bin/env bash
# Expected: CpmAntForCausalLM (CPM-Ant, 10B, Chinese) is a causal language model: the logits at a place do not depend on what comes later, `labels` that
#   are the input train the next token, as the guide to causal language modelling has it for AutoModelForCausalLM, and generate() writes the
#   same with and without the cache.
# Happens (transformers 5.24.0): none of these. The whole input is taken for context, in which CPM-Ant looks both ways; the original marks the part
#   that is to be written, here nothing does. The loss compares the logits at a place with the token at that very place. Labels shifted by hand do
#   not help: the next token is in sight. On random tokens, which cannot be foretold, the loss with shifted labels falls to 0.002,
#   where GPT-2 stays at ln 8 = 2.08. `labels` is described as "masked language modeling loss". With the cache, written tokens do
#   not change what came before, as they do without it.
# Hurts: whoever fine-tunes CPM-Ant on Chinese texts with the Trainer, or takes a perplexity from its loss: losses are splendid, and nothing
#   about writing was learned. A pass for each token, with the cache of those before it, is what gives
#   a loss that means something.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet transformers==5.24.0 torch==2.13.0
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'P'
import math

import torch
import transformers
from torch.nn.functional import cross_entropy
from transformers import CpmAntConfig, CpmAntForCausalLM, GPT2Config, GPT2LMHeadModel
from transformers.utils import logging

logging.set_verbosity_error()
print("transformers", transformers.__version__)
ids = torch.randint(10, 18, (2, 12), generator=torch.Generator().manual_seed(0))
other = ids.clone()
other[:, -1] = 9


def cpmant():
    return CpmAntForCausalLM(CpmAntConfig(vocab_size=99, hidden_size=32, num_attention_heads=4, dim_head=8, dim_ff=64, num_hidden_layers=2,
                                          prompt_length=4, init_std=0.2))


def gpt2():
    return GPT2LMHeadModel(GPT2Config(vocab_size=99, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2))


def trained(model):
    """The loss of the next token, on fresh random tokens, after 400 steps with labels that are shifted by hand."""
    optimizer, generator = torch.optim.Adam(model.parameters(), 3e-3), torch.Generator().manual_seed(1)
    for step in range(400):
        batch = torch.randint(10, 18, (16, 12), generator=generator)
        logits = model(input_ids=batch).logits
        loss = cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return round(float(loss), 3)


for build in (gpt2, cpmant):
    torch.manual_seed(0)
    model = build().eval()
    with torch.no_grad():
        logits, loss = (outputs := model(input_ids=ids, labels=ids)).logits, float(outputs.loss)
        later = float((model(input_ids=other).logits - logits)[:, :-1].norm() / logits[:, :-1].norm())
        following = float(cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()))
        itself = float(cross_entropy(logits.flatten(0, 1), ids.flatten()))
        texts = [model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, min_new_tokens=12, do_sample=False, pad_token_id=0,
                                use_cache=use_cache).tolist() for use_cache in (True, False)]
    learned = trained(model)
    print(f"{type(model).__name__}: earlier logits change with the last token by {later:.3f}; loss {loss:.3f}, of the next token {following:.3f},",
          f"of the token itself {itself:.3f};\n  same text with and without the cache: {texts[0] == texts[1]};",
          f"loss of random tokens after training {learned}, ln 8 = {math.log(8):.3f}")
    if build is gpt2:
        assert later == 0 and abs(loss - following) < 1e-4 and texts[0] == texts[1] and learned > 1.9, "it changed"
    else:
        assert later > 0.05 and abs(loss - itself) < 1e-4 and texts[0] != texts[1] and learned < 0.3, "it changed"
P

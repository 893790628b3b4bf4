#!/usr/bin/env bash
# Expected: generate(cache_implementation="static") writes what it writes with the default cache; a model that cannot do with a static cache refuses it.
# Happens (transformers 5.24.0): LED takes it and writes something else. Its decoder makes no causal mask for a single token, since a cache that grows needs
#   none; a static one has its full length from the start, and the empty places are attended to: keys of zeros, which get a share of the attention
#   like any other. The first logits are off by a third to a half of their norm here, and the more room the cache has (max_new_tokens), the
#   more. Nothing is printed. BART and LongT5 are right; the default cache is what works.
# Hurts: whoever speeds up summaries of long documents with a LED by torch.compile, for which the static cache is there: the summaries are other and
#   worse ones, and compilation or precision gets the blame.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet transformers==5.24.0 torch==2.13.0
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'P'
import torch
import transformers
from transformers import BartConfig, BartForConditionalGeneration, LEDConfig, LEDForConditionalGeneration
from transformers.utils import logging

logging.set_verbosity_error()
print("transformers", transformers.__version__)
sizes = {"vocab_size": 99, "d_model": 32, "encoder_layers": 1, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
         "encoder_ffn_dim": 37, "decoder_ffn_dim": 37, "init_std": 0.3, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
         "decoder_start_token_id": 2}
source = torch.randint(3, 99, (2, 16), generator=torch.Generator().manual_seed(0))


def off(found, expected):
    return round(float((found - expected).norm() / expected.norm()), 3)


@torch.no_grad()
def first_step(model, room, **options):
    """The text, and how far the logits of the first two steps are from those of a whole forward pass without a cache."""
    written = model.generate(source, attention_mask=torch.ones_like(source), max_new_tokens=room, min_new_tokens=room, do_sample=False,
                             output_logits=True, return_dict_in_generate=True, **options)
    whole = model(input_ids=source, decoder_input_ids=written.sequences[:, :-1], use_cache=False).logits
    return written.sequences.tolist(), [off(written.logits[step], whole[:, step]) for step in range(2)]


for build in (
    lambda: BartForConditionalGeneration(BartConfig(**sizes, max_position_embeddings=64, forced_eos_token_id=None)),
    lambda: LEDForConditionalGeneration(LEDConfig(**sizes, max_encoder_position_embeddings=64, max_decoder_position_embeddings=64, attention_window=8)),
):
    torch.manual_seed(0)
    model = build().eval()
    for room in (8, 40):
        text, usual = first_step(model, room)
        other, static = first_step(model, room, cache_implementation="static")
        print(f"{type(model).__name__}, {room} tokens: first logits off by {usual} with the default cache, by {static} with the static one;",
              "same text:", text == other)
        assert max(usual) < 0.001, "it changed"
        if isinstance(model, BartForConditionalGeneration):
            assert max(static) < 0.001 and text == other, "it changed"
        else:
            assert min(static) > 0.1 and text != other, "it changed"
P

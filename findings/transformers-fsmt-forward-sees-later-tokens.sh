#!/usr/bin/env bash
# Expected: FSMTForConditionalGeneration(input_ids=…, decoder_input_ids=…) gives at each place the logits of the next token, from the target up to
#   that place. Its documentation of decoder_attention_mask says that the causal mask will "be used by default".
# Happens (transformers 5.24.0): the causal mask is made only if use_cache is off, and use_cache is on by default: with decoder_input_ids and without labels
#   every place sees the whole target, the token that it is to foretell among them. The mask for pads of the target is left out as well, so
#   that logits change with the padding. Nothing is printed. With labels the model turns use_cache off by itself, so training and
#   eval_loss are right, and generate(), a token at a time, is right; use_cache=False is what was meant. BART is right either way.
# Hurts: whoever scores given translations with an FSMT model (facebook/wmt19 and models converted from fairseq): reranking, noisy channel, filtering of a parallel
#   corpus, distillation of a teacher's logits, a loss of one's own. Probabilities are those of a model that knows the answer in part.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet transformers==5.24.0 torch==2.13.0
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'P'
import torch
import transformers
from torch.nn.functional import pad
from transformers import BartConfig, BartForConditionalGeneration, FSMTConfig, FSMTForConditionalGeneration
from transformers.utils import logging

logging.set_verbosity_error()
print("transformers", transformers.__version__)
sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 37,
         "decoder_ffn_dim": 37, "max_position_embeddings": 64, "init_std": 0.3, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
generator = torch.Generator().manual_seed(0)
source, target = torch.randint(3, 99, (2, 9), generator=generator), torch.randint(3, 99, (2, 6), generator=generator)
other_end = target.clone()
other_end[:, -1] = (other_end[:, -1] + 1) % 90 + 3


@torch.no_grad()
def logits(model, decoder_ids, **options):
    return model.eval()(input_ids=source, decoder_input_ids=decoder_ids, **options).logits[:, :5]


def off(found, expected):
    return round(float((found - expected).norm() / expected.norm()), 4)


torch.manual_seed(0)
fsmt = FSMTForConditionalGeneration(FSMTConfig(langs=["en", "zh"], src_vocab_size=99, tgt_vocab_size=99, decoder_start_token_id=2, **sizes))
bart = BartForConditionalGeneration(BartConfig(vocab_size=99, decoder_start_token_id=2, **sizes))
for model in (bart, fsmt):
    for name, options in (("as it is", {}), ("use_cache=False", {"use_cache": False}), ("with labels", {"labels": target})):
        usual = logits(model, target, **options)
        later = off(logits(model, other_end, **options), usual)
        padded = None
        if "labels" not in options:
            padded = off(logits(model, pad(target, (0, 3), value=1), **options), usual)
        print(f"{type(model).__name__}, {name}: logits change by {later} with the last token of the target, by {padded} with pads after it")
        seen = model is fsmt and not options
        assert (later > 0.1 and padded > 0.1) if seen else (later < 1e-4 and (padded or 0) < 1e-4), "it changed"
P

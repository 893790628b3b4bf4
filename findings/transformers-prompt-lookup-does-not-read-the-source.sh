#!/usr/bin/env bash
# Expected: generate(prompt_lookup_num_tokens=10) proposes pieces of the prompt as the next tokens and keeps those that the model agrees with: meant for
#   summaries, corrections and questions about a text, where the output repeats the input. An encoder-decoder's prompt is its source.
# Happens (transformers 5.24.0): for BART, T5 and other encoder-decoders the proposals are looked for in the decoder's own tokens alone. The source is
#   never read. A text of 20 tokens that copies its source takes 20 passes of the decoder with the option as without; GPT-2 takes 3 for the
#   same text. Nothing is printed, the option is accepted, and what is written is the same. It was written with decoder-only
#   models in mind and is not refused for others: https://github.com/huggingface/transformers/pull/27775
# Hurts: whoever speeds up a Chinese BART or T5 for spelling correction, rewriting or extraction with it: there is no gain where the most was to be
#   expected, and the search for n-grams and the assisted loop, which takes batches of one row only, come on top.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet transformers==5.24.0 torch==2.13.0
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'P'
import torch
import transformers
from transformers import BartConfig, BartForConditionalGeneration, GPT2Config, GPT2LMHeadModel, LogitsProcessorList, T5Config
from transformers import T5ForConditionalGeneration

transformers.logging.set_verbosity_error()
print("transformers", transformers.__version__)
source = torch.arange(11, 31)[None]  # 20 tokens, all unlike


def copies(ids, scores):
    """Scores of a model that copies its source: after token i of it comes token i + 1, before any the first."""
    last = ids[:, -1:]
    following = torch.where((last >= 11) & (last < 30), last + 1, 11)
    return torch.full_like(scores, -50.0).scatter(1, following, 0.0)


def write(model, stack, **options):
    """The 20 tokens that are written and the passes of the stack that writes them."""
    passes = []
    hook = stack.register_forward_hook(lambda *_: passes.append(1))
    ids = model.eval().generate(source, attention_mask=torch.ones_like(source), max_new_tokens=20, min_new_tokens=20, do_sample=False,
                                logits_processor=LogitsProcessorList([copies]), **options)
    hook.remove()
    return ids[0, -20:].tolist(), len(passes)


gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=99, n_embd=32, n_layer=1, n_head=4, bos_token_id=1, eos_token_id=2, pad_token_id=0))
bart = BartForConditionalGeneration(BartConfig(
    vocab_size=99, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4,
    encoder_ffn_dim=37, decoder_ffn_dim=37, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    decoder_start_token_id=2, forced_eos_token_id=None))
t5 = T5ForConditionalGeneration(T5Config(vocab_size=99, d_model=32, d_kv=8, d_ff=37, num_layers=1, num_heads=4, decoder_start_token_id=0))
for model, stack in ((gpt2, gpt2.transformer), (bart, bart.model.decoder), (t5, t5.decoder)):
    text, plain = write(model, stack)
    same, looked_up = write(model, stack, prompt_lookup_num_tokens=10)
    print(f"{type(model).__name__}: {plain} passes, {looked_up} with prompt lookup")
    assert text == same == source[0].tolist() and plain == 20, "it changed"
    assert looked_up < 6 if model is gpt2 else looked_up == 20, "it changed"
P

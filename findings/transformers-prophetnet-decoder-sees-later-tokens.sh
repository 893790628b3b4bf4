#!/usr/bin/env bash
# Expected: the decoder of ProphetNet is causal: the logits at a place depend on the source and on the target up to that place. A batch that is
#   padded further, or generate(use_cache=True), gives what forward() gives.
# Happens (transformers 5.24.0): no. The predicting streams add a bias made from hidden states, and get_predict_relative_pos_embeddings
#   mixes up its axes: rows are laid out as (place, stream, head) and read as (stream, head, place). The bias of a place comes from another
#   place and another head. Logits change with tokens that come later, the one to be predicted among them; those of all
#   places change with the length of the target, by pads too; the cache gives other logits than forward() does. Nothing is
#   printed. Small initial weights hide it.
# Hurts: whoever fine-tunes or evaluates ProphetNet-Zh or another ProphetNet: the loss is that of a model that sees part of the answer,
#   scores depend on what a batch is padded to, and generation, which cannot see ahead, is not what was trained. The
#   permutation (0, 1, 4, 2, 3) in that function mends all three. A neighbour:
#   https://github.com/huggingface/transformers/issues/17455
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet transformers==5.24.0 "torch>=2.11,<2.14"
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'P'
import torch
import transformers
from transformers import BartConfig, BartForConditionalGeneration, ProphetNetConfig, ProphetNetForConditionalGeneration

transformers.logging.set_verbosity_error()
ids = dict(vocab_size=99, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=2, init_std=0.3, dropout=0.0)
prophetnet = ProphetNetConfig(**ids, hidden_size=32, encoder_ffn_dim=64, num_encoder_layers=2, num_encoder_attention_heads=4, decoder_ffn_dim=64,
                              num_decoder_layers=2, num_decoder_attention_heads=4, attention_dropout=0.0, activation_dropout=0.0)
bart = BartConfig(**ids, d_model=32, encoder_ffn_dim=64, encoder_layers=2, encoder_attention_heads=4, decoder_ffn_dim=64,
                  decoder_layers=2, decoder_attention_heads=4, forced_eos_token_id=None)
generator = torch.Generator().manual_seed(0)
source = torch.randint(5, 99, (1, 9), generator=generator)
target = torch.randint(5, 99, (1, 12), generator=generator)
target[0, 0] = 2
padded = torch.nn.functional.pad(target, (0, 4))


@torch.no_grad()
def checked(model_class, config):
    """How much logits change before a token that changes, at all places with four pads at the end, and with the cache."""
    torch.manual_seed(0)
    model = model_class(config).eval()

    def logits(tokens):
        return model(input_ids=source, decoder_input_ids=tokens, use_cache=False).logits[:, : target.shape[1]]

    whole = logits(target)
    ahead = 0.0
    for place in range(1, target.shape[1]):
        other = target.clone()
        other[0, place] = (target[0, place] - 5 + 40) % 94 + 5
        ahead = max(ahead, float((logits(other) - whole)[:, :place].abs().max()))
    longer = float((logits(padded) - whole).abs().max())
    past, steps = None, []
    for place in range(target.shape[1]):
        out = model(input_ids=source, decoder_input_ids=target[:, place : place + 1], past_key_values=past, use_cache=True)
        past = out.past_key_values
        steps.append(out.logits)
    cached = float((torch.cat(steps, 1) - whole).abs().max())
    spread = float(whole.std())
    print(f"{model_class.__name__}: by a token before it {ahead:.6f}, by four pads {longer:.6f},",
          f"with the cache {cached:.6f}; standard deviation of the logits {spread:.3f}")
    return ahead, longer, cached


print("transformers", transformers.__version__, "torch", torch.__version__)
assert all(value > 0.05 for value in checked(ProphetNetForConditionalGeneration, prophetnet)), "it changed"
assert all(value < 1e-3 for value in checked(BartForConditionalGeneration, bart)), "it changed"
P

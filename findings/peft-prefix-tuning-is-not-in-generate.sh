#!/usr/bin/env bash
# Expected: a model with a trained prefix (PrefixTuningConfig, P-tuning v2) writes with the prefix: model.generate() gives at its first step the logits
#   that model(...) gives for the same input.
# Happens (peft 0.21.2, transformers 5.24.0): generate() of BART, T5 and Llama writes without the prefix, what the bare model writes, to the last
#   digit. peft puts the prefix into the arguments of the step as `past_key_values`, and asks whether it is there under that name;
#   transformers has renamed it to `cache` (past_key_values is deprecated until 5.40), and an empty cache of its own wins. forward, and so
#   training, eval_loss and scores, is right. Prompt tuning and P-tuning (v1), which have no cache, are right as well.
# Hurts: whoever tunes a prefix for summaries, rewriting or dialogue: losses fall, and what is written is the untuned model's. One blames
#   the method, its length or the rate.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet peft==0.21.2 transformers==5.24.0 "torch>=2.11,<2.14"
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'P'
import peft
import torch
import transformers
from transformers import BartConfig, BartForConditionalGeneration, LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

transformers.logging.set_verbosity(transformers.logging.CRITICAL)
bart = BartConfig(vocab_size=99, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4,
                  encoder_ffn_dim=37, decoder_ffn_dim=37, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
                  decoder_start_token_id=0)
t5 = T5Config(vocab_size=99, d_model=32, d_kv=8, d_ff=37, num_layers=1, num_heads=4, decoder_start_token_id=0)
llama = LlamaConfig(vocab_size=99, hidden_size=32, intermediate_size=37, num_hidden_layers=1, num_attention_heads=4)
input_ids = torch.randint(3, 99, (1, 7), generator=torch.Generator().manual_seed(0))
source = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}


def first_step(model):
    """The logits of generate()'s first step."""
    return model.generate(**source, max_new_tokens=1, do_sample=False, output_logits=True, return_dict_in_generate=True).logits[0]


@torch.no_grad()
def differences(model_class, config, method):
    """How far generate()'s first step is from forward with the tuned prompt, and from the bare model."""
    torch.manual_seed(0)
    model = model_class(config).eval()
    for weight in model.parameters():
        weight.normal_(std=0.3)
    bare = first_step(model)
    task = "SEQ_2_SEQ_LM" if config.is_encoder_decoder else "CAUSAL_LM"
    tuned = peft.get_peft_model(model, method(task_type=task, num_virtual_tokens=5)).eval()
    for weight in tuned.parameters():
        if weight.requires_grad:
            weight.normal_()  # as if trained
    decoder = {"decoder_input_ids": torch.zeros(1, 1, dtype=torch.long)} if config.is_encoder_decoder else {}
    forward = tuned(**source, **decoder).logits[:, -1]
    written = first_step(tuned)
    found = float((written - forward).abs().max()), float((written - bare).abs().max())
    print(f"{model_class.__name__}, {method.__name__}: generate() is {found[0]:.5f} from forward, {found[1]:.5f} from the bare model")
    return found


print("peft", peft.__version__, "transformers", transformers.__version__)
for model_class, config in ((BartForConditionalGeneration, bart), (T5ForConditionalGeneration, t5), (LlamaForCausalLM, llama)):
    from_forward, from_bare = differences(model_class, config, peft.PrefixTuningConfig)
    assert from_forward > 0.1 and from_bare < 1e-4, "it changed"
    from_forward, from_bare = differences(model_class, config, peft.PromptTuningConfig)
    assert from_forward < 1e-4 and from_bare > 0.1, "it changed"
P

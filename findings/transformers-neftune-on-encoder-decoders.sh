#!/usr/bin/env bash
# Expected: TrainingArguments(neftune_noise_alpha=5) adds noise to the embeddings while a model is trained, whatever the model: the option
#   hooks model.get_input_embeddings(). What is done to that module (a hook, LoRA on "shared") acts on the model.
# Happens (transformers 5.24.0, peft 0.21.2): on BART, mBART, Pegasus, T5 and mT5 that module is `shared`, which nothing calls: encoder and
#   decoder have embeddings of their own that only share its weight. The losses are those without noise, to the last digit, for any
#   alpha. LoRA on "shared" and modules_to_save=["shared"] never get a gradient; both are saved and reloaded as if trained. GPT-2 is
#   right. In version 4, T5 called `shared`; for BART it had been mended there. https://github.com/huggingface/transformers/pull/41821
# Hurts: whoever fine-tunes an encoder-decoder with NEFTune, or trains the rows of new tokens through "shared". The run looks as it should, and
#   "it made no difference" is what one concludes. model.get_encoder().embed_tokens is what is called.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet transformers==5.24.0 accelerate==1.15.0 peft==0.21.2 "torch>=2.11,<2.14"
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'P'
import peft
import torch
import transformers
from transformers import BartConfig, BartForConditionalGeneration, GPT2Config, GPT2LMHeadModel, PegasusConfig, PegasusForConditionalGeneration
from transformers import T5Config, T5ForConditionalGeneration, Trainer, TrainingArguments

transformers.logging.set_verbosity(transformers.logging.CRITICAL)
bart = {"vocab_size": 99, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4, "dropout": 0.0,
        "decoder_attention_heads": 4, "encoder_ffn_dim": 37, "decoder_ffn_dim": 37, "max_position_embeddings": 64,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
t5 = T5Config(vocab_size=99, d_model=32, d_kv=8, d_ff=37, num_layers=1, num_heads=4, dropout_rate=0.0, decoder_start_token_id=0)
gpt2 = GPT2Config(vocab_size=99, n_embd=32, n_layer=1, n_head=4, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
ids = torch.randint(3, 99, (16, 8), generator=torch.Generator().manual_seed(0))
examples = [{"input_ids": row, "labels": row.flip(0)} for row in ids]


def losses(model_class, config, alpha):
    torch.manual_seed(0)
    arguments = TrainingArguments("run", max_steps=3, logging_steps=1, per_device_train_batch_size=8, save_strategy="no", report_to=[],
                                  use_cpu=True, disable_tqdm=True, neftune_noise_alpha=alpha)
    trainer = Trainer(model_class(config), arguments, train_dataset=examples)
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


print("transformers", transformers.__version__, "peft", peft.__version__)
same = {}
for model_class, config in ((BartForConditionalGeneration, BartConfig(**bart)), (T5ForConditionalGeneration, t5),
                            (PegasusForConditionalGeneration, PegasusConfig(**bart)), (GPT2LMHeadModel, gpt2)):
    without, noisy = losses(model_class, config, None), losses(model_class, config, 500)
    same[model_class.__name__] = without == noisy
    print(f"{model_class.__name__}: losses {without} without noise, {noisy} with alpha=500")
assert same == {"BartForConditionalGeneration": True, "T5ForConditionalGeneration": True,
                "PegasusForConditionalGeneration": True, "GPT2LMHeadModel": False}, "it changed"

for options in ({"target_modules": ["shared"]}, {"target_modules": ["q_proj"], "modules_to_save": ["shared"]}):
    model = peft.get_peft_model(BartForConditionalGeneration(BartConfig(**bart)), peft.LoraConfig(task_type="SEQ_2_SEQ_LM", **options))
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    loss = model(input_ids=ids, labels=ids.flip(1)).loss
    if loss.requires_grad:
        loss.backward()
    got = {name.removeprefix("base_model.model.model."): weight.grad is not None for name, weight in trained.items() if "shared" in name}
    print(options, "has a gradient:", got)
    assert got and not any(got.values()), "it changed"
P

#!/usr/bin/env bash
# Expected: TrainingArguments(label_smoothing_factor=0.1) changes the loss of a batch and not what the model is given: with a factor next to
#   zero the loss is that without smoothing. The collator's `model` is said to be useful "to avoid calculating loss twice".
# Happens (transformers 5.24.0): the Trainer takes the labels out of the batch. BART, which makes its decoder's input of the labels, makes it
#   of `input_ids` where there are none: the decoder reads the SOURCE, shifted, and is trained to write the target from it. Where source
#   and target are padded to the same length (padding="max_length", length 128 for both, as many scripts have it) nothing is said;
#   other lengths end in an error. mBART shifts its source likewise, T5 raises an error. A `compute_loss_func` has the same
#   effect. DataCollatorForSeq2Seq(tokenizer, model=model) is what was meant.
# Hurts: whoever fine-tunes a Chinese BART with smoothing for summaries, rewriting or the correction of spelling: losses fall, since the
#   encoder sees the source anyhow, and generate() then feeds the decoder its own words, which it was never trained on.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet transformers==5.24.0 accelerate==1.15.0 "torch>=2.11,<2.14"
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'P'
import torch
import transformers
from transformers import BartConfig, BartForConditionalGeneration, MBartConfig, MBartForConditionalGeneration, T5Config
from transformers import T5ForConditionalGeneration, Trainer, TrainingArguments

transformers.logging.set_verbosity(transformers.logging.CRITICAL)
sizes = {"vocab_size": 99, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4, "init_std": 0.2,
         "decoder_attention_heads": 4, "encoder_ffn_dim": 37, "decoder_ffn_dim": 37, "max_position_embeddings": 64,
         "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
generator = torch.Generator().manual_seed(0)
sources, targets = torch.randint(3, 99, (2, 16, 8), generator=generator)
batch = {"input_ids": sources, "attention_mask": torch.ones_like(sources), "labels": targets}


def loss(model, factor, **more):
    """The Trainer's loss of the batch; a factor of 1e-9 smooths nothing that could be seen."""
    trainer = Trainer(model.eval(), TrainingArguments("run", report_to=[], use_cpu=True, label_smoothing_factor=factor))
    return round(float(trainer.compute_loss(model, {**batch, **more})), 5)


print("transformers", transformers.__version__)
for model_class, config in ((BartForConditionalGeneration, BartConfig(**sizes)), (MBartForConditionalGeneration, MBartConfig(**sizes))):
    torch.manual_seed(0)
    model = model_class(config)
    shift = model.prepare_decoder_input_ids_from_labels
    plain, smoothed = loss(model, 0.0), loss(model, 1e-9)
    print(f"{model_class.__name__}: loss {plain} without smoothing, {smoothed} with a factor of 1e-9")
    if model_class is BartForConditionalGeneration:
        meant, of_source = loss(model, 1e-9, decoder_input_ids=shift(targets)), loss(model, 1e-9, decoder_input_ids=shift(sources))
        print(f"  where decoder_input_ids are the labels, shifted: {meant}; the source, shifted: {of_source}")
        assert meant == plain and smoothed == of_source, "it changed"
    assert abs(smoothed - plain) > 0.001, "it changed"

t5 = T5ForConditionalGeneration(T5Config(vocab_size=99, d_model=32, d_kv=8, d_ff=37, num_layers=1, num_heads=4, decoder_start_token_id=0))
try:
    loss(t5, 1e-9)
    refused = ""
except ValueError as error:
    refused = str(error)
print("T5 refuses:", refused)
assert refused, "it changed"
P

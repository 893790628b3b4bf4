#!/usr/bin/env bash
# Expected: four batches of 2 with gradient_accumulation_steps=4 give the gradient and the logged loss of one batch of 8, where all
#   examples have the same number of labels. The Trainer's documentation calls what may differ otherwise "slightly inaccurate".
# Happens (transformers 5.24.0): for BART, T5 and BERT's heads loss and gradient are 4 times as large, and N times with N steps. Their
#   forward takes **kwargs, so that the Trainer hands `num_items_in_batch` over and does not divide; they drop it and return the batch's
#   mean. GPT-2 and other models whose loss is `self.loss_function(…, **kwargs)` are right.
#   https://github.com/huggingface/transformers/issues/47688
# Hurts: whoever fine-tunes encoder-decoders or BERT with accumulation. max_grad_norm=1 then clips nearly every step, `loss` cannot be
#   compared with `eval_loss`, and SGD, Adafactor and Muon see another learning rate. `model.accepts_loss_kwargs = False` mends it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet transformers==5.24.0 accelerate==1.15.0 torch==2.13.0
cd "$folder"
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - <<'P'
import warnings

warnings.simplefilter("ignore")

import torch
import transformers
from transformers import BartConfig, BartForConditionalGeneration, BertConfig, BertForMaskedLM, BertForSequenceClassification
from transformers import GPT2Config, GPT2LMHeadModel, PrinterCallback, T5Config, T5ForConditionalGeneration
from transformers import Trainer, TrainerCallback, TrainingArguments

transformers.logging.set_verbosity_error()


class Log(TrainerCallback):
    def on_log(self, args, state, control, logs=None, **_):
        self.loss, self.norm = logs.get("loss", getattr(self, "loss", None)), logs.get("grad_norm", getattr(self, "norm", None))


def rows(a_label_each):
    torch.manual_seed(1)
    ids = torch.randint(5, 99, (8, 7))
    labels = torch.arange(8) % 2 if a_label_each else torch.randint(5, 99, (8, 7))
    return [{"input_ids": row, "labels": label} for row, label in zip(ids, labels)]


def first_step(make, batch, steps, accepts=None):
    torch.manual_seed(0)
    model = make()
    if accepts is not None:
        model.accepts_loss_kwargs = accepts
    log = Log()
    args = TrainingArguments(
        "out", per_device_train_batch_size=batch, gradient_accumulation_steps=steps, max_steps=1, learning_rate=0.0, max_grad_norm=1e9,
        logging_steps=1, save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True,
    )
    dataset = rows("SequenceClassification" in type(model).__name__)
    trainer = Trainer(model, args, train_dataset=dataset, callbacks=[log])
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return float(log.loss), float(log.norm)


bert = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 37,
        "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
bart = {"vocab_size": 99, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
        "decoder_attention_heads": 4, "encoder_ffn_dim": 37, "decoder_ffn_dim": 37, "max_position_embeddings": 64, "dropout": 0.0}
t5 = {"vocab_size": 99, "d_model": 32, "d_kv": 8, "d_ff": 37, "num_layers": 1, "num_heads": 4, "dropout_rate": 0.0,
      "decoder_start_token_id": 0}
gpt2 = {"vocab_size": 99, "n_embd": 32, "n_layer": 1, "n_head": 4, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
makers = {
    "BartForConditionalGeneration": lambda: BartForConditionalGeneration(BartConfig(**bart)),
    "T5ForConditionalGeneration": lambda: T5ForConditionalGeneration(T5Config(**t5)),
    "BertForMaskedLM": lambda: BertForMaskedLM(BertConfig(**bert)),
    "BertForSequenceClassification": lambda: BertForSequenceClassification(BertConfig(**bert)),
    "GPT2LMHeadModel": lambda: GPT2LMHeadModel(GPT2Config(**gpt2)),
}
print("transformers", transformers.__version__, "torch", torch.__version__)
found = {}
for name, make in makers.items():
    (loss, norm), (loss_4, norm_4) = first_step(make, 8, 1), first_step(make, 2, 4)
    found[name] = round(norm_4 / norm, 2)
    print(f"{name}: loss {loss:.3f}, accumulated {loss_4:.3f}; gradient's norm {norm:.3f}, accumulated {norm_4:.3f}")
    assert abs(loss_4 / loss - found[name]) < 0.01, "it changed"
mended = first_step(makers["BartForConditionalGeneration"], 2, 4, accepts=False)[1]
unbroken = first_step(makers["BartForConditionalGeneration"], 8, 1)[1]
print("BART with accepts_loss_kwargs = False: gradient's norm", round(mended, 3))
assert abs(mended / unbroken - 1) < 1e-3, "it changed"
assert found == dict.fromkeys(makers, 4.0) | {"GPT2LMHeadModel": 1.0}, "it changed"
P

#!/usr/bin/env bash
# Expected: with TrainingArguments(optim="schedule_free_adamw") a checkpoint holds the weights that evaluate() scores at that step. A
#   Schedule-Free optimizer trains at one point (y) and is meant to be used at another, the average (x); its README wants optimizer.eval() before a
#   checkpoint is written, and the Trainer calls optimizer.train() and optimizer.eval() by itself.
# Happens (transformers 5.24.0, schedulefree 1.4.1): only evaluation calls eval(). A checkpoint at a step without evaluation (no eval set, or
#   eval_steps that is no divisor of save_steps), and what save_model() writes after the last step, are y. At steps that evaluate, the
#   same call writes x, so checkpoints of one run are of two kinds. Both load without a word.
# Hurts: whoever trains with Schedule-Free and saves without evaluating: the averaging, for which there is no decay of the rate, is
#   left out of what is published; and checkpoints that are evaluated later do not give the curve of the run.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet transformers==5.24.0 accelerate==1.15.0 schedulefree==1.4.1 "torch>=2.11,<2.14"
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'P'
from importlib.metadata import version

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

transformers.logging.set_verbosity(transformers.logging.CRITICAL)
transformers.logging.disable_progress_bar()
ids = torch.randint(0, 99, (64, 8), generator=torch.Generator().manual_seed(0))
examples = [{"input_ids": row, "labels": row} for row in ids]
config = LlamaConfig(vocab_size=99, hidden_size=32, intermediate_size=37, num_hidden_layers=1, num_attention_heads=4)


@torch.no_grad()
def loss_of(model):
    return round(float(model.eval()(input_ids=ids, labels=ids).loss), 4)


torch.manual_seed(0)
arguments = TrainingArguments("run", optim="schedule_free_adamw", learning_rate=1e-2, lr_scheduler_type="constant", max_steps=60, save_steps=10,
                              eval_strategy="steps", eval_steps=20, per_device_eval_batch_size=64, report_to=[], use_cpu=True, disable_tqdm=True)
trainer = Trainer(LlamaForCausalLM(config), arguments, train_dataset=examples, eval_dataset=examples)
trainer.remove_callback(transformers.PrinterCallback)
trainer.train()
evaluated = {entry["step"]: round(entry["eval_loss"], 4) for entry in trainer.state.log_history if "eval_loss" in entry}
saved, points = {}, {}
for step in range(10, 61, 10):
    model = LlamaForCausalLM.from_pretrained(f"run/checkpoint-{step}")
    saved[step] = loss_of(model)
    optimizer = torch.load(f"run/checkpoint-{step}/optimizer.pt")
    points[step] = "y" if optimizer["param_groups"][0]["train_mode"] else "x"
print("transformers", transformers.__version__, "schedulefree", version("schedulefree"))
print("evaluate() during the run:", evaluated)
print("loss of the checkpoints:  ", saved)
print("weights in the checkpoints:", points)
assert all(abs(saved[step] - loss) < 0.001 for step, loss in evaluated.items()), "it changed"
assert points == {10: "y", 20: "x", 30: "y", 40: "x", 50: "y", 60: "x"}, "it changed"

# The last step, without evaluation: the weights that are left and published.
torch.manual_seed(0)
arguments = TrainingArguments("last", optim="schedule_free_adamw", learning_rate=1e-2, lr_scheduler_type="constant", max_steps=60,
                              save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True)
trainer = Trainer(LlamaForCausalLM(config), arguments, train_dataset=examples)
trainer.remove_callback(transformers.PrinterCallback)
trainer.train()
trainer.save_model("published")
published = loss_of(LlamaForCausalLM.from_pretrained("published"))
trainer.optimizer.eval()
print("save_model() after train():", published, "and after optimizer.eval():", loss_of(trainer.model))
assert abs(loss_of(trainer.model) - saved[60]) < 0.001 and abs(published - saved[60]) > 0.01, "it changed"
P

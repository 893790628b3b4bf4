#!/usr/bin/env bash
# Expected: a DeepSpeed configuration with "scheduler": {"type": "WarmupDecayLR"} and "auto" values (WarmupLR likewise) gives the Trainer's
#   lr_scheduler_type="linear" ("constant_with_warmup"): the documentation of transformers' DeepSpeed integration pairs them so.
# Happens (deepspeed 0.19.8, transformers 5.24.0): "auto" fills in the rate and the numbers of steps, not `warmup_type`, whose default is
#   "log". The rate at step k of N is log(k) / log(N) of the full one: after a tenth of 1000 warm-up steps two thirds, where the linear
#   schedule has a tenth. The mean rate over the warm-up is 1.7 times as high. "warmup_type": "linear" is what was meant.
# Hurts: whoever moves a run from one card to ZeRO with the usual example file. Warm-up is there to keep early steps small; losses
#   of the two runs part in the first steps, and large models diverge where the linear schedule does not.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 setuptools wheel numpy transformers==5.24.0 accelerate==1.15.0
DS_BUILD_OPS=0 "$folder/venv/bin/pip" install --quiet deepspeed==0.19.8
cd "$folder"
DS_ACCELERATOR=cpu HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - <<'P' 2>warnings.txt || { cat warnings.txt; exit 1; }
import deepspeed
import torch
import transformers
from deepspeed.runtime import lr_schedules
from transformers import TrainingArguments, get_scheduler
from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

WARMUP, STEPS, RATE = 1000, 2000, 1e-4
auto = {
    "train_micro_batch_size_per_gpu": "auto",
    "scheduler": {
        "type": "WarmupDecayLR",
        "params": dict.fromkeys(("warmup_min_lr", "warmup_max_lr", "warmup_num_steps", "total_num_steps"), "auto"),
    },
}
args = TrainingArguments("out", learning_rate=RATE, warmup_steps=WARMUP, lr_scheduler_type="linear", use_cpu=True)
config = HfTrainerDeepSpeedConfig(auto)
config.trainer_config_process(args)
config.trainer_config_finalize(args, transformers.BertForMaskedLM(transformers.BertConfig(
    vocab_size=9, hidden_size=4, num_hidden_layers=1, num_attention_heads=1, intermediate_size=4)), STEPS)
scheduler = config.config["scheduler"]
print("deepspeed", deepspeed.__version__, "transformers", transformers.__version__)
print("filled in:", scheduler)


def rates(make):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=RATE)
    schedule = make(optimizer)
    found = []
    for _ in range(STEPS):
        optimizer.step()
        schedule.step()
        found.append(optimizer.param_groups[0]["lr"] / RATE)
    return found


log = rates(lambda optimizer: getattr(lr_schedules, scheduler["type"])(optimizer, **scheduler["params"]))
asked = rates(lambda optimizer: lr_schedules.WarmupDecayLR(optimizer, **scheduler["params"], warmup_type="linear"))
linear = rates(lambda optimizer: get_scheduler("linear", optimizer, WARMUP, STEPS))
for step in (10, 100, 500, 1000, 1500):
    print(f"step {step:4}: linear {linear[step]:.3f}, DeepSpeed {log[step]:.3f}, with warmup_type=linear {asked[step]:.3f} of the rate")
ratio = sum(log[:WARMUP]) / sum(linear[:WARMUP])
print(f"mean rate over the warm-up: {ratio:.2f} times that of the linear schedule")
assert "warmup_type" not in scheduler["params"], "it changed"
assert abs(log[100] - 0.668) < 0.01 and abs(linear[100] - 0.1) < 0.01 and abs(log[1500] - linear[1500]) < 0.01, "it changed"
assert 1.6 < ratio < 1.8 and max(abs(a - b) for a, b in zip(asked, linear)) < 0.005, "it changed"
P

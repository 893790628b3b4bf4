#!/usr/bin/env bash
# Expected: `transformers.Adafactor` on bfloat16 weights, saved by state_dict() and loaded by load_state_dict(), goes on as if it
#   had not been interrupted. It keeps its second moment in float32 and saves it so.
# Happens (transformers 5.24.0, torch 2.13.0): load_state_dict rounds every state to the weight's dtype, and the next step makes
#   float32 of the rounded numbers again. The second moment is off by up to 0.3% here, and nothing says so.
# Hurts: whoever resumes a run with bfloat16 weights and compares losses. `torch.optim.Optimizer` does it, so any optimizer that
#   keeps float32 beside bfloat16 weights (a float32 copy of them above all) must override load_state_dict.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet transformers==5.24.0 torch==2.13.0
"$folder/venv/bin/python" - <<'P'
import copy
import warnings

warnings.simplefilter("ignore")

import torch
import transformers
from transformers import Adafactor


def make(weight):
    return Adafactor([weight], lr=1.0, scale_parameter=False, relative_step=False, clip_threshold=1e9)


torch.manual_seed(0)
weight = torch.nn.Parameter(torch.zeros(40, 50).bfloat16())
optimizer = make(weight)
weight.grad = torch.randn(40, 50).bfloat16()
optimizer.step()
saved = copy.deepcopy(optimizer.state_dict())
print("saved:", saved["state"][0]["exp_avg_sq_row"].dtype)

resumed_weight = torch.nn.Parameter(weight.detach().clone())
resumed = make(resumed_weight)
resumed.load_state_dict(saved)
loaded = resumed.state[resumed_weight]["exp_avg_sq_row"]
print("loaded:", loaded.dtype)
unbroken = saved["state"][0]["exp_avg_sq_row"]
off = ((loaded.float() - unbroken) / unbroken).abs().max()
print("transformers", transformers.__version__, "torch", torch.__version__, "second moment off by", float(off))
assert loaded.dtype == torch.bfloat16 and 0 < off < 0.01, "it changed"
P

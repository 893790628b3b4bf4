#!/usr/bin/env bash
# Expected: a parameter, and an optimizer whose step is a hook on it (as in PyTorch's tutorial "How to save memory by fusing the
#   optimizer step into the backward pass"), are freed by Python's garbage collector when nothing else refers to them. They are
#   where the hook was registered by `register_hook`.
# Happens (torch 2.13.0): a hook of `register_post_accumulate_grad_hook` that reaches its own parameter, directly or by way of an
#   optimizer, keeps both for ever; gc.collect() does not see the cycle.
# Hurts: whoever trains a second model in the same process. The first one's weights stay on the card.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0
"$folder/venv/bin/python" - <<'P'
import gc
import warnings
import weakref

warnings.simplefilter("ignore")  # numpy is not needed here

import torch


def is_freed(register: str) -> bool:
    parameter = torch.nn.Parameter(torch.zeros(10))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    getattr(parameter, register)(lambda _, optimizer=optimizer: None)  # a real one would step
    seen = weakref.ref(parameter)
    del parameter, optimizer
    gc.collect()
    return seen() is None


found = {name: is_freed(name) for name in ("register_hook", "register_post_accumulate_grad_hook")}
print("torch", torch.__version__, "freed:", found)
assert found == {"register_hook": True, "register_post_accumulate_grad_hook": False}, "it changed"
P

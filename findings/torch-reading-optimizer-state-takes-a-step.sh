#!/usr/bin/env bash
# Expected: torch.distributed.checkpoint.state_dict.get_optimizer_state_dict reads an optimizer and leaves it as it is; so does
#   get_state_dict. A checkpoint of step 0 is that of an optimizer that has taken no step.
# Happens (torch 2.13.0): on an optimizer without state it calls optimizer.step() with gradients of zero and lr 0, and keeps what comes
#   of it: AdamW's `step` is 1, in the file and in the running optimizer. The first real step is then corrected as the second one and
#   comes out a quarter smaller, so that a run that writes a checkpoint before it begins is another run. Step hooks are called too, and
#   Adam with weight_decay (not decoupled) begins with moments of the decay. https://github.com/pytorch/pytorch/issues/164929
# Hurts: whoever saves step 0 (for a baseline, or because a signal came), compares a resumed run with an unbroken one, or wraps a model
#   in code that reads the state at start.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy
"$folder/venv/bin/python" - <<'P'
import torch
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict


def first_step(read, make):
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2, bias=False)
    before = model.weight.detach().clone()
    optimizer = make(model.parameters())
    calls = []
    optimizer.register_step_post_hook(lambda *_: calls.append("step"))
    if read:
        get_optimizer_state_dict(model, optimizer)
    state = {key: value.clone() for key, value in optimizer.state[model.weight].items()}
    called = len(calls)
    model.weight.grad = torch.ones_like(model.weight)
    optimizer.step()
    return state, called, float((model.weight.detach() - before).abs().mean())


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=0.1, weight_decay=0.0)


def adam_l2(parameters):
    return torch.optim.Adam(parameters, lr=0.1, weight_decay=0.1)


print("torch", torch.__version__)
untouched, _, plain = first_step(False, adamw)
state, called, after_reading = first_step(True, adamw)
print("AdamW: state before training", untouched, "| after reading:", {k: v.flatten()[0].item() for k, v in state.items()})
print(f"AdamW: first step moves weights by {plain:.4f}; after reading by {after_reading:.4f}; hooks called by reading: {called}")
moments = first_step(True, adam_l2)[0]["exp_avg"].abs().max().item()
print(f"Adam with weight_decay=0.1: first moment after reading, at most {moments:.4f}")
assert not untouched and state["step"] == 1 and called == 1, "it changed"
assert abs(plain - 0.1) < 1e-4 and abs(after_reading - 0.0744) < 1e-3 and moments > 0.001, "it changed"
P

#!/usr/bin/env bash
# Expected: Optimizer.load_state_dict gives back what state_dict gave: a state of 8-bit codes (uint8) stays uint8. The documentation says
#   that the state of the optimizer is loaded, and names no change of types.
# Happens (torch 2.13.0): every tensor of the state but "step" takes the dtype of its parameter where that is a floating one: codes 0…255
#   become 0.0…255.0 in float32, four times the memory. Without an error or a warning. bfloat16 parameters round codes above 256 as
#   well (int32 codes here). torch.distributed.checkpoint.state_dict.set_optimizer_state_dict ends in the same cast.
# Hurts: authors of optimizers with quantised states, and their users after a resume: an 8-bit optimizer of 27 billion parameters needs
#   160 GB more, or its next step reads floats as codes. bitsandbytes and torchao each work around it (an own load_state_dict, a
#   tensor subclass); a plain uint8 tensor has no protection.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" -W ignore - <<'P'
import torch

print("torch", torch.__version__)


class Coded(torch.optim.Optimizer):
    def __init__(self, params):
        super().__init__(params, {})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                state["step"] = torch.tensor(1.0)
                state["codes"] = torch.arange(parameter.numel()).to(torch.uint8)
                state["places"] = torch.arange(1000, 1000 + parameter.numel(), dtype=torch.int32)


for dtype in (torch.float32, torch.bfloat16):
    weight = torch.nn.Parameter(torch.zeros(4, dtype=dtype))
    first, second = Coded([weight]), Coded([weight])
    first.step()
    second.load_state_dict(first.state_dict())
    before, after = first.state[weight], second.state[weight]
    print(dtype, "codes:", before["codes"].dtype, "->", after["codes"].dtype, "places:", before["places"].tolist(), "->", after["places"].tolist())
    assert before["codes"].dtype is torch.uint8 and after["codes"].dtype is dtype, "it changed"
    if dtype is torch.bfloat16:
        assert after["places"].tolist() == [1000.0, 1000.0, 1000.0, 1004.0], "it changed"
P

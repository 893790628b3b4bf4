#!/usr/bin/env bash
# Expected: LoraModel.add_weighted_adapter(adapters, weights) makes the adapter whose weight update is the weighted sum of theirs: half
#   of an adapter and half of an exact copy of it are the adapter. The documentation calls `cat` and `svd` precise methods.
# Happens (peft 0.21.2): `linear` gives TWICE the adapter, and K equal copies at 1/K give K times. It adds up sqrt(w) * A and
#   sqrt(w) * B apart and multiplies the sums, so that every pair of different adapters comes in too. Of rsLoRA adapters every type,
#   `cat` and `svd` too, gives sqrt(r) times what it should (r is the new rank): the new config keeps use_rslora from the first adapter,
#   and lora_alpha = r is then no scaling of 1. https://github.com/huggingface/peft/pull/3449 (merged after this release)
# Hurts: whoever averages the adapters of several runs, checkpoints or tasks. Nothing is printed; a model with updates 2 to 8 times too
#   large writes fluent nonsense, which reads like a bad idea, not like a bad sum.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet peft==0.21.2 transformers==5.24.0 torch==2.13.0
cd "$folder"
"$folder/venv/bin/python" - <<'P'
import warnings

warnings.simplefilter("ignore")

import peft
import torch


def times_the_adapter(combination_type, rslora, copies, rank=16):
    """How many times the update of an adapter its own average with copies of itself is."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 48))
    settings = {"r": rank, "lora_alpha": rank, "target_modules": ["0"], "use_rslora": rslora, "init_lora_weights": False}
    adapted = peft.get_peft_model(model, peft.LoraConfig(**settings), adapter_name="run0")
    layer = adapted.base_model.model[0]
    names = [f"run{i}" for i in range(copies)]
    for name in names[1:]:
        adapted.add_adapter(name, peft.LoraConfig(**settings))
        for half in (layer.lora_A, layer.lora_B):
            half[name].weight.data.copy_(half["run0"].weight.data)
    adapted.add_weighted_adapter(names, [1 / copies] * copies, "average", combination_type=combination_type)
    own, average = layer.get_delta_weight("run0"), layer.get_delta_weight("average")
    ratio = float((average * own).sum() / own.square().sum())
    torch.testing.assert_close(average, ratio * own, rtol=1e-3, atol=1e-4)  # the same direction
    return round(ratio, 3)


print("peft", peft.__version__, "torch", torch.__version__)
found = {}
for kind in ("cat", "svd", "linear"):
    for rslora in (False, True):
        found[kind, rslora] = [times_the_adapter(kind, rslora, copies) for copies in (1, 2, 4)]
        print(f"{kind:6} rslora={rslora!s:5} rank 16: average of 1, 2, 4 equal adapters = {found[kind, rslora]} times the adapter")
assert found == {
    ("cat", False): [1, 1, 1], ("svd", False): [1, 1, 1], ("linear", False): [1, 2, 4],
    ("cat", True): [4, 5.657, 8], ("svd", True): [4, 4, 4], ("linear", True): [4, 8, 16],
}, "it changed"
P

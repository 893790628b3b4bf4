#!/usr/bin/env bash
# Expected: PeftModel.from_pretrained(base, adapter) is the model that was trained and saved, as it is with init_lora_weights="pissa", whose
#   decomposition of the base weight is computed again when the adapter is loaded.
# Happens (peft 0.21.2): with "pissa_niter_16" and the like, the fast way that the documentation names, it is not. The decomposition is then
#   torch.svd_lowrank, which starts from random numbers, and loading draws others. The residual that stays in the base layer is not
#   the one that was trained with. Here, on a matrix whose singular values fall as 1/sqrt(i), the loaded weight is off by a third of what
#   training did with 16 iterations and by more than all of it with 4; on a random matrix, as of a new layer, by 5 times and 9 times. Nothing
#   is printed, and the saved A and B are right. AdaMSS had the same fault: https://github.com/huggingface/peft/pull/3310
# Hurts: whoever takes the fast initialisation for a large model: scores after loading are lower than those seen in training and differ from
#   one process to the next. What works: torch.manual_seed of one value right before get_peft_model and before from_pretrained,
#   "pissa", or path_initial_model_for_weight_conversion when saving, in the process that trained.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet peft==0.21.2 transformers==5.24.0 "torch>=2.11,<2.14"
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'P'
import peft
import torch
import transformers

SIZE = 768
generator = torch.Generator().manual_seed(0)
left, right = (torch.linalg.qr(torch.randn(SIZE, SIZE, generator=generator))[0] for _ in range(2))
decaying = left @ torch.diag(torch.arange(1, SIZE + 1).float() ** -0.5) @ right.T
random = 0.02 * torch.randn(SIZE, SIZE, generator=generator)
inputs = torch.randn(64, SIZE, generator=generator)
change = 0.01 * torch.randn(SIZE, SIZE, generator=generator)


def base(weight):
    model = torch.nn.Sequential(torch.nn.Linear(SIZE, SIZE, bias=False))
    model[0].weight.data = weight.clone()
    return model


@torch.no_grad()
def whole(model):
    layer = model.base_model.model[0]
    return layer.base_layer.weight + layer.get_delta_weight("default")


def off(weight, init, seed_of_load):
    """How far the loaded weight is from the trained one, as a part of what training did."""
    model = base(weight)
    torch.manual_seed(1)
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["0"], r=16, lora_alpha=16, init_lora_weights=init))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-5)
    for _ in range(200):
        torch.nn.functional.mse_loss(model(inputs), inputs @ (weight + change).T).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained("adapter")
    again = base(weight)
    torch.manual_seed(seed_of_load)  # a new process
    loaded = peft.PeftModel.from_pretrained(again, "adapter")
    for name, value in peft.get_peft_model_state_dict(model).items():
        assert torch.equal(value, peft.get_peft_model_state_dict(loaded)[name])
    return float((whole(loaded) - whole(model)).norm() / (whole(model) - weight).norm())


print("peft", peft.__version__, "torch", torch.__version__, "transformers", transformers.__version__)
for name, weight, at_16 in (("falling singular values", decaying, 0.2), ("random", random, 3.0)):
    found = {init: off(weight, init, 2) for init in (True, "pissa", "pissa_niter_4", "pissa_niter_16")}
    seeded = off(weight, "pissa_niter_16", 1)
    print(f"{name}: off by", {str(init): round(value, 3) for init, value in found.items()}, "of what training did; with the seed of the start", seeded)
    assert found[True] < 1e-3 and found["pissa"] < 1e-3 and seeded < 1e-3, "it changed"
    assert found["pissa_niter_16"] > at_16 and found["pissa_niter_4"] > found["pissa_niter_16"], "it changed"
P

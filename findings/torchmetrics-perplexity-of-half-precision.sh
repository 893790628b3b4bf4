#!/usr/bin/env bash
# Expected: torchmetrics.text.Perplexity takes the float16 or bfloat16 logits of a model that is evaluated in them and gives exp of their mean
#   cross-entropy, whatever the batch size. Its documentation names no type of the logits.
# Happens (torchmetrics 1.9.0): probabilities, their logarithms and the sum over a whole batch are made in the type of the logits.
#   In float16 one token with a probability below 3e-8 (a logit 18 below the best) makes the perplexity of the whole corpus inf.
#   In bfloat16, whose sum has 8 bits, the same tokens have 431.60, 432.68 and 437.03 in batches of 1, 4 and 16 rows here, where 431.72 is
#   right. Nothing is printed. update(logits.float(), target) is what was meant. Lightning's "16-true" and "bf16-true", autocast, and
#   any model in a half type end here.
# Hurts: whoever compares checkpoints, tokenizers or quantised models by perplexity, where one percent is the finding.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torchmetrics==1.9.0 "torch>=2.11,<2.14" numpy==2.4.6
"$folder/venv/bin/python" -W ignore - <<'P'
import torch
import torchmetrics
from torchmetrics.text import Perplexity

generator = torch.Generator().manual_seed(0)
# A model that is sure of most tokens and wrong on some, over a vocabulary as large as that of bert-base-chinese.
target = torch.randint(0, 21128, (16, 100), generator=generator)
logits = 2 * torch.randn(16, 100, 21128, generator=generator)
logits[torch.arange(16)[:, None], torch.arange(100), target] += 12 * torch.rand(16, 100, generator=generator)
logits[0, 7] = 0
logits[0, 7, 5], target[0, 7] = 25, 6  # one surprise


def perplexity(values, rows):
    metric = Perplexity()
    for piece, tokens in zip(values.split(rows), target.split(rows)):
        metric.update(piece, tokens)
    return float(metric.compute())


print("torchmetrics", torchmetrics.__version__, "torch", torch.__version__)
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    values = logits.to(dtype)
    exact = float(torch.nn.functional.cross_entropy(values.float().flatten(0, 1), target.flatten()).exp())
    found = [perplexity(values, rows) for rows in (1, 4, 16)]
    meant = perplexity(values.float(), 4)
    print(f"{dtype}: {found[0]:.2f}, {found[1]:.2f}, {found[2]:.2f} by batches of 1, 4, 16; exact {exact:.2f};",
          f"of logits.float() {meant:.2f}")
    assert abs(meant / exact - 1) < 1e-4, "it changed"
    if dtype == torch.float32:
        assert max(abs(x / exact - 1) for x in found) < 1e-4, "it changed"
    elif dtype == torch.float16:
        assert found == [float("inf")] * 3, "it changed"
    else:
        assert max(abs(x / exact - 1) for x in found) > 0.005 and len({round(x, 2) for x in found}) == 3, "it changed"
P

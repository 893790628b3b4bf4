#!/usr/bin/env bash
# Expected: torch.linalg.vector_norm of float32 on a CPU is right to about 1e-6, as on a GPU, where sums go by a tree; and so are what is made of
#   it: torch.nn.utils.clip_grad_norm_, get_total_norm, torch._foreach_norm.
# Happens (torch 2.13.0): the squares of one tensor are added up in float32 one after another. Of 134M standard normal values, one matrix of a
#   large model, the norm is 1.4% too small; of 1M ones of 0.01 it is 0.04% off, of 134M it is 7% too large. (pytorch issue 169237.)
# Hurts: whoever clips gradients on a CPU, FSDP2 with cpu_offload included: the clipping, the logged norm, and the comparison with a run on
#   GPUs or in other pieces, which differ in the third digit. Norms of pieces of 65,536 values are right, and as fast.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" -W ignore - <<'P'
import torch

print("torch", torch.__version__)


def apart(found: torch.Tensor, x: torch.Tensor) -> float:
    exact = sum(float(piece.double().square().sum()) for piece in x.split(2**22)) ** 0.5
    return float(found) / exact - 1


torch.manual_seed(0)
normal, even = torch.randn(2**27), torch.full((2**27,), 0.01)
found = {
    "134M normal values": apart(torch.linalg.vector_norm(normal), normal),
    "… by get_total_norm": apart(torch.nn.utils.get_total_norm([normal]), normal),
    "… in pieces of 65,536": apart(torch.linalg.vector_norm(torch.stack(torch._foreach_norm(normal.split(65536)))), normal),
    "1M values of 0.01": apart(torch.linalg.vector_norm(even[: 2**20]), even[: 2**20]),
    "134M values of 0.01": apart(torch.linalg.vector_norm(even), even),
}
for name, value in found.items():
    print(f"{name}: {value:+.2e}")
assert found["134M normal values"] < -0.01, "it changed"
assert found["… by get_total_norm"] < -0.01, "it changed"
assert abs(found["… in pieces of 65,536"]) < 1e-5, "pieces are not right either"
assert found["134M values of 0.01"] > 0.05, "it changed"
P

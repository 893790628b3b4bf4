"""AdamW with both moments in 8 bits, by torchao, for whole weights and for shards of them.

torchao's optimizer takes plain tensors here: this process's rows of each weight. What it keeps is
held by `AdamW8bit` as plain tensors too, so that checkpoints hold no class of torchao's, and any
number of processes reads them: a block of values that share a scale lies inside of a row.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from plug.errors import UsageError, install

BLOCK = 256  # values that share a scale, at most; torchao's own
_LEAST_BLOCK = 32
_MOMENTS = {"exp_avg": True, "exp_avg_sq": False}  # whether it is signed
# Elements of a weight that one compiled step takes: few shapes are to be compiled, and what a step
# needs in passing stays small beside the weights.
_ELEMENTS_AT_ONCE = 2**24


def check_torchao(optimizer: str) -> None:
    """Raise a `UsageError` if the optimizer of that name needs torchao and it is not installed."""
    if optimizer == "adamw8bit" and importlib.util.find_spec("torchao") is None:
        raise UsageError(
            f"optimizer=adamw8bit 要用 torchao，但它没有安装。请运行：{install('adamw8bit')}"
        )


class AdamW8bit(Optimizer):
    """torchao's `AdamW8bit` over matrices, whole or sharded by rows.

    The state of a weight (rows, columns): `step`; of each moment its `codes`, uint8 of the weight's
    shape, and its `scale`, float32 (rows, columns / block). They are sharded as the weight is.

    Args:
        params: groups of float32 matrices.
        lr: the rate; every step may have its own.
        betas: of both moments.
        eps: of the denominator.

    Raises:
        UsageError: the columns of a matrix are no multiple of 32.

    Source: Dettmers et al. 2021, arXiv:2110.02861, by torchao.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})
        from torchao.optim import AdamW8bit as Stepper
        from torchao.optim.subclass_8bit import OptimState8bit

        self._moment = OptimState8bit
        self._maps = {
            signed: OptimState8bit.zeros((1, BLOCK), signed, BLOCK).qmap
            for signed in _MOMENTS.values()
        }
        # Pieces of this process's rows, (rows, block) each. They get their values in each step:
        # FSDP2 may move shards before the first one.
        self._pieces: dict[Tensor, list[nn.Parameter]] = {}
        groups = []
        for group in self.param_groups:
            for weight in group["params"]:
                local = _local(weight)
                self._pieces[weight] = [nn.Parameter(x) for x in _parts(local, block_of(weight))]
            pieces = [piece for weight in group["params"] for piece in self._pieces[weight]]
            groups.append({"params": pieces, "weight_decay": group["weight_decay"]})
        self._stepper: Any = Stepper(groups, lr=lr, betas=betas, eps=eps)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Take a step; weights without a gradient stay as they are."""
        assert closure is None
        is_on_cpu = True
        for group, inner in zip(self.param_groups, self._stepper.param_groups, strict=True):
            inner["lr"].fill_(float(group["lr"]))
            for weight in group["params"]:
                if weight.grad is not None:
                    self._place(weight)
                    is_on_cpu &= weight.device.type == "cpu"
        # On a CPU compiling would need a C++ compiler, and a minute.
        with torch.compiler.set_stance("force_eager") if is_on_cpu else nullcontext():
            self._stepper.step()
        self._stepper.state.clear()
        for pieces in self._pieces.values():
            for piece in pieces:
                piece.grad = None

    def _place(self, weight: Tensor) -> None:
        """Give the pieces of a weight their values, gradients and states, to be stepped."""
        assert weight.grad is not None
        block, state = block_of(weight), self.state_of(weight)
        kept = {
            name: (_parts(_local(state[f"{name}_codes"]), block),
                   _parts(_local(state[f"{name}_scale"]), 1, block))
            for name in _MOMENTS
        }  # fmt: skip
        values, gradients = (_parts(_local(x), block) for x in (weight, weight.grad))
        for index, piece in enumerate(self._pieces[weight]):
            piece.data, piece.grad = values[index], gradients[index]
            moments = {
                name: self._moment(
                    codes[index],
                    scales[index].flatten(),
                    self._map(_MOMENTS[name], weight.device),
                    _MOMENTS[name],
                    dtype=torch.float32,
                )
                for name, (codes, scales) in kept.items()
            }
            self._stepper.state[piece] = {"step": state["step"].clone(), **moments}
        state["step"] += 1

    def _map(self, signed: bool, device: torch.device) -> Tensor:
        if self._maps[signed].device != device:
            self._maps[signed] = self._maps[signed].to(device)
        return self._maps[signed]

    def state_of(self, weight: Tensor) -> dict[str, Any]:
        """Return the state of a weight, made if there is none yet."""
        state: dict[str, Any] = self.state[weight]
        if not state:
            state["step"] = torch.tensor(0.0)
            rows, columns = weight.shape
            local = _local(weight)
            for name in _MOMENTS:
                for kind, dtype, size in (
                    ("codes", torch.uint8, 1),
                    ("scale", torch.float32, block_of(weight)),
                ):
                    zeros = local.new_zeros((len(local), local.shape[1] // size), dtype=dtype)
                    state[f"{name}_{kind}"] = _as_sharded(zeros, weight, (rows, columns // size))
        return state

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what `state_dict` gave, in place; codes stay integers, unlike in torch's own.

        Shapes are for the caller to check.
        """
        for group, given in zip(self.param_groups, state_dict["param_groups"], strict=True):
            group["lr"] = given["lr"]
            # Numbers, or names where `torch.distributed.checkpoint` has read them.
            for weight, key in zip(group["params"], given["params"], strict=True):
                for name, value in state_dict["state"].get(key, {}).items():
                    self.state_of(weight)[name].copy_(value)


def block_of(weight: Tensor) -> int:
    """Return how many values of a row share a scale.

    Raises:
        UsageError: the row has no such blocks, or this process has a part of one.
    """
    found, own = math.gcd(weight.shape[1], BLOCK), _local(weight).shape[1]
    if found >= _LEAST_BLOCK and own % found:  # tensor parallelism cuts rows
        raise UsageError(
            f"optimizer=adamw8bit 每 {found} 个数共用一个尺度，而 parallel.tensor 把"
            f" {weight.shape[1]} 列切成了 {own} 列。"
            "请用更小的 parallel.tensor，或 optimizer=adamw。"
        )
    if found < _LEAST_BLOCK:
        raise UsageError(
            f"optimizer=adamw8bit 要求 hidden_size 和 intermediate_size 是 {_LEAST_BLOCK} 的倍数，"
            f"现在有一个是 {weight.shape[1]}。请改大小，或用 optimizer=adamw。"
        )
    return found


def _local(x: Tensor) -> Tensor:
    """This process's part of a sharded tensor; another one as it is."""
    return (x.to_local() if isinstance(x, DTensor) else x).detach()


def _parts(x: Tensor, columns: int, block: int = 1) -> list[Tensor]:
    """Rows of so many values in pieces of `_ELEMENTS_AT_ONCE` elements, or scales of so many."""
    rows = max(1, _ELEMENTS_AT_ONCE // (columns * block))
    return list(x.view(-1, columns).split(rows)) if x.numel() else []


def _as_sharded(local: Tensor, like: Tensor, shape: tuple[int, int]) -> Tensor:
    """Return ``local`` as a tensor of ``shape`` that is sharded as ``like`` is."""
    if not isinstance(like, DTensor):
        return local
    return DTensor.from_local(
        local,
        like.device_mesh,
        like.placements,
        run_check=False,
        shape=torch.Size(shape),
        stride=(shape[1], 1),
    )

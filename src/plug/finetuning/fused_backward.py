"""Steps inside the backward pass: each weight changes as soon as its gradient is whole.

A gradient is freed before the next large one exists, so that all weights of a model may be trained
on a card that holds little more than the weights.

FSDP2 calls the same hooks of a sharded weight when its gradient has been reduced (`foreach_reduce`
of torch), on the stream of the reduction, which the next forward pass waits for. The hooks come in
the same order in all processes.

Source: the idea is that of LOMO (Lv et al. 2023, arXiv:2306.09782) and of PyTorch's tutorial on
`register_post_accumulate_grad_hook`.
"""

from __future__ import annotations

import hashlib
import importlib.util
import math
import os
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from plug.distributed.fully_sharded import as_shard, own_region
from plug.errors import UsageError, install
from plug.finetuning import adafactor, adamw8bit
from plug.finetuning.settings import SHARDABLE, FinetuneSettings


def check_optimizer(settings: FinetuneSettings) -> None:
    """Refuse an optimizer that cannot run here.

    Raises:
        UsageError: torchao is not installed, or several processes have a copy of the weights each,
            which they would change in the backward pass.
    """
    if settings.optimizer == "adamw8bit" and importlib.util.find_spec("torchao") is None:
        raise UsageError(
            f"optimizer=adamw8bit 要用 torchao，但它没有安装。请运行：{install('adamw8bit')}"
        )
    count = int(os.environ.get("WORLD_SIZE", "1"))
    is_shardable = settings.optimizer in SHARDABLE and settings.parallel.sharding != "none"
    if settings.is_fused and count > 1 and not is_shardable:
        instead = "或用 --optimizer adamw8bit"
        if settings.optimizer in SHARDABLE:
            instead = "或去掉 parallel.sharding=none"
        raise UsageError(
            f"optimizer={settings.optimizer} 在反向传播中更新权重，各进程（{count} 个）的梯度"
            f"来不及相加。请只用一个进程，{instead}。"
        )


class FusedOptimizer(Optimizer):
    """An optimizer that steps in `step`, as any other, or after `fuse` in the backward pass.

    After `fuse` the method `step` only counts. Rates are read in the backward pass, so schedulers
    work as usual. Of weights that FSDP2 shards, it steps when their gradient has been reduced.

    Args:
        params: of `torch.optim.Optimizer`.
        defaults: likewise.
        seed: of the rounding, which also depends on the weight and the step alone.
    """

    def __init__(self, params: Iterable[Any], defaults: dict[str, Any], seed: int) -> None:
        super().__init__(params, defaults)
        self.seed = seed
        self._updated: set[int] = set()  # weights that took their step since the last `step()`

    def take_step(self, number: int, group: dict[str, Any], parameter: Tensor) -> None:
        """Change a weight by its gradient.

        Args:
            number: of the weight among all.
            group: of ``param_groups``, which the weight is in.
            parameter: the weight.
        """
        raise NotImplementedError

    def fuse(self) -> None:
        """From now on step in the backward pass, and free each gradient at once.

        Gradients of several backward passes cannot be added up any more.
        """
        for number, group_number, parameter in self._parameters():
            parameter.register_post_accumulate_grad_hook(self._hook(number, group_number))

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Step on every weight that has a gradient: on none, after `fuse`."""
        assert closure is None, "steps are taken once a backward pass"
        for number, group_number, parameter in self._parameters():
            if parameter.grad is not None:
                self._step(number, group_number, parameter)
        self._updated.clear()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As `torch.optim.Optimizer.load_state_dict`, with the state in its own dtype.

        PyTorch makes bfloat16 of what belongs to a bfloat16 weight. A resumed run would not be the
        same as an unbroken one.
        """
        super().load_state_dict(state_dict)
        for group, given in zip(self.param_groups, state_dict["param_groups"], strict=True):
            # Numbers, or names where `torch.distributed.checkpoint` has read them.
            for parameter, key in zip(group["params"], given["params"], strict=True):
                if key in state_dict["state"]:
                    values = state_dict["state"][key]
                    self.state[parameter] = {
                        name: _as_kept(name, value, parameter) for name, value in values.items()
                    }

    def _parameters(self) -> Iterator[tuple[int, int, Tensor]]:
        """Number all parameters, as `state_dict` does; with the numbers of their groups."""
        groups = enumerate(self.param_groups)
        pairs = ((group_number, each) for group_number, group in groups for each in group["params"])
        for number, (group_number, parameter) in enumerate(pairs):
            yield number, group_number, parameter

    def _hook(self, number: int, group_number: int) -> Callable[[Tensor], None]:
        # The parameter keeps its hook alive, by a way that Python's garbage collector does not see.
        # A hook that kept the parameters alive would keep them for ever.
        optimizer = weakref.ref(self)

        def hook(parameter: Tensor) -> None:
            if (mine := optimizer()) is not None:
                mine._step_in_backward(number, group_number, parameter)

        return hook

    def _step_in_backward(self, number: int, group_number: int, parameter: Tensor) -> None:
        if number in self._updated:
            raise RuntimeError(
                "A weight got a second gradient before optimizer.step(): after fuse() there is "
                "one backward pass a step, and no gradient accumulation."
            )
        self._updated.add(number)
        self._step(number, group_number, parameter)
        parameter.grad = None

    def _step(self, number: int, group_number: int, parameter: Tensor) -> None:
        # `load_state_dict` puts new groups there.
        self.take_step(number, self.param_groups[group_number], parameter)


class FusedAdafactor(FusedOptimizer):
    """Adafactor with the learning rate and weight decay of AdamW's scale, and little memory.

    The second moment is a number for each row and column of a matrix; there is no momentum. Weights
    in bfloat16 are rounded stochastically. As in transformers' Adafactor the second moment's decay
    is 1 - step ** decay_rate, and the update of a weight is scaled down where its root mean square
    is over ``clip_threshold``. That is the only clipping: the norm of all gradients is not known
    before the last one exists.

    Args:
        params: of `torch.optim.Optimizer`; vectors and matrices, float32 or bfloat16.
        lr: root mean square of an update.
        weight_decay: a weight shrinks by lr * weight_decay in each step.
        clip_threshold: longest update, in units of lr.
        decay_rate: exponent of the second moment's decay.
        eps: added to squares.
        seed: of the rounding.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        *,
        weight_decay: float = 0.0,
        clip_threshold: float = 1.0,
        decay_rate: float = -0.8,
        eps: float = 1e-30,
        seed: int = 0,
    ) -> None:
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "clip_threshold": clip_threshold,
            "decay_rate": decay_rate,
            "eps": eps,
        }
        super().__init__(params, defaults, seed)

    def take_step(self, number: int, group: dict[str, Any], parameter: Tensor) -> None:
        """As `FusedOptimizer.take_step`."""
        assert parameter.grad is not None
        state = self.state[parameter]
        if not state:
            state.update(adafactor.new_state(parameter))
        state["step"] += 1
        step = adafactor.Step(
            rate=float(group["lr"]),
            weight_decay=group["weight_decay"],
            decay=1 - state["step"] ** group["decay_rate"],
            limit=group["clip_threshold"],
            tiny=group["eps"],
            key=_key(self.seed, state["step"], number),
        )
        adafactor.update(parameter.detach(), parameter.grad, state, step)


class FusedAdamW8bit(FusedOptimizer):
    """AdamW with both moments in 8 bits, over whole weights or over FSDP2's shards of them.

    Weights in bfloat16 are rounded stochastically. Clipping is that of `FusedAdafactor`: the update
    of a weight is scaled down where its root mean square, over all shards, is over
    ``clip_threshold``.

    The state of a matrix (rows, columns): of each moment its `codes`, uint8 of the weight's shape,
    and its `scale`, float32 (rows, columns / block). Of a vector the moments are float32, and there
    is a `master`, the weight in float32, where the weight has less. They are sharded as the weight
    is. `step` is a tensor on the CPU.

    Args:
        params: of `torch.optim.Optimizer`; vectors and matrices, float32 or bfloat16.
        lr: the rate.
        weight_decay: a weight shrinks by lr * weight_decay in each step.
        betas: shares of both moments that are kept.
        eps: of the denominator.
        clip_threshold: root mean square of the longest update, in units of lr.
        seed: of the rounding.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        *,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        clip_threshold: float = 1.0,
        seed: int = 0,
    ) -> None:
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "betas": betas,
            "eps": eps,
            "clip_threshold": clip_threshold,
        }
        super().__init__(params, defaults, seed)
        self._first: dict[int, int] = {}  # by the weight's number; see `_first_element`

    def take_step(self, number: int, group: dict[str, Any], parameter: Tensor) -> None:
        """As `FusedOptimizer.take_step`. Of shards, all processes take it together."""
        assert parameter.grad is not None
        state = self.state[parameter]
        if not state:
            state.update(_adamw_state(parameter))
        state["step"] += 1
        count = int(state["step"])
        if number not in self._first:
            self._first[number] = _first_element(parameter)
        weight, gradient = _local(parameter), _local(parameter.grad).contiguous()
        own = {name: _local(value) for name, value in state.items() if name != "step"}
        step = adamw8bit.Step(
            rate=float(group["lr"]),
            weight_decay=group["weight_decay"],
            betas=group["betas"],
            eps=group["eps"],
            limit=group["clip_threshold"],
            count=count,
            key=_key(self.seed, count, number),
            first=self._first[number],
        )
        total = adamw8bit.sum_of_squares(gradient, own, step)
        if hasattr(parameter, "device_mesh"):
            dist.all_reduce(total, group=parameter.device_mesh.get_group())
        adamw8bit.update(weight, gradient, own, step, total / parameter.numel())


def _adamw_state(weight: Tensor) -> dict[str, Tensor]:
    state = {"step": torch.tensor(0.0)}
    local, block = _local(weight), adamw8bit.block_of(weight)
    for name in adamw8bit.MOMENTS:
        if block:
            scales = (len(local), weight.shape[1] // block)
            zeros = {
                f"{name}_codes": local.new_full(
                    local.shape, adamw8bit.code_of_zero(adamw8bit.MOMENTS[name]), dtype=torch.uint8
                ),
                f"{name}_scale": local.new_zeros(scales, dtype=torch.float32),
            }
        else:
            zeros = {name: local.new_zeros(local.shape, dtype=torch.float32)}
        state |= zeros
    if not block and weight.dtype != torch.float32:
        state["master"] = local.float()
    if hasattr(weight, "device_mesh"):
        state |= {
            name: as_shard(value, weight, (len(weight), *value.shape[1:]))
            for name, value in state.items()
            if name != "step"
        }
    return state


def _as_kept(name: str, value: Any, parameter: Tensor) -> Any:
    """Return a value of a loaded state where it belongs: counts of steps stay where they are."""
    is_moved = torch.is_tensor(value) and name != "step"
    return value.to(parameter.device, copy=True) if is_moved else value


def _local(x: Any) -> Tensor:
    """This process's part of a sharded tensor; another one as it is."""
    part: Tensor = (x.to_local() if hasattr(x, "to_local") else x).detach()
    return part


def _first_element(weight: Any) -> int:
    """Return the number, in the whole weight, of the first element that this process has."""
    if not hasattr(weight, "device_mesh"):
        return 0
    rows, *_ = own_region(weight)
    return int(rows.start) * math.prod(weight.shape[1:])


def _key(*parts: int) -> int:
    """Return 31 bits that depend on all ``parts``."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little") >> 1

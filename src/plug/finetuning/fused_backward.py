"""Steps inside the backward pass: each weight changes as soon as its gradient is whole.

A gradient is freed before the next large one exists, so that all weights of a model may be trained
on a card that holds little more than the weights.

Source: the idea is that of LOMO (Lv et al. 2023, arXiv:2306.09782) and of PyTorch's tutorial on
`register_post_accumulate_grad_hook`.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from plug.errors import UsageError, install
from plug.finetuning.adafactor import Step, new_state, update
from plug.finetuning.settings import FinetuneSettings


def check_optimizer(settings: FinetuneSettings) -> None:
    """Refuse an optimizer that cannot run here.

    Raises:
        UsageError: torchao is not installed, or there are several processes for `adafactor`.
    """
    if settings.optimizer == "adamw8bit" and importlib.util.find_spec("torchao") is None:
        raise UsageError(
            f"optimizer=adamw8bit 要用 torchao，但它没有安装。请运行：{install('adamw8bit')}"
        )
    if settings.optimizer == "adafactor" and (count := int(os.environ.get("WORLD_SIZE", "1"))) > 1:
        raise UsageError(
            f"optimizer=adafactor 在反向传播中更新权重，各进程（{count} 个）的梯度来不及相加。"
            "请只用一个进程，或用 --optimizer adamw8bit。"
        )


class FusedAdafactor(Optimizer):
    """Adafactor with the learning rate and weight decay of AdamW's scale, and little memory.

    The second moment is a number for each row and column of a matrix; there is no momentum. Weights
    in bfloat16 are rounded stochastically. As in transformers' Adafactor the second moment's decay
    is 1 - step ** decay_rate, and the update of a weight is scaled down where its root mean square
    is over ``clip_threshold``. That is the only clipping: the norm of all gradients is not known
    before the last one exists.

    As any optimizer it steps in `step`; after `fuse` it steps in the backward pass, and `step` only
    counts. Rates are read in the backward pass, so schedulers work as usual.

    Args:
        params: of `torch.optim.Optimizer`; vectors and matrices, float32 or bfloat16.
        lr: root mean square of an update.
        weight_decay: a weight shrinks by lr * weight_decay in each step.
        clip_threshold: longest update, in units of lr.
        decay_rate: exponent of the second moment's decay.
        eps: added to squares.
        seed: of the rounding, which also depends on the weight and the step alone.
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
        super().__init__(params, defaults)
        self.seed = seed
        self._updated: set[int] = set()  # weights that took their step since the last `step()`

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
        for number, _, parameter in self._parameters():
            if number in state_dict["state"]:
                self.state[parameter] = {
                    name: value.to(parameter.device, copy=True) if torch.is_tensor(value) else value
                    for name, value in state_dict["state"][number].items()
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
        assert parameter.grad is not None
        group = self.param_groups[group_number]  # `load_state_dict` puts new ones there
        state = self.state[parameter]
        if not state:
            state.update(new_state(parameter))
        state["step"] += 1
        step = Step(
            rate=float(group["lr"]),
            weight_decay=group["weight_decay"],
            decay=1 - state["step"] ** group["decay_rate"],
            limit=group["clip_threshold"],
            tiny=group["eps"],
            key=_key(self.seed, state["step"], number),
        )
        update(parameter.detach(), parameter.grad, state, step)


def _key(*parts: int) -> int:
    """Return 31 bits that depend on all ``parts``."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little") >> 1

"""Adapters of peft on quantised layers: what peft puts around a `QuantizedLinear`.

peft chooses its layer by the class of the one that it wraps, and does not know ours. Others are
registered in each `LoraConfig`, which `adapter_config.json` does not keep; so `teach_peft` answers
for our class wherever peft asks.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from plug.errors import UsageError
from plug.quantization.linear import QuantizedLinear

# "All linear layers", as a pattern for `LoraConfig.target_modules`: those of the encoder's and the
# decoder's layers, not the heads.
TARGET_MODULES = r"(encoder|decoder)\.layers\.\d+\..*\.(q_proj|k_proj|v_proj|out_proj|fc1|fc2)"


@functools.cache
def teach_peft() -> None:
    """Have peft, where it is installed, adapt `QuantizedLinear`s."""
    if importlib.util.find_spec("peft") is None:
        return
    from peft.tuners.lora import LoraModel
    from peft.tuners.tuners_utils import BaseTunerLayer

    choose = LoraModel._create_new_module
    adapted = _adapted_class()

    def choose_or_ours(config: Any, name: str, target: nn.Module, **options: Any) -> nn.Module:
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        if isinstance(base, QuantizedLinear):
            return adapted(target, name, config=config, **options)
        return choose(config, name, target, **options)

    setattr(LoraModel, "_create_new_module", staticmethod(choose_or_ours))  # noqa: B010


def _adapted_class() -> Any:
    """The layer of peft for a base in 8 or 4 bits; made late, since peft imports slowly."""
    from peft.tuners.lora.layer import Linear
    from peft.tuners.lora.variants import DoraLinearVariant

    class OnFloats(DoraLinearVariant):
        """DoRA, which looks at the base layer's weight."""

        @staticmethod
        def init(module: Any, adapter_name: str, **options: Any) -> None:
            with_floats: Any = _WithFloats(module)
            DoraLinearVariant.init(with_floats, adapter_name, **options)
            module.adapter_layer_names = with_floats.adapter_layer_names

        @staticmethod
        def forward(
            module: Any, active_adapter: str, x: Tensor, result: Tensor, **options: Any
        ) -> Tensor:
            with_floats: Any = _WithFloats(module)
            return DoraLinearVariant.forward(with_floats, active_adapter, x, result, **options)

    class AdaptedQuantizedLinear(Linear):
        """A `QuantizedLinear` and its adapters; trained and used, not merged."""

        def _get_in_out_features(self, module: Any) -> tuple[int, int]:
            return module.in_features, module.out_features

        @property
        def lora_variants(self) -> dict[tuple[str, ...], Any]:
            return {(): None, ("use_dora",): OnFloats}

        def merge(self, *_: Any, **__: Any) -> None:
            raise UsageError(
                "量化过的层不能就地合并适配器。请用 plug merge --model 模型 --adapter 适配器"
                " --to 新目录（可加 --bits 8 或 4）。"
            )

    return AdaptedQuantizedLinear


class _WithFloats:
    """An adapted layer whose base layer seems to have its weight in floats."""

    def __init__(self, module: Any) -> None:
        self.module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)

    def get_base_layer(self) -> _Floats:
        return _Floats(self.module.get_base_layer())


class _Floats:
    def __init__(self, layer: QuantizedLinear) -> None:
        self.bias = layer.get_buffer("bias")
        self._layer = layer

    @property
    def weight(self) -> Tensor:
        return self._layer.dequantized(self.bias.dtype)

    def parameters(self) -> Iterator[nn.Parameter]:
        return iter(())

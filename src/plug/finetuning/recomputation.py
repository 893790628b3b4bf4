"""Which layers are computed again in the backward pass, so that less is kept until then."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from plug.model.attention import Attention
from plug.model.layers import DecoderLayer, EncoderLayer, LayerNorm


def layers_of(model: nn.Module) -> list[EncoderLayer | DecoderLayer]:
    """Return the layers of a `Plug` or a model of `plug.hf`, the encoder's first.

    The wrapper of peft may be around it.
    """
    return [part for part in model.modules() if isinstance(part, EncoderLayer | DecoderLayer)]


def recompute_layers(model: nn.Module, count: int) -> None:
    """Have the first ``count`` layers keep nothing but their input; the others keep what they need.

    The last layers are the ones that keep more: their memory is free again when the backward pass
    comes to the first layers, which then need some to compute themselves again.

    Args:
        model: a `Plug`, or of `plug.hf` with or without peft around it; before it is compiled.
        count: layers; more than there are means all.
    """
    for index, layer in enumerate(layers_of(model)):
        switched = cast(Any, layer)
        if hasattr(switched, "recomputed"):  # of `plug.finetuning.adapted_layers`
            switched.recomputed = index < count
        elif hasattr(switched, "gradient_checkpointing"):  # of transformers
            switched.gradient_checkpointing = index < count
            switched._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
        elif is_recomputed(layer):
            if index >= count:
                del switched.forward
        elif index < count:
            switched.forward = partial(_compute_again, layer.forward, _draws(layer))


def _draws(layer: EncoderLayer | DecoderLayer) -> bool:
    """Whether a layer has any dropout."""
    attentions = [part for part in layer.modules() if isinstance(part, Attention)]
    return max(layer.dropout.p, *(each.dropout for each in attentions)) > 0


def _compute_again(forward: Callable[..., Tensor], draws: bool, *inputs: Any) -> Tensor:
    """Compute a plain layer so that it keeps ``inputs`` alone; hooks of FSDP2 stay outside."""
    # To save and restore the generators costs the host time, and without dropout nothing draws.
    found = checkpoint(forward, *inputs, use_reentrant=False, preserve_rng_state=draws)
    return cast(Tensor, found)


def is_recomputed(layer: nn.Module) -> bool:
    """Return whether a layer keeps its input alone."""
    own = getattr(layer.__dict__.get("forward"), "func", None)
    is_plain = own is _compute_again or getattr(layer, "gradient_checkpointing", False)
    return bool(getattr(layer, "recomputed", is_plain))


def recompute_cheap_parts(model: nn.Module) -> None:
    """Have layers that are not recomputed whole compute what norms and GELU gave again.

    Linear layers need those as inputs in the backward pass. To keep them takes two fifths of a
    layer's memory; to compute them again takes a hundredth of its time, since no product is.

    Args:
        model: of `plug.hf`, in one dtype and without autocast, which makes other inputs of them.
    """
    for layer in layers_of(model):
        _CheapParts(cast(Any, layer))


class _CheapParts:
    """Takes the place of a layer's ``forward``; tells autograd how to make what it need not keep.

    Args:
        layer: a `GradientCheckpointingLayer` of transformers.
    """

    def __init__(self, layer: Any) -> None:
        self.layer = layer
        self.forward = layer.forward
        # In the pass at hand, by where the tensor lies; it is held, or another would come there.
        self.made: dict[int, tuple[_Recipe, Tensor]] = {}
        for part in layer.modules():
            if isinstance(part, LayerNorm | nn.GELU):
                part.register_forward_hook(self._note)
        layer.forward = self

    def __call__(self, *args: Any, **options: Any) -> Tensor:
        if not torch.is_grad_enabled() or is_recomputed(self.layer):
            return self.forward(*args, **options)
        with saved_tensors_hooks(self._pack, _unpack):
            try:
                return self.forward(*args, **options)
            finally:
                self.made.clear()

    def _note(self, part: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        if torch.is_grad_enabled() and not is_recomputed(self.layer):
            recipe = _Recipe(partial(part.forward, inputs[0].detach()))
            self.made[output.untyped_storage().data_ptr()] = recipe, output

    def _pack(self, tensor: Tensor) -> Any:
        recipe, _ = self.made.get(tensor.untyped_storage().data_ptr(), (None, None))
        if recipe is None:
            return tensor
        recipe.uses += 1
        return recipe, tensor.shape, tensor.stride(), tensor.storage_offset()


def _unpack(packed: Any) -> Tensor:
    if isinstance(packed, Tensor):
        return packed
    recipe, *view = packed
    return recipe.take().as_strided(*view)


class _Recipe:
    """Makes a tensor again when it is first needed, and drops it when all that need it had it."""

    def __init__(self, make: Callable[[], Tensor]) -> None:
        self.make = make
        self.uses = 0
        self.made: Tensor | None = None

    @torch.no_grad()
    def take(self) -> Tensor:
        """Return the tensor to one of those that need it."""
        made = self.make() if self.made is None else self.made
        self.uses -= 1
        self.made = made if self.uses > 0 else None
        return made

"""Keep hidden states and attention probabilities of a forward pass, for who asks to see them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

from torch import Tensor

from plug.model.attention import Attention
from plug.model.layers import DecoderLayer, EncoderLayer
from plug.model.plug import Decoder, Encoder


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a caller of `forward` asks to see."""

    hidden_states: bool = False
    attentions: bool = False


@dataclass(slots=True)
class Recorded:
    """One tensor for each layer of an encoder or decoder; the lists are empty if not wanted.

    Attributes:
        hidden_states: (batch, positions, hidden), the input of every layer.
        attentions: (batch, heads, positions, keys) of self-attention, before dropout.
        cross_attentions: (batch, heads, tgt, src), of a decoder.
    """

    hidden_states: list[Tensor] = field(default_factory=list)
    attentions: list[Tensor] = field(default_factory=list)
    cross_attentions: list[Tensor] = field(default_factory=list)


@contextmanager
def recording(stack: Encoder | Decoder, wanted: Wanted) -> Iterator[Recorded]:
    """Record while the block runs what ``stack`` computes in this thread.

    Hidden states are the inputs of the layers. The caller appends the output of the final norm,
    which is the last hidden state for transformers too.
    """
    recorded = Recorded()
    if not (wanted.hidden_states or wanted.attentions):  # what follows cannot be compiled
        yield recorded
        return
    thread = threading.get_ident()

    def keep(target: list[Tensor], value: Callable[..., Tensor]) -> Callable[..., None]:
        def hook(module: Any, args: tuple[Any, ...], output: Any) -> None:
            if threading.get_ident() == thread:
                target.append(value(module, args, output))

        return hook

    with ExitStack() as hooks:
        layers = cast("list[EncoderLayer | DecoderLayer]", list(stack.layers))
        if wanted.hidden_states:
            for layer in layers:
                hook = keep(recorded.hidden_states, lambda _, args, __: args[0])
                hooks.callback(layer.register_forward_hook(hook).remove)
        if wanted.attentions:
            for layer in layers:
                if isinstance(layer, DecoderLayer):
                    own = layer.self_attention
                    hook = keep(recorded.cross_attentions, _probabilities)
                    hooks.callback(layer.cross_attention.register_forward_hook(hook).remove)
                else:
                    own = layer.attention
                hook = keep(recorded.attentions, _probabilities)
                hooks.callback(own.register_forward_hook(hook).remove)
        yield recorded


def _probabilities(attention: Attention, args: tuple[Any, ...], _output: Any) -> Tensor:
    hidden_states, key, _value, *masks = args
    return attention.probabilities(hidden_states, key, *masks)

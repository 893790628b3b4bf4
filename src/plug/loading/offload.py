"""A model on a card that is too small for it: some of the encoder's layers are kept elsewhere.

A decoding step reads the decoder and the word table, so these are on the card. The encoder's layers
are read once a window: those that do not fit stay in the file (which the system's page cache keeps
in the host's memory, as long as it is not needed otherwise) or on another card, and come to the
device one after the other, the next while one is at work. The engine's steps know nothing of it.

The hooks of `accelerate` do the same for modules that are called; the engine calls products and
kernels, and decides itself where its caches are.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from plug.checkpoints.weights import Place, TensorSpec, check_finite
from plug.errors import UsageError
from plug.loading.estimate import OVERHEAD_BYTES, STREAMED_AT_ONCE, Room
from plug.loading.memory import free_memory
from plug.loading.transfer import Begun, Part, Transfer
from plug.model.plug import Plug

T = TypeVar("T")
DeviceMap = str | Mapping[str, str]  # "auto", or from a layer's name to where it is kept
LAYERS = "encoder.layers."
IN_FILE = "cpu"


class StreamedLayers(nn.ModuleList):
    """The encoder's layers; iterating gives each with its weights, wherever they are kept.

    Args:
        layers: those kept elsewhere are without memory.
        kept: what each of these needs, by its index.
        device: where they work.
    """

    def __init__(
        self, layers: nn.ModuleList, kept: Mapping[int, KeptLayer], device: torch.device
    ) -> None:
        super().__init__(list(layers))
        self._device = device
        self._kept = kept
        self._originals = list(layers)  # the engine copies modules; weights go into these
        self._transfer = Transfer(device)

    def __iter__(self) -> Iterator[nn.Module]:
        order = sorted(self._kept)
        following = dict(itertools.pairwise(order))
        coming = self._begin(order[0])
        try:
            for index, layer in enumerate(self._modules.values()):
                assert layer is not None
                if index not in self._kept:
                    yield layer
                    continue
                tensors, begun = coming
                self._transfer.finish(begun)
                self._kept[index].check(index, tensors)
                if index in following:
                    coming = self._begin(following[index])
                _put(self._originals[index], tensors)
                del tensors
                yield layer
                _put(self._originals[index], self._kept[index].nothing)
        finally:  # whoever stops early must not leave threads that write into memory given back
            self._transfer.finish(coming[1])

    def each(self, make: Callable[[nn.Module], T]) -> Iterable[T]:
        """``make`` of every layer; once of those that are here, at each pass of the others."""
        return _Made(self, make, self._kept.keys())

    def _begin(self, index: int) -> tuple[dict[str, Tensor], list[Begun]]:
        tensors = self._kept[index].targets(self._device)
        return tensors, self._kept[index].begin(tensors, self._transfer)


class _Made(Iterable[T]):
    def __init__(
        self, layers: StreamedLayers, make: Callable[[nn.Module], T], elsewhere: Iterable[int]
    ) -> None:
        self._layers, self._make = layers, make
        here = ((i, x) for i, x in enumerate(layers._modules.values()) if i not in set(elsewhere))
        self._here = {index: make(layer) for index, layer in here if layer is not None}

    def __iter__(self) -> Iterator[T]:
        for index, layer in enumerate(self._layers):
            yield self._here[index] if index in self._here else self._make(layer)


class KeptLayer:
    """The weights of one layer, in a file or on another device.

    Args:
        places: of each tensor, by its name in the layer.
        specs: what each is to be.
        where: `IN_FILE` or a device.
    """

    def __init__(
        self, places: Mapping[str, Place], specs: Mapping[str, TensorSpec], where: str
    ) -> None:
        self._places, self._specs = places, specs
        self._on_other: dict[str, Tensor] = {}
        if where != IN_FILE:
            other = torch.device(where)
            self._on_other = self.targets(other)
            with Transfer(other) as transfer:
                transfer.fill(Part(places[name], x) for name, x in self._on_other.items())
        self.nothing = self.targets(torch.device("meta"))
        self._is_checked = False

    def targets(self, device: torch.device) -> dict[str, Tensor]:
        """Tensors without values."""
        return {
            name: torch.empty(spec.shape, dtype=spec.dtype, device=device)
            for name, spec in self._specs.items()
        }

    def check(self, index: int, tensors: Mapping[str, Tensor]) -> None:
        """Raise a `PlugError` if values are NaN or infinite; looks the first time alone."""
        if not self._is_checked:
            named = ((f"{LAYERS}{index}.{name}", x) for name, x in tensors.items())
            check_finite(next(iter(self._places.values())).file, named)
            self._is_checked = True

    def begin(self, targets: Mapping[str, Tensor], transfer: Transfer) -> list[Begun]:
        """Have the values come into ``targets``; what to give to `Transfer.finish`."""
        if not self._on_other:
            return transfer.begin(Part(self._places[name], x) for name, x in targets.items())
        for name, target in targets.items():
            target.copy_(self._on_other[name], non_blocking=True)
        return []


def _put(layer: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Into the dictionaries that the layer's modules and the engine's copies of them share."""
    for name, tensor in tensors.items():
        path, _, own = name.rpartition(".")
        module = layer.get_submodule(path)
        if own in module._buffers:
            module._buffers[own] = tensor
            module.__dict__["_product"] = None  # that a `QuantizedLinear` keeps of its weight
        else:
            module._parameters[own] = nn.Parameter(tensor, requires_grad=False)


def choose(
    device_map: DeviceMap | None,
    model: Plug,
    specs: Mapping[str, TensorSpec],
    device: torch.device,
    room: Room | None,
) -> dict[int, str]:
    """Where the encoder's layers are kept that are not on ``device``, by index.

    "auto" takes the first layers as far as the device has memory beside all else, then other
    cards', then the file.

    Raises:
        UsageError: ``device_map`` makes no sense.
    """
    layers = model.config.num_hidden_layers
    if device_map is None:
        return {}
    if not isinstance(device_map, str):
        return _checked(device_map, layers)
    if device_map != "auto":
        raise UsageError(f"device_map={device_map!r} 应是 auto，或由层的名字到设备的对照表。")
    free = free_memory(device)
    if free is None:
        return {}
    size = layer_bytes(specs)
    weights = sum(spec.num_bytes for spec in specs.values())
    value = specs["embeddings.word_embeddings.weight"].dtype.itemsize
    need = (room or Room()).need(model.config, weights, value).with_overhead().total
    if need <= free:
        return {}
    here = (free - (need - layers * size) - STREAMED_AT_ONCE * size) // size
    left = list(range(max(0, here), layers))
    kept: dict[int, str] = {}
    for number in range(torch.cuda.device_count()):
        other = torch.device("cuda", number)
        if number != (device.index or 0):
            fits = max(0, (free_memory(other) or 0) - OVERHEAD_BYTES) // size
            kept |= dict.fromkeys(left[:fits], str(other))
            left = left[fits:]
    return kept | dict.fromkeys(left, IN_FILE)


def layer_bytes(specs: Mapping[str, TensorSpec]) -> int:
    """Of one of the encoder's layers; they are alike."""
    return sum(spec.num_bytes for name, spec in specs.items() if name.startswith(f"{LAYERS}0."))


def _checked(device_map: Mapping[str, str], layers: int) -> dict[int, str]:
    kept = {}
    names = {f"{LAYERS}{index}": index for index in range(layers)}
    for name, where in device_map.items():
        if name not in names:
            raise UsageError(
                f"device_map 里的 {name!r} 不是编码器的层（{LAYERS}0 到 {LAYERS}{layers - 1}）。"
                "其余部分每一步都要用，总在主设备上。"
            )
        try:
            torch.device(where)
        except RuntimeError:
            raise UsageError(
                f"device_map 里的 {where!r} 不是设备。可用：cpu、cuda:1 等。"
            ) from None
        kept[names[name]] = where
    return kept


def keep_elsewhere(
    model: Plug,
    kept: Mapping[int, str],
    places: Mapping[str, Place],
    specs: Mapping[str, TensorSpec],
    device: torch.device,
) -> None:
    """Have the layers of ``kept`` come from where they are when they are needed."""

    def own(table: Mapping[str, T], index: int) -> dict[str, T]:
        prefix = f"{LAYERS}{index}."
        return {n.removeprefix(prefix): x for n, x in table.items() if n.startswith(prefix)}

    layers = {
        index: KeptLayer(own(places, index), own(specs, index), where)
        for index, where in kept.items()
    }
    model.encoder.layers = StreamedLayers(model.encoder.layers, layers, device)


def is_elsewhere(name: str, kept: Iterable[int]) -> bool:
    """Whether a tensor belongs to one of the layers ``kept``."""
    return name.startswith(tuple(f"{LAYERS}{index}." for index in kept))

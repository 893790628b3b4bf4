"""`EncoderCache`: the encoded form of recent sources, for when they are read again.

A prompt that is written again with another seed, or several times, is then encoded once. The cache
is bounded in bytes and drops the least recently used source first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

from plug.model.layers import KeyValue

Encode = Callable[[Sequence[Sequence[int]]], list[list[KeyValue]]]


class EncoderCache:
    """Cross-attention keys and values, found by the ids of their source.

    Args:
        limit: bytes kept at most; a source that alone needs more is not kept; 0 keeps none.

    Attributes:
        num_bytes: kept now.
    """

    def __init__(self, limit: int) -> None:
        self.num_bytes = 0
        self._limit = limit
        self._kept: OrderedDict[tuple[int, ...], list[KeyValue]] = OrderedDict()

    def encode(self, sources: Sequence[Sequence[int]], encode: Encode) -> list[list[KeyValue]]:
        """Return what ``encode(sources)`` would; it is called once, for distinct sources not kept.

        The tensors may belong to the cache: do not write to them.
        """
        if not self._limit:
            return encode(sources)
        keys = [tuple(source) for source in sources]
        distinct = list(dict.fromkeys(keys))
        found = {key: self._kept[key] for key in distinct if key in self._kept}
        missing = [key for key in distinct if key not in found]
        found.update(zip(missing, encode(missing), strict=True))
        for key in distinct:
            self._keep(key, found[key])
        return [found[key] for key in keys]

    def _keep(self, key: tuple[int, ...], key_values: list[KeyValue]) -> None:
        if key in self._kept:
            self._kept.move_to_end(key)
            return
        size = _num_bytes(key_values)
        if size > self._limit:
            return
        while self.num_bytes + size > self._limit:
            _, dropped = self._kept.popitem(last=False)
            self.num_bytes -= _num_bytes(dropped)
        # A copy: a view would hold the memory of the whole batch in which it was encoded.
        self._kept[key] = [(keys.clone(), values.clone()) for keys, values in key_values]
        self.num_bytes += size


def _num_bytes(key_values: list[KeyValue]) -> int:
    return sum(states.nbytes for pair in key_values for states in pair)

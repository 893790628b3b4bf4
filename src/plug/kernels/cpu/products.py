"""`CpuProduct`: a weight in 32, 16, 8 or 4 bits that multiplies float32 rows on a CPU."""

from __future__ import annotations

from ctypes import byref

import torch
from torch import Tensor, nn

from plug.kernels.cpu.build import LowRank, Product, library


class CpuProduct:
    """``x @ weight.T + bias`` for x (…, in), by `products.h`.

    A row's result depends on that row alone, to the last bit. With 8 and 4 bits the inputs are
    rounded to 8 bits, by the row's largest value and by that of each group of 128.

    Args:
        weight: (out, in) in float32, bfloat16 or int8, or `pack_nibbles` of one; contiguous. Of
            floats a copy is kept, in another order.
        scale: None, float32 (out,), or bfloat16 (out, in / 128).
        center: None, or bfloat16 as the scale of 4 bits.
        bias: float32 (out,) or None.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        scale: Tensor | None = None,
        center: Tensor | None = None,
    ) -> None:
        bits = {torch.float32: 32, torch.bfloat16: 16, torch.int8: 8, torch.uint8: 4}[weight.dtype]
        self.out, self.inputs = len(weight), weight.shape[1] * (2 if bits == 4 else 1)
        if weight.is_floating_point():
            weight = _side_by_side(weight, 2 if bits == 16 else 1, 32 if bits == 16 else 1)
        self._kept = [
            None if each is None else each.detach().contiguous()
            for each in (weight, scale, center, bias)
        ]
        addresses = (None if each is None else each.data_ptr() for each in self._kept)
        self.product = Product(bits, *addresses, self.out, self.inputs)
        found = library()
        assert found is not None, "ask `library` first"
        self._multiply = found.plug_multiply

    def __call__(self, x: Tensor, low_rank: LowRank | None = None) -> Tensor:
        """The product with ``x``; ``low_rank`` is added to all rows in the same call."""
        flat = x.reshape(-1, self.inputs).contiguous()
        y = torch.empty(len(flat), self.out)
        self._multiply(
            torch.get_num_threads(),
            byref(self.product),
            flat.data_ptr(),
            y.data_ptr(),
            len(flat),
            None if low_rank is None else byref(low_rank),
        )
        return y.view(*x.shape[:-1], self.out)


def _side_by_side(weight: Tensor, inputs: int, multiple: int) -> Tensor:
    """Put 16 outputs side by side: (out / 16, in / ``inputs``, 16, ``inputs``).

    Zeros are added, so that there are a ``multiple`` of inputs.
    """
    rows, columns = weight.shape
    padded = nn.functional.pad(weight.detach(), (0, -columns % multiple, 0, -rows % 16))
    return padded.view(-(-rows // 16), 16, -1, inputs).transpose(1, 2).contiguous()


def in_blocks(b: Tensor) -> Tensor:
    """(out / 64, rank, 64) of an adapter's ``b`` (out, rank), zeros added, for `adapters.h`."""
    padded = nn.functional.pad(b.detach(), (0, 0, 0, -len(b) % 64))
    return padded.view(-1, 64, b.shape[1]).transpose(1, 2).contiguous()

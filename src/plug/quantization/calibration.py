"""4 bits with less loss: codes and scales chosen for the inputs that a layer really gets.

A layer's weights are rounded one input after another, and the error of each is made up for by the
inputs that are still to come, as the second moments of the layer's inputs tell (GPTQ). Layers are
treated in the order in which a text passes them, each with the inputs that the layers before it,
rounded already, give. The format stays that of `scheme.py`.

Source: Frantar et al. 2022, arXiv:2210.17323.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from plug.errors import UsageError
from plug.model.layers import DecoderLayer, EncoderLayer
from plug.model.plug import Plug
from plug.quantization.scheme import GROUP_SIZE, Scheme, pack_nibbles

# Added to the moments' diagonal, as a share of its mean: inputs that hardly vary must not take a
# large correction.
DAMPING = 0.01
# Of a group's least and its largest weight: how far the grid of `fit_scale` reaches to each side.
REACHES = (1.0, 0.93, 0.86, 0.79, 0.72)
LEAST_EXAMPLES = 8
_BATCH_SIZE = 16


class Example(NamedTuple):
    """Token ids of one text to calibrate with, without special ones; all of like lengths."""

    source: list[int]
    target: list[int]


def calibrated(
    model: Plug,
    examples: Sequence[Example],
    *,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Quantise the layers of ``model`` to 4 bits; its weights become what the integers stand for.

    Args:
        model: on any device, with a decoder; changed in place.
        examples: a hundred or more texts of the kind that will be written.
        progress: called with layers done and layers in all.

    Yields:
        The name of each linear layer and the tensors that stand for its weight, on the CPU.

    Raises:
        UsageError: an encoder alone, or too few examples.
    """
    if model.decoder is None:
        raise UsageError("这个模型只有编码器，不能用文本校准。请去掉 --calibration。")
    if len(examples) < LEAST_EXAMPLES:
        raise UsageError(
            f"校准的文本只有 {len(examples)} 段够长，至少要 {LEAST_EXAMPLES} 段，最好一百段以上。"
            "请给更多的文本。"
        )
    config, device = model.config, model.embeddings.word_embeddings.weight.device
    start, end = config.decoder_start_token_id, config.eos_token_id

    def embedded(rows: list[list[int]]) -> list[Tensor]:
        parts = torch.tensor(rows, device=device).split(_BATCH_SIZE)
        return [model.embeddings(part) for part in parts]

    with torch.inference_mode():
        read = embedded([[start, *each.source, end] for each in examples])
        for index, layer in enumerate(model.encoder.layers):
            assert isinstance(layer, EncoderLayer)
            yield from _quantize_layer(
                f"encoder.layers.{index}", layer, layer, [(x, None) for x in read]
            )
            read = [layer(x, None) for x in read]
            progress(index + 1, config.num_hidden_layers + config.num_decoder_layers)
        for _ in range(model.encoder.final_norm_passes):
            read = [model.encoder.final_norm(x) for x in read]
        written = embedded([[start, *each.target[:-1]] for each in examples])
        for index, layer in enumerate(model.decoder.layers):
            assert isinstance(layer, DecoderLayer)
            run = _Decoder(layer)
            pairs = list(zip(written, read, strict=True))
            yield from _quantize_layer(f"decoder.layers.{index}", layer, run, pairs)
            written = [run(own, source) for own, source in pairs]
            progress(
                config.num_hidden_layers + index + 1,
                config.num_hidden_layers + config.num_decoder_layers,
            )


class _Decoder:
    """A decoder layer over whole texts: (batch, tgt, hidden), (batch, src, hidden) to the first."""

    def __init__(self, layer: DecoderLayer) -> None:
        self.layer = layer

    def __call__(self, written: Tensor, read: Tensor) -> Tensor:
        layer = self.layer
        return layer(written, layer.cross_attention.project_key_value(read), None)


def _quantize_layer(
    name: str,
    layer: nn.Module,
    run: Callable[..., Tensor],
    inputs: Sequence[tuple[Tensor | None, ...]],
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    scheme = Scheme.of(4)
    linears = {
        own: module for own, module in layer.named_modules() if isinstance(module, nn.Linear)
    }
    with _moments(list(linears.values())) as moments:
        for each in inputs:
            run(*each)
    for own, linear in linears.items():
        tensors = quantize_with_moments(linear.weight, moments[linear])
        linear.weight.copy_(scheme.dequantize(tensors, linear.weight.dtype))
        yield f"{name}.{own}", {key: value.cpu() for key, value in tensors.items()}


@contextmanager
def _moments(linears: Sequence[nn.Linear]) -> Iterator[dict[nn.Module, Tensor]]:
    """The sum of x xᵀ over the inputs x of each layer, (in, in) float32, of what runs inside."""
    found: dict[nn.Module, Tensor] = {}

    def add(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0].flatten(0, -2).float()
        found[module] = found.get(module, 0) + x.T @ x

    handles = [linear.register_forward_pre_hook(add) for linear in linears]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def quantize_with_moments(weight: Tensor, moments: Tensor) -> dict[str, Tensor]:
    """Quantise a weight to 4 bits for inputs with these second moments.

    Args:
        weight: (out, in).
        moments: (in, in), the sum of x xᵀ over inputs x; symmetric.

    Returns:
        As `Scheme.quantize` with 4 bits.
    """
    left = weight.float().clone()
    inputs = left.shape[1]
    moments = moments.float().clone()
    diagonal = moments.diagonal()
    diagonal += DAMPING * diagonal.mean().clamp(min=1e-12)
    inverse = torch.linalg.cholesky(
        torch.cholesky_inverse(torch.linalg.cholesky(moments)), upper=True
    )
    weights = inverse.diagonal().reciprocal().square()  # what an error at each input costs
    codes = torch.empty_like(left)
    scales, centers = [], []
    for first in range(0, inputs, GROUP_SIZE):
        group = slice(first, first + GROUP_SIZE)
        scale, center = fit_scale(left[:, group], weights[group])
        scales.append(scale)
        centers.append(center)
        own = inverse[group, group]
        errors = torch.empty_like(left[:, group])
        for column in range(GROUP_SIZE):
            values = left[:, first + column]
            code = ((values - center) / scale.where(scale > 0, 1) + 8).round_().clamp_(0, 15)
            codes[:, first + column] = code
            error = (values - ((code - 8) * scale + center)) / own[column, column]
            errors[:, column] = error
            left[:, first + column : first + GROUP_SIZE] -= error[:, None] * own[column, column:]
        left[:, first + GROUP_SIZE :] -= errors @ inverse[group, first + GROUP_SIZE :]
    return {
        "weight": pack_nibbles(codes.to(torch.uint8)),
        "scale": torch.stack(scales, 1).bfloat16(),
        "center": torch.stack(centers, 1).bfloat16(),
    }


def fit_scale(group: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and centre of each row of a group (out, 128), the best of a grid, each (out,) float32.

    Args:
        group: the weights.
        weights: (128,), what a squared error at each input costs.
    """
    least, most = group.amin(1), group.amax(1)
    best = torch.full_like(least, float("inf"))
    found = torch.zeros_like(least), torch.zeros_like(least)
    for low in REACHES:
        for high in REACHES:
            start, end = least * low, most * high
            scale = ((end - start) / 15).bfloat16().float()
            center = ((start + end + scale) / 2).bfloat16().float()
            code = (group - center[:, None]) / scale.where(scale > 0, 1)[:, None] + 8
            code.round_().clamp_(0, 15)
            error = ((code - 8) * scale[:, None] + center[:, None]).sub_(group).square_() @ weights
            better = error < best
            best = torch.minimum(best, error)
            found = tuple(  # type: ignore[assignment]
                torch.where(better, new, old)
                for new, old in zip((scale, center), found, strict=True)
            )
    return found

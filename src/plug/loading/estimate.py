"""What a model takes in memory, to write or to be trained. By formula: no device is asked.

Bytes are those of tensors at the peak, as `torch.cuda.max_memory_allocated` counts them. A card
needs `OVERHEAD_BYTES` more. `docs/devices.md` has predictions beside measurements.

Letters in the formulae: h hidden, f intermediate, V vocabulary, D decoder layers.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace

from plug.model.accounting import Part, cache_bytes, layer, parts
from plug.model.configuration import PlugConfig
from plug.quantization.scheme import Scheme

TOKENS_AT_ONCE = 16384  # of sources, encoded together at most
STREAMED_AT_ONCE = 3  # layers that come when needed: the last one, the one at work, the next
OVERHEAD_BYTES = 512 * 2**20  # libraries' own memory, CUDA graphs, what no allocator can use


def weight_bytes(
    config: PlugConfig, bits: int, bytes_per_value: int = 2, *, num_labels: int | None = None
) -> int:
    """Return the bytes of a model's weights, as a directory and a device hold them.

    Args:
        config: its shape.
        bits: 32 or 16: of all weights; 8 or 4: of the linear layers of encoder and decoder, as
            `plug quantize` writes them. The rest, the word table included, stays as it was.
        bytes_per_value: of that rest.
        num_labels: as in `parts`.

    Raises:
        UsageError: 4 bits, and a layer cannot be parted into groups (`Scheme.tensors`).
    """
    by_part = parts(config, num_labels)
    parameters = sum(by_part.values(), Part()).parameters
    if bits >= 16:
        return parameters * bits // 8
    scheme = Scheme.of(bits)
    matrices = Counter(by_part["encoder"].matrices + by_part["decoder"].matrices)
    quantized = sum(
        count * sum(math.prod(shape) * dtype.itemsize for dtype, shape in tensors)
        for (rows, columns), count in matrices.items()
        for tensors in [scheme.tensors(rows, columns).values()]
    )
    plain = parameters - sum(rows * columns * count for (rows, columns), count in matrices.items())
    return quantized + plain * bytes_per_value


@dataclass(frozen=True, slots=True)
class Need:
    """Bytes on a device at the peak, by what they are for.

    Attributes:
        weights: as they are kept there.
        caches: keys and values, while writing.
        workspace: what comes and goes: the inside of a layer, logits, unpacked weights.
        gradients: that are there at the peak.
        optimizer: its states.
        activations: what the backward pass will read.
    """

    weights: int
    caches: int = 0
    workspace: int = 0
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0

    @property
    def total(self) -> int:
        return sum(self.to_dict().values())

    def with_overhead(self) -> Need:
        """Return what a card must have free for it: `OVERHEAD_BYTES` more in the workspace."""
        return replace(self, workspace=self.workspace + OVERHEAD_BYTES)

    def to_dict(self) -> dict[str, int]:
        return {name: getattr(self, name) for name in self.__slots__}


# --- writing --------------------------------------------------------------------------------------


def generation_need(
    config: PlugConfig,
    *,
    weights: int,
    batch_size: int,
    source_length: int,
    capacity: int,
    bytes_per_value: int = 2,
    bits: int = 16,
) -> Need:
    """Return what writing takes.

    Sources are encoded beside the caches: first an encoder layer's inside, (4 h + f) values a token
    of the `TOKENS_AT_ONCE` at most, (6 h + 2 f) in float32; then their encoded form, h values a
    token, and cross-attention keys and values that are not yet in the caches. Besides: four copies
    of the logits in float32; of a quantised model the word table in 8 bits, and with 4 bits one
    weight in FP8, h f. (The first call has no caches yet while it encodes, and may take less.)

    Args:
        config: the shape.
        weights: their bytes, as they are kept.
        batch_size: texts written together.
        source_length: tokens of a source.
        capacity: tokens of a window.
        bytes_per_value: of activations and caches.
        bits: of the layers' weights.
    """
    hidden, intermediate = config.hidden_size, config.intermediate_size
    token = cache_bytes(config, bytes_per_value)
    sources = batch_size * source_length
    together = min(sources, max(TOKENS_AT_ONCE, source_length))
    is_half = bytes_per_value == 2
    values = 4 * hidden + intermediate if is_half else 6 * hidden + 2 * intermediate
    inside = values * together * bytes_per_value
    earlier = (sources - together) * token
    projected = sources * token + hidden * together * bytes_per_value
    logits = 4 * batch_size * config.vocab_size * 4
    quantized = 0
    if bits < 16:
        quantized = config.vocab_size * hidden + (hidden * intermediate if bits == 4 else 0)
    return Need(
        weights=weights,
        caches=batch_size * (source_length + capacity) * token,
        workspace=max(earlier + inside, projected) + logits + quantized,
    )


def cpu_weight_bytes(config: PlugConfig, bits: int, *, writes: bool, kernels: bool = True) -> int:
    """Return the bytes of a model's weights in the memory of a CPU.

    Integers stay as their file has them; all else is in float32. To write, `kernels/cpu` keeps the
    matrices of a plain model a second time, in the bits they were saved in, and of a quantised one
    the word table in 8 bits. Without it PyTorch keeps matrices a second time: the decoder's in
    their own bits (16 at most), those of a quantised encoder in float16.

    Args:
        config: the shape.
        bits: as saved.
        writes: whether the model is to write.
        kernels: whether `kernels/cpu` can be built.

    Raises:
        UsageError: as `weight_bytes`.
    """
    found = weight_bytes(config, 32) if bits >= 16 else weight_bytes(config, bits, 4)
    if not writes:
        return found
    by_part = parts(config)
    encoder, decoder = (by_part[name].matrix_parameters for name in ("encoder", "decoder"))
    words = config.vocab_size * config.hidden_size
    if bits < 16:
        return found + words + (0 if kernels else 2 * encoder + decoder * bits // 8)
    return found + ((encoder + decoder + words) * bits // 8 if kernels else 2 * (decoder + words))


def cpu_generation_need(
    config: PlugConfig,
    *,
    weights: int,
    batch_size: int,
    source_length: int,
    capacity: int,
) -> Need:
    """Return what writing takes on a CPU, which reads sources one by one, in float32.

    The workspace is an encoder layer's inside, (8 h + 3 f) values a token of a source with the
    rounded inputs of products; keys and values of sources that are not yet in the caches; four
    copies of the logits.

    Args:
        config: the shape.
        weights: `cpu_weight_bytes`.
        batch_size: texts written together.
        source_length: tokens of a source.
        capacity: tokens of a window.
    """
    token = cache_bytes(config, 4)
    inside = (8 * config.hidden_size + 3 * config.intermediate_size) * source_length * 4
    logits = 4 * batch_size * config.vocab_size * 4
    return Need(
        weights=weights,
        caches=batch_size * (source_length + capacity) * token,
        workspace=inside + batch_size * source_length * token + logits,
    )


def resident_share(config: PlugConfig) -> float:
    """Return the part of the parameters that a device map keeps on the device at least.

    All but the encoder's layers, and `STREAMED_AT_ONCE` of those.
    """
    by_part = {name: part.parameters for name, part in parts(config).items()}
    streamed = layer(config, attentions=1).parameters * max(
        0, config.num_hidden_layers - STREAMED_AT_ONCE
    )
    return 1 - streamed / sum(by_part.values())


@dataclass(frozen=True, slots=True)
class Room:
    """What writing needs besides the weights, counted in texts and tokens.

    Args:
        batch_size: texts written together.
        source_length: tokens of a source, where the model can read so many.
        capacity: tokens of a window, likewise.
    """

    batch_size: int = 1
    source_length: int = 512
    capacity: int = 384

    def need(self, config: PlugConfig, weights: int, bytes_per_value: int, bits: int = 16) -> Need:
        """In bytes, with ``weights``."""
        longest = config.max_position_embeddings
        return generation_need(
            config,
            weights=weights,
            batch_size=self.batch_size,
            source_length=min(self.source_length, longest),
            capacity=min(self.capacity, longest),
            bytes_per_value=bytes_per_value,
            bits=bits,
        )

    def need_on_cpu(self, config: PlugConfig, weights: int) -> Need:
        """Likewise on a CPU; ``weights`` from `cpu_weight_bytes`."""
        longest = config.max_position_embeddings
        return cpu_generation_need(
            config,
            weights=weights,
            batch_size=self.batch_size,
            source_length=min(self.source_length, longest),
            capacity=min(self.capacity, longest),
        )


# --- training -------------------------------------------------------------------------------------

_FEW_LABELS = 2  # of a classifier, whose one linear layer is small beside the others
# Bytes an optimizer keeps for a trained parameter: two moments in float32; in 8 bits with a scale
# in float32 for 256 of them. A factored second moment is a row and a column. Muon has one momentum
# for the layers' matrices; AdamW has the rest.
_EIGHT_BITS = 2 + 2 * 4 / 256
_STATES = {
    "adamw": 8.0,
    "adamw8bit": _EIGHT_BITS,
    "adamw8bit_fused": _EIGHT_BITS,
    "muon": 8.0,
    "adafactor": 0.0,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Training:
    """How a model is trained, as far as memory goes.

    Args:
        batch_size: examples at once.
        source_length: tokens of each, the longest.
        target_length: tokens that the decoder writes; 0: the task has no decoder.
        memory: "full" trains every weight; "lora" and "qlora" small matrices beside them.
        optimizer: a key of `_STATES`.
        bits: of the weights as they are kept: 32 or 16, of frozen layers 8 or 4 too.
        half: activations inside of a layer have 16 bits, by autocast or because the weights do.
        rank: of the small matrices.
        recomputed: layers that keep their input alone, the encoder's first ones first.
        accumulates: gradients of several batches are added up, or kept from step to step.
        dropout: whether a layer keeps masks.
        cards: that share weights, gradients and states (FSDP2). Layers are gathered when needed,
            in the dtype of the products, so that there is no autocast.
        tensor: of those cards, how many compute each layer together (tensor parallelism): each
            has some of its heads and inner values, and gathers as much of it.
        reshards: a layer is freed after its forward pass and gathered again for the backward pass.
        offload: those shards are in the host's memory.
        masked_share: of pre-training: the share of the source that the masked-LM head predicts.
        half_stream: the residual stream has 16 bits beside weights in float32, as in pre-training.
        fp8: products of the layers are in FP8, which keep what they read in 8 bits.
        compiled: layers and losses are, as in pre-training: norms keep their input as it is, and
            heads their logits in the dtype of the product.
    """

    batch_size: int
    source_length: int
    target_length: int = 0
    memory: str = "full"
    optimizer: str = "adamw"
    bits: int = 32
    half: bool = True
    rank: int = 16
    recomputed: int = 0
    accumulates: bool = False
    dropout: bool = True
    cards: int = 1
    tensor: int = 1
    reshards: bool = True
    offload: bool = False
    masked_share: float = 0.0
    half_stream: bool = False
    fp8: bool = False
    compiled: bool = False

    @property
    def weight(self) -> int:
        """Bytes of a weight that is no integer, as a layer computes with it."""
        if self.is_sharded and self.half:
            return 2
        return 4 if self.bits == 32 else 2

    @property
    def stream(self) -> int:
        """Bytes of a value between the layers."""
        return 2 if self.half_stream else self.weight

    @property
    def value(self) -> int:
        """Bytes of a value inside of a layer."""
        return 2 if self.half else self.stream

    @property
    def norm(self) -> int:
        """Bytes of a value that a norm reads, as it is kept; it computes in its weights' dtype."""
        return self.stream if self.compiled else self.weight

    @property
    def is_sharded(self) -> bool:
        return self.cards > 1 or self.offload

    @property
    def keeps_layers(self) -> bool:
        """Whether gathered layers stay from their forward to their backward pass."""
        return self.is_sharded and not self.reshards

    @property
    def trains_all(self) -> bool:
        return self.memory == "full"

    @property
    def is_fused(self) -> bool:
        """Whether a weight changes as soon as its gradient is there, which is then dropped."""
        return self.trains_all and self.optimizer in ("adafactor", "adamw8bit_fused")

    @property
    def own_passes(self) -> bool:
        """Whether layers with adapters train by `finetuning/adapted_layers.py`."""
        return not self.trains_all and self.half


@dataclass(frozen=True, slots=True)
class _Block:
    """A layer or a head in a training step, in bytes.

    Attributes:
        kept: from its forward to its backward pass, where nothing is recomputed.
        entry: what is kept in place of that: all of it, or what it is computed from again.
        forward: more than ``kept`` that it holds in passing.
        backward: likewise in the backward pass.
        gradients: that it leaves.
        parameters: that FSDP2 gathers for it, apart from the root's; 0: the root has them.
    """

    kept: int
    entry: int
    forward: int
    backward: int
    gradients: int
    parameters: int = 0


def training_need(config: PlugConfig, training: Training) -> Need:
    """Return what a training step takes, when the optimizer's states are there.

    The step is walked through: forward, each block adds what it keeps; backward, the last block
    first, a recomputed one adds the rest, and each leaves its gradients in the place of what it
    kept. The largest sum on the way is the peak.

    Args:
        config: the model's shape.
        training: how it is trained.

    Raises:
        UsageError: 4 bits, and a layer cannot be parted into groups.
    """
    is_classifier = not (training.target_length or training.masked_share)
    num_labels = _FEW_LABELS if is_classifier else None
    if not training.target_length:
        config = replace(config, num_decoder_layers=0)
    by_part = parts(config, num_labels)
    kept = 4 if training.bits == 32 else 2
    weights = weight_bytes(config, training.bits, kept, num_labels=num_labels)
    adapters = 0 if training.trains_all else _adapter_parameters(by_part, training)
    trained = adapters or sum(by_part.values(), Part()).parameters
    weights += 4 * adapters
    optimizer = int(trained * _STATES[training.optimizer])
    if training.optimizer == "muon":
        optimizer -= 4 * (by_part["encoder"] + by_part["decoder"]).matrix_parameters
    if training.is_fused:  # the word table is used at both ends of the step
        all_gradients = training.weight * config.vocab_size * config.hidden_size
    else:
        all_gradients = (4 if adapters else kept) * trained
    if training.is_sharded:
        share = 0.0 if training.offload else 1 / training.cards
        weights, optimizer = (round(each * share) for each in (weights, optimizer))
        if not training.is_fused:  # else it is the word table's, before it is reduced
            all_gradients = round(all_gradients * share)
        weights += training.weight * (by_part["embeddings"] + by_part["heads"]).parameters

    blocks = [_with_layer(each, training) for each in _blocks(config, training)]
    scale = all_gradients / max(1, sum(block.gradients for block in blocks))
    left = sum(block.entry for block in blocks)
    best = Need(weights, optimizer=optimizer, gradients=all_gradients)
    gradients = float(all_gradients if training.accumulates else 0)
    held = before = 0
    for block in blocks:
        held += block.entry
        inside = block.kept - block.entry + block.forward + _gathered(config, training, block, 3)
        best = _larger(best, weights, optimizer, int(gradients), held, inside)
    for block in reversed(blocks):
        gathered = _gathered(config, training, block, 2)
        inside = block.kept - block.entry + block.backward + before + gathered
        best = _larger(best, weights, optimizer, int(gradients), left, inside)
        left -= block.entry
        if training.is_sharded and training.trains_all and block.parameters:
            # Its gradients are whole, and what it kept is free. Then it gives its weights back,
            # and the gradients are copied to be summed.
            whole = training.value * block.parameters
            computed = whole + gathered + before
            copied = training.weight if training.is_fused else 4
            before = copied * block.parameters  # until the next block's are summed
            data_size = training.cards // training.tensor
            sums = 4 * block.parameters // data_size if training.accumulates else 0
            summed = whole + before + sums + _gathered(config, training, block, 1)
            inside = max(computed, summed)
            best = _larger(best, weights, optimizer, int(gradients), left, inside)
        if not training.accumulates:
            gradients += block.gradients * scale
    return best


def _with_layer(block: _Block, training: Training) -> _Block:
    """Return what a block keeps with its gathered parameters, where those stay."""
    if not training.keeps_layers:
        return block
    size = training.weight * block.parameters
    return replace(block, kept=block.kept + size, entry=block.entry + size)


def _gathered(config: PlugConfig, training: Training, block: _Block, times: int) -> int:
    """Bytes of the layers that FSDP2 has gathered while a block is at work.

    Forward there are three of a layer: its parameters, the buffer they were copied from, and that
    of the next layer. Backward the first buffer is free. A head meets one layer, which waits.
    Layers that stay gathered are in what blocks keep, and nothing is gathered backward.
    """
    if not training.is_sharded:
        return 0
    if training.keeps_layers:
        return training.weight * 2 * block.parameters if times == 3 else 0
    waiting = layer(config, attentions=2 if config.num_decoder_layers else 1).parameters
    return training.weight * (times * block.parameters or waiting // training.tensor)


def _larger(
    best: Need, weights: int, optimizer: int, gradients: int, activations: int, workspace: int
) -> Need:
    need = Need(
        weights,
        workspace=workspace,
        gradients=gradients,
        optimizer=optimizer,
        activations=activations,
    )
    return max(best, need, key=lambda each: each.total)


def host_need(config: PlugConfig, training: Training) -> int:
    """Return the bytes of the host's memory that offloaded shards take, of all cards together."""
    alone = replace(training, offload=False, cards=1)
    need = training_need(config, alone)
    trained = 0 if training.trains_all else _adapter_parameters(parts(config), training)
    whole = 4 if training.trains_all else 0
    gradients = 4 * trained + whole * sum(parts(config).values(), Part()).parameters
    return need.weights + need.optimizer + gradients


def _adapter_parameters(by_part: dict[str, Part], training: Training) -> int:
    """A (rank, in) and a (out, rank) beside each matrix of encoder and decoder."""
    matrices = by_part["encoder"].matrices + by_part["decoder"].matrices
    return training.rank * sum(rows + columns for rows, columns in matrices)


def _blocks(config: PlugConfig, training: Training) -> Iterator[_Block]:
    """The step's blocks in the order of the forward pass."""
    source = training.batch_size * training.source_length
    target = training.batch_size * training.target_length
    yield _embedding(config, training, source)
    for index in range(config.num_hidden_layers):
        yield _layer_block(config, training, index, source)
    if training.masked_share:
        yield _masked_head(config, training, round(source * training.masked_share))
    if not target:
        return
    yield _embedding(config, training, target)
    yield _projection(config, training, source)
    for index in range(config.num_decoder_layers):
        yield _layer_block(config, training, config.num_hidden_layers + index, target, crossed=True)
    yield _head(config, training, target)


def _inputs(training: Training, uses: int) -> int:
    """Bytes of a value that ``uses`` linear layers multiply, as it is kept for their gradients.

    Under autocast each of them makes a copy in 16 bits of an input in float32.
    """
    return training.value * (uses if training.stream > training.value else 1)


def _layer_block(
    config: PlugConfig, training: Training, index: int, tokens: int, *, crossed: bool = False
) -> _Block:
    """One layer over ``tokens``; a decoder's has cross-attention, whose keys `_projection` keeps.

    With tensor parallelism norms and their results are whole on each card, all else is shared.

    Bytes of a token: the input of each norm; queries, keys, values, what attention gave, with a
    float32 for each head; `fc1`'s output; what the products read, which norms and GELU gave; masks
    of dropout. Adapters in 16 bits (`finetuning/adapted_layers.py`) and fused steps
    (`finetuning/recomputation.py`) compute the products' inputs again. Those adapters draw masks
    again too; other adapters (peft's own layers) keep their inputs after dropout.
    """
    hidden, value = config.hidden_size, training.value
    heads, inner = (
        size // training.tensor for size in (config.num_attention_heads, config.intermediate_size)
    )
    attended = hidden // training.tensor  # values of a card's heads
    attentions, products = (2, 10) if crossed else (1, 6)
    norms = (attentions + 1) * training.norm * hidden
    results = (4 + 2 * (attentions - 1)) * value * attended + value * inner
    results += 4 * heads * attentions
    reads = (_inputs(training, 3) + _inputs(training, 1) * attentions) * hidden + value * inner
    if training.fp8:  # of each product; what attention gave is kept for attention as well
        reads = (1 + 2 * attentions) * hidden + inner
    masks = (attentions + 1) * hidden if training.dropout else 0
    thin = 0
    if not training.trains_all:
        thin = value * training.rank * products
        if training.own_passes:
            reads = masks = 0
        else:
            reads = (4 + 1) * (inner + hidden * (products - 1))
    whole = tokens * (norms + results + reads + masks + thin)

    part = layer(config, attentions)
    copies = 2 * part.matrix_parameters if _casts(training) and not training.fp8 else 0
    again = tokens * reads if training.is_fused else 0
    kept, entry = whole + copies, whole + copies - again
    if index < training.recomputed:
        entry, again = tokens * training.stream * hidden, 0

    # At fc2, where most is there: the gradients of the layer's output, of that without dropout, and
    # of what fc2 read; an unpacked weight, or the gradient of one.
    passing = tokens * ((training.stream + value) * hidden + value * inner)
    largest = hidden * inner
    unpacked = largest * value if training.bits < 16 else 0
    if training.fp8:  # a weight, and the rows and columns of fc2's output's gradient
        unpacked = largest
        passing += tokens * 2 * hidden
    weight_gradient = largest * (6 if _casts(training) else value) if training.trains_all else 0
    # The decoder's keys and values of sources are gathered apart, for all layers.
    apart = 2 * hidden * (hidden + 1) if crossed else 0
    return _Block(
        kept=kept - again,
        entry=entry,
        forward=tokens * (training.stream * hidden + (value * inner if again else 0)) + unpacked,
        backward=passing + (tokens * value * inner if again else 0) + unpacked + weight_gradient,
        gradients=0 if training.is_fused else part.parameters,
        parameters=(part.parameters - apart) // training.tensor,
    )


def _casts(training: Training) -> bool:
    """Whether autocast makes copies of trained weights in 16 bits."""
    return training.trains_all and training.weight > training.value


def _embedding(config: PlugConfig, training: Training, tokens: int) -> _Block:
    """The sum that the norm reads, and a dropout mask; what the half's final norm reads.

    Beside adapters the embeddings are frozen and keep nothing.
    """
    kept = training.norm
    if training.trains_all:
        kept += training.weight + (1 if training.dropout else 0)
    kept *= tokens * config.hidden_size
    return _Block(kept, kept, tokens * config.hidden_size * training.stream, 0, 0)


def _projection(config: PlugConfig, training: Training, tokens: int) -> _Block:
    """Keys and values of the encoder's output for each of the decoder's layers."""
    hidden, layers = config.hidden_size, config.num_decoder_layers
    inputs = _inputs(training, 2 * layers)
    kept = tokens * hidden * (2 * layers * training.value // training.tensor + inputs)
    copies = 4 * layers * hidden * hidden if _casts(training) and not training.fp8 else 0
    gradients = 2 * tokens * hidden * training.value // training.tensor
    return _Block(kept + copies, kept + copies, 0, gradients, 0)


def _masked_head(config: PlugConfig, training: Training, tokens: int) -> _Block:
    """`_head` under a dense layer, GELU and a norm: their inputs and outputs."""
    head = _head(config, training, tokens)
    inside = tokens * config.hidden_size * (4 * training.value + training.norm)
    return replace(head, kept=head.kept + inside, entry=head.entry + inside)


def _head(config: PlugConfig, training: Training, tokens: int) -> _Block:
    """Logits over the vocabulary, their logarithms of probabilities in float32, two gradients.

    A compiled loss keeps logits as the product gives them; their gradient takes their place.
    """
    logits = tokens * config.vocab_size
    table = config.vocab_size * config.hidden_size
    copy = 2 * table if _casts(training) else 0
    gradient = table * (6 if _casts(training) else training.value) if training.trains_all else 0
    kept, forward, backward = 4 * logits, (4 + training.value) * logits, (4 + 4) * logits
    if training.compiled:
        kept, forward, backward = training.value * logits, 0, 0
    return _Block(
        kept=kept + copy,
        entry=kept + copy,
        forward=forward,
        backward=backward + gradient,
        gradients=table if training.trains_all else 0,
    )

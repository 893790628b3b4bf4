"""What a config costs: parameters and floating-point operations. Arithmetic alone, no torch.

A multiply and an add are two operations. Biases, norms, activations and softmax are left out of
the operations: under 0.1% at hidden size 8192, under 1% at 512. Letters in the formulae: h hidden,
f intermediate, V vocabulary, E and D layers of encoder and decoder.
"""

from __future__ import annotations

from dataclasses import dataclass

from plug.model.configuration import PlugConfig

NUM_SENTENCE_CLASSES = 3


@dataclass(frozen=True, slots=True)
class Part:
    """Parameters of one part of the model, in the two kinds that quantisation tells apart."""

    matrices: tuple[tuple[int, int], ...] = ()  # (rows, columns): linear weights, the word table
    others: int = 0  # biases, norms, position and token-type tables: never below bf16

    @property
    def matrix_parameters(self) -> int:
        return sum(rows * columns for rows, columns in self.matrices)

    @property
    def parameters(self) -> int:
        return self.matrix_parameters + self.others

    def __add__(self, other: Part) -> Part:
        return Part(self.matrices + other.matrices, self.others + other.others)

    def __mul__(self, times: int) -> Part:
        return Part(self.matrices * times, self.others * times)


def _linear(inputs: int, outputs: int) -> Part:
    return Part(((outputs, inputs),), outputs)


def layer(config: PlugConfig, attentions: int) -> Part:
    """One layer: of the encoder with 1 attention, of the decoder with 2."""
    hidden, intermediate = config.hidden_size, config.intermediate_size
    norm = Part(others=2 * hidden)
    attention = norm + _linear(hidden, hidden) * 4
    feed_forward = norm + _linear(hidden, intermediate) + _linear(intermediate, hidden)
    return attention * attentions + feed_forward


def parts(config: PlugConfig, num_labels: int | None = None) -> dict[str, Part]:
    """The model by part; the word table, which the heads share, counts once, in embeddings.

    Args:
        config: the shape.
        num_labels: of a fine-tuned classifier, which has one linear layer in the place of the
            decoder and the heads; None is the whole model.
    """
    hidden, vocabulary = config.hidden_size, config.vocab_size
    norm = Part(others=2 * hidden)
    tables = (config.max_position_embeddings + config.type_vocab_size) * hidden
    decoder = layer(config, attentions=2) * config.num_decoder_layers + norm
    mlm_head = _linear(hidden, hidden) + norm + Part(others=vocabulary)
    is_whole = num_labels is None
    heads = mlm_head + _linear(hidden, NUM_SENTENCE_CLASSES)
    return {
        "embeddings": Part(((vocabulary, hidden),), tables) + norm,
        "encoder": layer(config, attentions=1) * config.num_hidden_layers + norm,
        "decoder": decoder if config.num_decoder_layers and is_whole else Part(),
        "heads": heads if num_labels is None else _linear(hidden, num_labels),
    }


def total(config: PlugConfig) -> Part:
    """All of the model as one `Part`."""
    return sum(parts(config).values(), Part())


def step_weights(config: PlugConfig) -> int:
    """Matrix weights that one decoder step reads: D (6 h^2 + 2 h f) + V h.

    Self-attention has four h x h matrices; cross-attention two, because its keys and values were
    projected once for the whole input; the word table is read whole for the logits. 5.81e9 at 27B,
    0 for an encoder alone, which writes nothing.
    """
    if not config.num_decoder_layers:
        return 0
    hidden = config.hidden_size
    layer = 6 * hidden * hidden + 2 * hidden * config.intermediate_size
    return config.num_decoder_layers * layer + config.vocab_size * hidden


def encoder_flops(config: PlugConfig, source_length: int) -> int:
    """Operations to encode one source of S tokens: E S (8 h^2 + 4 h f) + E (4 h S^2).

    The second term is attention: S queries against S keys, then the weighted sum of S values.
    """
    hidden, length = config.hidden_size, source_length
    weights = 8 * hidden * hidden + 4 * hidden * config.intermediate_size
    return config.num_hidden_layers * length * (weights + 4 * hidden * length)


def cross_projection_flops(config: PlugConfig, source_length: int) -> int:
    """Operations to project the encoder's output to every decoder layer's keys and values, once.

    D S (4 h^2).
    """
    return config.num_decoder_layers * source_length * 4 * config.hidden_size**2


def step_flops(config: PlugConfig, source_length: int, position: int) -> int:
    """Operations to write one token with caches: 2 `step_weights` + D (4 h) (S + p).

    Args:
        config: the shape.
        source_length: S, tokens that cross-attention looks at.
        position: p, tokens that self-attention looks at, the new one among them.
    """
    attention = config.num_decoder_layers * 4 * config.hidden_size * (source_length + position)
    return 2 * step_weights(config) + attention


def cache_bytes(config: PlugConfig, bytes_per_value: int = 2) -> int:
    """Bytes of keys and values kept for one token, in self- or in cross-attention: 2 D h values."""
    return 2 * config.num_decoder_layers * config.hidden_size * bytes_per_value


def training_flops(
    config: PlugConfig, source_length: int, target_length: int, *, every_parameter: bool
) -> int:
    """Operations of a training step on one example of S and T tokens, nothing recomputed.

    A forward pass is `encoder_flops` + `cross_projection_flops` + `step_flops` of each target
    position. The backward pass computes the gradients of the inputs, which are as many operations,
    and with ``every_parameter`` those of the weights, as many again. Adapters' own products are
    left out: under 1% at rank 16.
    """
    forward = encoder_flops(config, source_length) + cross_projection_flops(config, source_length)
    forward += sum(step_flops(config, source_length, p) for p in range(1, target_length + 1))
    return forward * (3 if every_parameter else 2)

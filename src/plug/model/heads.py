"""What stands on the encoder (the masked-LM and the sentence head), and a look at outputs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plug.errors import NonFiniteError
from plug.model.configuration import PlugConfig
from plug.model.layers import LayerNorm

IGNORE_INDEX = -100  # a label that no loss counts, as in PyTorch
NUM_SENTENCE_CLASSES = 3  # 0 another document, 1 the next segment, 2 the previous one


class MaskedLMHead(nn.Module):
    """Dense, GELU, LayerNorm, then the tied word table with a bias of its own."""

    def __init__(self, config: PlugConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.layer_norm = LayerNorm(config)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, hidden_states: Tensor, word_table: Tensor) -> Tensor:
        """(…, hidden) and (vocab, hidden) to logits (…, vocab)."""
        transformed = self.layer_norm(F.gelu(self.dense(hidden_states)))
        return F.linear(transformed, word_table, self.bias)


class SentenceHead(nn.Linear):
    """3-way linear layer on the encoder's first position, no pooler; (…, hidden) to (…, 3)."""

    def __init__(self, config: PlugConfig) -> None:
        super().__init__(config.hidden_size, NUM_SENTENCE_CLASSES)


def numbers(outputs: Tensor) -> Tensor:
    """Return a model's outputs, unless they overflowed: -inf forbids, NaN and inf say nothing.

    Finite weights are no guarantee, above all in float16.

    Raises:
        NonFiniteError: one of them is NaN or infinite.
    """
    if not (outputs < torch.inf).all():
        raise NonFiniteError(
            "模型算出了 NaN 或无穷大：权重太大（如训练发散），或超出了所用精度的范围。"
            "请换 float32 或 bfloat16，或降低学习率重新训练。"
        )
    return outputs

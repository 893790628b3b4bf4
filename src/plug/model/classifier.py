"""`EncoderClassifier`: the encoder under a linear layer, which fine-tuning makes."""

from __future__ import annotations

from torch import Tensor, nn

from plug.model.configuration import PlugConfig
from plug.model.layers import Embeddings
from plug.model.plug import Encoder


class EncoderClassifier(nn.Module):
    """The modules of `plug.hf`'s classes for classification, under the same parameter names."""

    def __init__(self, config: PlugConfig, num_labels: int) -> None:
        super().__init__()
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config)
        self.classifier = nn.Linear(config.hidden_size, num_labels)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
    ) -> Tensor:
        """(batch, src) ids to logits (batch, src, num_labels)."""
        encoded = self.encoder(self.embeddings(input_ids, token_type_ids), attention_mask)
        return self.classifier(encoded)

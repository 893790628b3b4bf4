from __future__ import annotations

import torch

from plug.model.plug import Plug


@torch.inference_mode()
def test_masked_lm_logits_are_dense_gelu_norm_then_the_word_table_and_a_bias(
    tiny_model: Plug,
) -> None:
    head, table = tiny_model.mlm_head, tiny_model.embeddings.word_embeddings.weight
    x = torch.randn(2, 5, tiny_model.config.hidden_size)
    dense = x @ head.dense.weight.T + head.dense.bias
    gelu = dense * 0.5 * (1 + torch.erf(dense / 2**0.5))
    expected = head.layer_norm(gelu) @ table.T + head.bias
    torch.testing.assert_close(tiny_model.mlm_logits(x), expected, atol=1e-4, rtol=1e-4)


@torch.inference_mode()
def test_decoder_logits_are_the_word_table_without_a_bias(tiny_model: Plug) -> None:
    x = torch.randn(2, 5, tiny_model.config.hidden_size)
    expected = x @ tiny_model.embeddings.word_embeddings.weight.T
    torch.testing.assert_close(tiny_model.lm_logits(x), expected)


@torch.inference_mode()
def test_sentence_logits_read_the_first_position_alone(tiny_model: Plug) -> None:
    x = torch.randn(2, 5, tiny_model.config.hidden_size)
    head = tiny_model.sentence_head
    logits = tiny_model.sentence_logits(x)
    torch.testing.assert_close(logits, x[:, 0] @ head.weight.T + head.bias)
    x[:, 1:] = 7.0
    assert torch.equal(tiny_model.sentence_logits(x), logits)


def test_both_heads_on_the_word_table_send_it_gradients(tiny_model: Plug) -> None:
    """Tied by use: one parameter, no second copy in the state dict."""
    table = tiny_model.embeddings.word_embeddings.weight
    x = torch.randn(2, tiny_model.config.hidden_size)
    for logits in (tiny_model.lm_logits(x), tiny_model.mlm_logits(x)):
        (gradient,) = torch.autograd.grad(logits.square().sum(), table)
        assert gradient.abs().sum() > 0
    vocabulary = tiny_model.config.vocab_size
    tables = [name for name, each in tiny_model.state_dict().items() if each.shape[0] == vocabulary]
    assert tables == ["embeddings.word_embeddings.weight", "mlm_head.bias"]

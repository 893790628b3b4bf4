"""What makes a step fast changes nothing of what is computed: losses and gradients stay."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from plug.model.plug import Plug
from plug.pretraining import losses
from plug.pretraining.batches import Batch
from plug.pretraining.compiled import compile_model, keep_bf16

pytestmark = [  # of torch itself, while it compiles
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


@pytest.fixture
def plain_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    """`compile_model` replaces them; put them back."""
    for name in ("lm_loss", "mlm_loss"):
        monkeypatch.setattr(losses, name, getattr(losses, name))


@pytest.fixture
def eager() -> Iterator[None]:
    """What is to be compiled runs as it is written; `benchmarks/pretrain.py` runs the rest."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.fixture
def batch() -> Batch:
    generator = torch.Generator().manual_seed(0)
    return {
        "input_ids": torch.randint(5, 90, (3, 14), generator=generator),
        "mlm_positions": torch.tensor([[1, 5], [2, 12], [3, 4]]),
        "mlm_labels": torch.randint(5, 90, (3, 2), generator=generator),
        "decoder_input_ids": torch.randint(5, 90, (3, 6), generator=generator),
        "labels": torch.randint(5, 90, (3, 6), generator=generator),
    }


def results(model: Plug, batch: Batch) -> dict[str, torch.Tensor]:
    """The losses of stage 2, and the gradient of each weight."""
    found = losses.palm_losses(model, batch)
    model.zero_grad()
    torch.stack(list(found.values())).sum().backward()
    return {name: value.detach() for name, value in found.items()} | {
        name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None
    }


@pytest.mark.usefixtures("plain_losses", "eager")
@pytest.mark.parametrize("most_logits", [2**30, 256])
def test_joined_projections_and_pieces_of_logits(
    most_logits: int, tiny_model: Plug, batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_model.eval()
    expected = results(tiny_model, batch)
    names = [name for name, _ in tiny_model.named_parameters()]
    monkeypatch.setattr(losses, "MOST_LOGITS", most_logits)
    compile_model(tiny_model)
    assert [name for name, _ in tiny_model.named_parameters()] == names
    torch.testing.assert_close(results(tiny_model, batch), expected)


def test_the_residual_stream_is_bf16(tiny_model: Plug, batch: Batch) -> None:
    """As near to float32 as autocast alone is; the losses are float32 still."""
    tiny_model.eval()
    exact = losses.palm_losses(tiny_model, batch)
    keep_bf16(tiny_model)
    with torch.autocast("cpu", torch.bfloat16):
        assert tiny_model.encode(batch["input_ids"]).dtype == torch.bfloat16
        found = losses.palm_losses(tiny_model, batch)
    for name, value in exact.items():
        assert found[name].dtype == torch.float32
        torch.testing.assert_close(found[name], value, rtol=5e-3, atol=0)

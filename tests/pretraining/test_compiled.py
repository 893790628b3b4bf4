"""What makes a step fast changes nothing of what is computed: losses and gradients stay."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from plug.errors import UsageError
from plug.model.configuration import PlugConfig
from plug.model.plug import Plug
from plug.pretraining import compiled, losses
from plug.pretraining.batches import Batch
from plug.pretraining.compiled import check_kernels, compile_model, keep_bf16

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
def kernel_device() -> str:
    """Where Triton's kernels run: without a GPU its interpreter takes tensors of the CPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"


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


@pytest.mark.usefixtures("plain_losses", "eager")
@pytest.mark.parametrize("longest", [512, 7])
def test_attention_by_our_own_kernels(
    longest: int,
    config: PlugConfig,
    make_model: Callable[[PlugConfig], Plug],
    batch: Batch,
    kernel_device: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Sequences that are too long for them go the usual way: here the sources."""
    kernels = pytest.importorskip("plug.kernels.training_attention", reason="needs triton")
    model = make_model(dataclasses.replace(config, num_attention_heads=2)).to(kernel_device)
    batch = {name: each.to(kernel_device) for name, each in batch.items()}
    expected = results(model, batch)
    served = []

    def attend(query: torch.Tensor, *others: Any) -> Any:
        served.append(query.shape[1])
        return kernels.attend(query, *others)

    monkeypatch.setattr(compiled, "_attention_kernel", lambda: attend)
    monkeypatch.setattr(compiled, "LONGEST", longest)
    compile_model(model, own_kernels=True)
    torch.testing.assert_close(results(model, batch), expected, rtol=1e-4, atol=1e-5)
    layers = config.num_hidden_layers, config.num_decoder_layers
    encoder, self_and_cross = [14] * layers[0], [6, 6] * layers[1]
    assert served == (encoder + self_and_cross if longest == 512 else [6] * layers[1])


@pytest.mark.usefixtures("plain_losses", "eager")
def test_gelu_by_our_own_kernel(
    tiny_model: Plug, batch: Batch, kernel_device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels = pytest.importorskip("plug.kernels.gelu", reason="needs triton")
    tiny_model.eval().to(kernel_device)
    batch = {name: each.to(kernel_device) for name, each in batch.items()}
    expected = results(tiny_model, batch)
    served = []

    def gelu(product: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        served.append(product.shape[1])
        return kernels.BiasedGelu.apply(product, bias)

    monkeypatch.setattr(compiled, "_gelu_kernel", lambda: gelu)
    monkeypatch.setattr(compiled, "LONGEST", 0)  # attention goes the usual way
    compile_model(tiny_model, own_kernels=True)
    torch.testing.assert_close(results(tiny_model, batch), expected, rtol=1e-4, atol=1e-5)
    assert served == [14] * len(tiny_model.encoder.layers) + [6] * 2


def test_where_our_own_kernels_serve(config: PlugConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("plug.kernels.training_attention", reason="needs triton")
    with pytest.raises(UsageError, match=r"9\.x 的显卡.*CPU"):
        check_kernels(config, torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "A100")
    for capability, message in (((8, 0), "A100"), ((9, 0), "每个注意力头的宽度是 16 或 32 或 64")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, c=capability: c)
        with pytest.raises(UsageError, match=message):
            check_kernels(config, torch.device("cuda"))
    check_kernels(
        dataclasses.replace(config, hidden_size=128, num_attention_heads=2), torch.device("cuda")
    )


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

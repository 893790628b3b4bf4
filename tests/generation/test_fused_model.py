"""The fused model against the plain one, in float32; without a GPU, by Triton's interpreter.

Here PyTorch's product takes the place of `skinny_gemm.cu`, which `tests/kernels` tries on a GPU.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined
pytest.importorskip("triton", reason="needs triton, which PyTorch for CUDA brings along")

from plug.generation.fused_model import FusedModel
from plug.generation.model_runner import ModelRunner, PreparedModel, Size
from plug.generation.plain_model import PlainModel
from plug.generation.sequence import Sequence
from plug.generation.settings import GenerationSettings
from plug.generation.window import PlugRules
from plug.model.plug import Plug
from plug.quantization.linear import QuantizedLinear, quantize_modules
from plug.quantization.scheme import Scheme

PROMPTS = [[9, 8, 7, 6], [30, 31], [40, 41], [50, 0, 51]]  # 0: [PAD]


@pytest.fixture(autouse=True)
def _on_the_device(lively_model: Plug) -> None:
    if torch.cuda.is_available():
        lively_model.cuda()


def fused_model(model: Plug) -> PreparedModel:
    prepared = PreparedModel(model)
    prepared.model = FusedModel(model)  # which a model in float32 does not get by itself
    return prepared


def runner_of(prepared: PreparedModel) -> ModelRunner:
    return ModelRunner(prepared, Size(len(PROMPTS), 6, 8))


def decode(runner: ModelRunner, token_ids: Tensor, positions: Tensor, length: int) -> Tensor:
    assert runner.cache is not None
    return runner.prepared.model.decode(token_ids, positions, length, runner.cache)


def new_sequences(model: Plug) -> list[Sequence]:
    rules = PlugRules(model.config, window=4, out_length=7)
    settings = GenerationSettings(temperature=3.0, top_k=0)
    return [Sequence(prompt, rules, settings, seed) for seed, prompt in enumerate(PROMPTS)]


@torch.inference_mode()
def test_it_writes_what_the_plain_model_writes(
    lively_model: Plug, write: Callable[..., None]
) -> None:
    plain, fused = new_sequences(lively_model), new_sequences(lively_model)

    write(PreparedModel(copy.deepcopy(lively_model)), plain)
    write(fused_model(lively_model), fused)

    assert [each.written for each in fused] == [each.written for each in plain]
    assert any(len(each.written) > 4 for each in plain)  # a second window was read


@pytest.mark.parametrize(
    ("kernels", "dtype", "expected"),
    [
        (True, torch.bfloat16, FusedModel),
        (True, torch.float32, PlainModel),
        (False, torch.float16, PlainModel),
    ],
)
def test_half_precision_is_fused_where_the_kernels_run(
    kernels: bool,
    dtype: torch.dtype,
    expected: type,
    lively_model: Plug,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("plug.generation.model_runner.has_kernels", lambda _: kernels)
    assert isinstance(PreparedModel(lively_model.to(dtype)).model, expected)


@torch.inference_mode()
def test_logits_are_those_of_the_plain_model(lively_model: Plug) -> None:
    sources = [[2, *prompt, 3] for prompt in PROMPTS]
    plain = runner_of(PreparedModel(copy.deepcopy(lively_model)))
    fused = runner_of(fused_model(lively_model))
    for runner in (plain, fused):
        runner.start(sources)

    for position in range(2):
        ids = [60 + position + row for row in range(len(PROMPTS))]
        expected = plain.logits(ids, [position] * len(ids))
        torch.testing.assert_close(fused.logits(ids, [position] * len(ids)), expected)


@torch.inference_mode()
def test_tokens_may_stand_apart_in_memory(lively_model: Plug) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    table = torch.tensor([[60, 5], [61, 6]], device=device)
    first = torch.zeros(2, 1, dtype=torch.long, device=device)
    runner = runner_of(fused_model(lively_model))
    runner.start([[2, 9, 8, 3]] * 2)

    expected = decode(runner, torch.tensor([[60], [61]], device=device), first, 1)
    assert torch.equal(decode(runner, table[:, :1], first, 1), expected)


@torch.inference_mode()
def test_several_positions_at_once_are_those_of_the_plain_model(lively_model: Plug) -> None:
    sources = [[2, *prompt, 3] for prompt in PROMPTS]
    plain = runner_of(PreparedModel(copy.deepcopy(lively_model)))
    fused = runner_of(fused_model(lively_model))
    ids = torch.arange(60, 60 + 8 * len(PROMPTS), device=plain.prepared.device).view(-1, 8)
    for runner in (plain, fused):
        runner.start(sources)

    # The second time, rows stand at different positions and one of them repeats its last token.
    for positions in ([[0, 1, 2]] * 4, [[3, 4, 5], [3, 4, 4], [2, 3, 4], [1, 2, 3]]):
        where = torch.tensor(positions, device=plain.prepared.device)
        expected = decode(plain, ids.gather(1, where), where, 6)
        got = decode(fused, ids.gather(1, where), where, 6)
        torch.testing.assert_close(got, expected)


@torch.inference_mode()
def test_quantized_weights_are_read_as_the_plain_model_reads_them(lively_model: Plug) -> None:
    plain_model = quantized(lively_model, 8)  # tests/kernels/test_packed_linear.py has 4 bits
    plain = runner_of(PreparedModel(plain_model))
    fused = runner_of(fused_model(copy.deepcopy(plain_model)))
    for runner in (plain, fused):
        runner.start([[2, *PROMPTS[0], 3]])

    got, expected = fused.logits([2], [0]), plain.logits([2], [0])

    # The CPU rounds activations to 8 bits, a GPU reads sources in FP8.
    assert (got - expected).norm() < 0.1 * expected.norm()


@pytest.mark.parametrize(
    ("rows", "unused", "kept"), [(32, 60, False), (33, 60, True), (128, 24, True), (128, 23, False)]
)
def test_a_copy_in_fp8_is_kept_for_many_rows_where_there_is_room(
    rows: int, unused: int, kept: bool, lively_model: Plug, monkeypatch: pytest.MonkeyPatch
) -> None:
    """12 GB for all layers, and 15% of 80 GB to stay free."""
    model: Any = FusedModel(lively_model)
    made: list[int] = []
    each = 12 * 10**9 // len(model._decoder_layers)
    for layer in model._decoder_layers:
        layer.products = (SimpleNamespace(fp8_bytes=each, keep_fp8=lambda: made.append(1)),)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (unused * 10**9, 80 * 10**9))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 0)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 0)

    model.expect(rows)

    assert bool(made) is kept


def quantized(model: Plug, bits: int) -> Plug:
    scheme = Scheme.of(bits)
    made = copy.deepcopy(model)
    quantize_modules(made, scheme)
    for name, module in made.named_modules():
        if isinstance(module, QuantizedLinear):
            linear = model.get_submodule(name)
            tensors = scheme.quantize(linear.weight.detach()) | {"bias": linear.bias.detach()}
            module.load_state_dict(tensors, assign=True)
    return made.eval()

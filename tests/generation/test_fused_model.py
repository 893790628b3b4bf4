"""The fused model against the plain one, in float32; without a GPU, by Triton's interpreter.

Here PyTorch's product takes the place of `skinny_gemm.cu`, which `tests/kernels` tries on a GPU.
"""

from __future__ import annotations

import copy
import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined
pytest.importorskip("triton", reason="needs triton, which PyTorch for CUDA brings along")

from plug.generation.fused_model import FusedModel
from plug.generation.model_runner import Engine
from plug.generation.plain_model import PlainModel
from plug.generation.scheduler import Row, write
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


def fused_engine(model: Plug) -> Engine:
    engine = Engine(model)
    engine._model = FusedModel(model)  # which a model in float32 does not get by itself
    return engine


def written(engine: Engine, prompts: list[list[int]]) -> list[list[int]]:
    rules = PlugRules(engine.config, window=4, out_length=7)
    settings = GenerationSettings(temperature=3.0, top_k=0)
    rows = [Row(prompt, rules, settings, seed) for seed, prompt in enumerate(prompts)]
    write(engine, rows)
    return [row.written for row in rows]


@torch.inference_mode()
def test_it_writes_what_the_plain_model_writes(lively_model: Plug) -> None:
    plain = written(Engine(copy.deepcopy(lively_model)), PROMPTS)

    assert written(fused_engine(lively_model), PROMPTS) == plain
    assert any(len(ids) > 4 for ids in plain)  # a second window was read


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
    assert type(Engine(lively_model.to(dtype))._model) is expected


@torch.inference_mode()
def test_logits_are_those_of_the_plain_model(lively_model: Plug) -> None:
    sources = [[2, *prompt, 3] for prompt in PROMPTS]
    plain, fused = Engine(copy.deepcopy(lively_model)), fused_engine(lively_model)
    for engine in (plain, fused):
        engine.start(sources, capacity=2)

    for position in range(2):
        ids = [60 + position + row for row in range(len(PROMPTS))]
        expected = plain.step(ids, [position] * len(ids))
        torch.testing.assert_close(fused.step(ids, [position] * len(ids)), expected)


@torch.inference_mode()
def test_tokens_may_stand_apart_in_memory(lively_model: Plug) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    table = torch.tensor([[60, 5], [61, 6]], device=device)
    first = torch.zeros(2, dtype=torch.long, device=device)
    engine = fused_engine(lively_model)
    engine.start([[2, 9, 8, 3]] * 2, capacity=1)

    expected = engine.decode(torch.tensor([60, 61], device=device), first, 1)
    assert torch.equal(engine.decode(table[:, 0], first, 1), expected)


@torch.inference_mode()
def test_several_positions_at_once_are_those_of_the_plain_model(lively_model: Plug) -> None:
    sources = [[2, *prompt, 3] for prompt in PROMPTS]
    plain, fused = Engine(copy.deepcopy(lively_model)), fused_engine(lively_model)
    ids = torch.arange(60, 60 + 8 * len(PROMPTS), device=plain.device).view(-1, 8)
    for engine in (plain, fused):
        engine.start(sources, capacity=8)

    # The second time, rows stand at different positions and one of them repeats its last token.
    for positions in ([[0, 1, 2]] * 4, [[3, 4, 5], [3, 4, 4], [2, 3, 4], [1, 2, 3]]):
        where = torch.tensor(positions, device=plain.device)
        expected = plain.decode_several(ids.gather(1, where), where, 6)
        got = fused.decode_several(ids.gather(1, where), where, 6)
        torch.testing.assert_close(got, expected)


@torch.inference_mode()
def test_quantized_weights_are_read_as_the_plain_model_reads_them(lively_model: Plug) -> None:
    plain_model = quantized(lively_model, 8)  # tests/kernels/test_packed_linear.py has 4 bits
    plain, fused = Engine(plain_model), fused_engine(copy.deepcopy(plain_model))
    for engine in (plain, fused):
        engine.start([[2, *PROMPTS[0], 3]], capacity=1)

    got, expected = fused.step([2], [0]), plain.step([2], [0])

    # The CPU rounds activations to 8 bits, a GPU reads sources in FP8.
    assert (got - expected).norm() < 0.1 * expected.norm()


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

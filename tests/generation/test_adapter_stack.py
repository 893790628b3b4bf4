"""Rows with different adapters in one pass, beside models that have an adapter in their weights."""

from __future__ import annotations

import copy
import dataclasses
import gc
import os
import re
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined

from plug.distributed.processes import Processes
from plug.errors import PlugError, UsageError
from plug.generation.adapter_stack import AdapterStack
from plug.generation.async_engine import AsyncEngine
from plug.generation.cpu_model import CpuModel
from plug.generation.generator import Generator
from plug.generation.kv_cache import DecoderCache
from plug.generation.plain_model import PlainModel
from plug.hf.adapters import TARGET_MODULES
from plug.loading.adapters import Adapter, LowRank, attach
from plug.model.plug import Plug
from plug.tokenization import PlugTokenizer

TEXTS = ["今天天气", "山上有座庙", "我们去公园看花。", "好"]


def new_adapter(model: Plug, seed: int, rank: int, only: str = "") -> Adapter:
    """An adapter of all layers whose names contain ``only``, strong enough to change texts."""
    generator = torch.Generator().manual_seed(seed)
    adapter = Adapter(Path(f"adapter-{seed}"))
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and re.fullmatch(TARGET_MODULES, name) and only in name:
            out, inputs = layer.weight.shape
            a = torch.randn(rank, inputs, generator=generator) / inputs**0.5
            adapter.layers[name] = LowRank(a, torch.randn(out, rank, generator=generator) / 2)
    return adapter


@pytest.fixture
def adapters(lively_model: Plug) -> list[Adapter]:
    return [
        new_adapter(lively_model, 1, 3),
        new_adapter(lively_model, 2, 8),
        new_adapter(lively_model, 3, 2, "decoder.layers.0.cross_attention"),
        new_adapter(lively_model, 4, 5, "encoder"),
    ]


@pytest.fixture
def merged(
    lively_model: Plug, tiny_tokenizer: PlugTokenizer, adapters: list[Adapter]
) -> list[Generator]:
    """Generators of the model alone, and of the model with each adapter in its weights."""
    found = [Generator(copy.deepcopy(lively_model), tiny_tokenizer)]
    for adapter in adapters:
        model = copy.deepcopy(lively_model)
        attach(model, adapter)
        found.append(Generator(model, tiny_tokenizer))
    return found


@pytest.fixture(params=[CpuModel, PlainModel])
def shared(
    request: pytest.FixtureRequest, lively_model: Plug, tiny_tokenizer: PlugTokenizer
) -> Generator:
    """Takes adapters; its model is each of the classes."""
    found = Generator(lively_model, tiny_tokenizer, takes_adapters=True, reuse_bytes=2**20)
    found.prepared.model = request.param(lively_model, adapters=found.prepared.adapters)
    return found


def test_texts_of_one_batch_are_those_of_each_adapter_alone(
    shared: Generator, merged: list[Generator], adapters: list[Adapter]
) -> None:
    numbers = [0, *(shared.add_adapter(each) for each in adapters)]
    options: dict[str, Any] = {"out_length": 40, "temperature": 1.2, "window": 16, "seed": 5}
    with AsyncEngine(shared, rows=4) as engine:
        requests = {
            (number, text): engine.submit(text, adapter=number, **options)
            for text in TEXTS
            for number in numbers
        }
        found = {case: request.result() for case, request in requests.items()}

    for (number, text), result in found.items():
        assert result.token_ids == merged[number](text, **options).token_ids, (number, text)
    assert len({found[number, TEXTS[0]].token_ids for number in numbers}) == len(numbers)


def test_greedy_texts_of_a_mixed_batch_are_those_of_merged_adapters(
    shared: Generator, merged: list[Generator], adapters: list[Adapter]
) -> None:
    """The adapters are in the weights, not beside them: sums in another order, the same texts."""
    numbers = [0, *(shared.add_adapter(each) for each in adapters)]
    check_greedy_texts(shared, merged, numbers)


@pytest.mark.gpu
def test_greedy_texts_of_a_mixed_batch_in_cuda_graphs(
    lively_model: Plug, tiny_tokenizer: PlugTokenizer, adapters: list[Adapter]
) -> None:
    """In float32, where a near-tie does not decide; 30 texts at once want graphs of many rows."""
    lively_model.cuda()
    shared = Generator(lively_model, tiny_tokenizer, takes_adapters=True)
    merged = [Generator(copy.deepcopy(lively_model), tiny_tokenizer)]
    for adapter in adapters:
        model = copy.deepcopy(lively_model)
        attach(model, adapter)
        merged.append(Generator(model, tiny_tokenizer))
    assert shared.prepared.uses_graphs
    numbers = [0, *(shared.add_adapter(each) for each in adapters)]
    check_greedy_texts(shared, merged, numbers)
    shared.remove_adapter(numbers[1])  # graphs hold the matrices of before
    again = shared.add_adapter(adapters[0])
    check_greedy_texts(shared, merged, [0, again, *numbers[2:]])


def check_greedy_texts(
    shared: Generator, merged: Sequence[Generator], numbers: Sequence[int]
) -> None:
    """All texts of all adapters in one batch, against each adapter's own model."""
    options: dict[str, Any] = {"out_length": 24, "do_sample": False}
    with AsyncEngine(shared, rows=30, max_waiting=100) as engine:
        requests = [
            (index, text, engine.submit(text, adapter=number, **options))
            for text in [*TEXTS, *(text + "树" for text in TEXTS)]
            for index, number in enumerate(numbers)
        ]
        found = [(index, text, request.result()) for index, text, request in requests]

    assert len({result.token_ids for _, _, result in found}) > len(numbers)
    for index, text, result in found:
        assert result.token_ids == merged[index](text, **options).token_ids, (index, text)


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"prompt_lookup_num_tokens": 6}], ids=str)
def test_other_ways_to_write(
    options: dict[str, Any],
    shared: Generator,
    merged: list[Generator],
    adapters: list[Adapter],
) -> None:
    number = shared.add_adapter(adapters[0])
    options |= {"out_length": 20, "do_sample": False}

    for each in (number, 0):
        mine, others = shared(TEXTS, adapter=each, **options), merged[each](TEXTS, **options)
        assert [x.token_ids for x in mine] == [x.token_ids for x in others]


def test_adapters_come_and_go_while_texts_are_written(
    shared: Generator, merged: list[Generator], adapters: list[Adapter]
) -> None:
    options: dict[str, Any] = {"out_length": 60, "min_length": 60, "seed": 5}
    first = shared.add_adapter(adapters[0])
    with AsyncEngine(shared, rows=3) as engine:
        long = engine.submit(TEXTS[0], adapter=first, **options)
        next(iter(long))
        second = shared.add_adapter(adapters[1])
        other = engine.submit(TEXTS[0], adapter=second, **options).result()
        shared.remove_adapter(second)
        third = shared.add_adapter(adapters[3])
        last = engine.submit(TEXTS[0], adapter=third, **options).result()
        kept = long.result()
        with pytest.raises(UsageError, match="没有编号为 2 的适配器"):
            engine.submit(TEXTS[0], adapter=second)

    assert third == 3  # a number is not used again: what was encoded for it is kept
    for result, index in ((kept, 1), (other, 2), (last, 4)):
        assert result.token_ids == merged[index](TEXTS[0], **options).token_ids


@torch.inference_mode()
def test_the_fused_model_adds_the_same(lively_model: Plug, adapters: list[Adapter]) -> None:
    """In float32, by Triton's interpreter where there is no GPU."""
    pytest.importorskip("triton", reason="needs triton, which PyTorch for CUDA brings along")
    from plug.generation.fused_model import FusedModel

    lively_model.to("cuda" if torch.cuda.is_available() else "cpu")
    device = lively_model.embeddings.word_embeddings.weight.device
    sources = [[2, 9, 8, 3], [2, 30, 3], [2, 9, 8, 3]]
    ids = torch.tensor([[2, 60], [2, 61], [2, 60]], device=device)
    where = torch.tensor([[0, 1]] * 3, device=device)
    found = []
    for make in (PlainModel, FusedModel):
        stack = AdapterStack(lively_model)
        made: Any = make(copy.deepcopy(lively_model), adapters=stack)
        numbers = [stack.add(adapters[0]), 0, stack.add(adapters[1])]
        encoded = made.encode(sources, numbers)
        cache = DecoderCache(
            encoded[0][0][0], layers=len(encoded[0]), rows=3, source_length=4, capacity=4
        )
        cache.put_sources(range(3), encoded)
        stack.use(torch.tensor(numbers, device=device))
        logits = made.decode(ids, where, 2, cache)
        stack.use(0)
        found.append((logits, made.decode(ids, where, 2, cache)))

    torch.testing.assert_close(found[1], found[0])
    assert (found[0][0][0] - found[0][1][0]).abs().max() > 0.01
    torch.testing.assert_close(found[0][0][1], found[0][1][1])  # the row without an adapter


def test_what_does_not_fit_is_refused(lively_model: Plug, tiny_tokenizer: PlugTokenizer) -> None:
    stack = AdapterStack(lively_model)
    good = new_adapter(lively_model, 1, 2)
    name, low_rank = next(iter(good.layers.items()))
    dora = dataclasses.replace(
        good, layers={name: dataclasses.replace(low_rank, magnitude=torch.ones(len(low_rank.b)))}
    )
    with pytest.raises(UsageError, match=r"DoRA.*plug merge"):
        stack.add(dora)
    with pytest.raises(UsageError, match="输出层"):
        stack.add(dataclasses.replace(good, head={"classifier.bias": torch.ones(2)}))
    with pytest.raises(PlugError, match="与模型不符"):
        stack.add(dataclasses.replace(good, layers={"decoder.layers.9.fc1": low_rank}))
    assert not stack.adapters
    with pytest.raises(UsageError, match="takes_adapters"):
        Generator(lively_model, tiny_tokenizer).add_adapter(good)
    two = Processes(rank=0, world_size=2, device=torch.device("cpu"))
    with pytest.raises(UsageError, match=r"多个进程.*plug merge"):
        Generator(processes=two, takes_adapters=True)


def test_the_last_adapter_that_goes_leaves_no_memory(
    lively_model: Plug, adapters: list[Adapter]
) -> None:
    stack = AdapterStack(lively_model)
    PlainModel(lively_model, adapters=stack)

    def held() -> int:
        return sum(
            value.nbytes
            for added in stack._added.values()
            for value in vars(added).values()
            if isinstance(value, torch.Tensor)
        )

    number = stack.add(adapters[0])
    assert held() > 0
    stack.remove(number)

    assert held() == 0


def test_an_adapter_that_was_used_is_freed_when_it_goes(
    shared: Generator, adapters: list[Adapter]
) -> None:
    stack = shared.prepared.adapters
    assert stack is not None
    number = shared.add_adapter(copy.deepcopy(adapters[0]))
    kept = [weakref.ref(each.a) for each in stack.adapters[number].layers.values()]
    shared(TEXTS[0], adapter=number, out_length=2)
    shared.remove_adapter(number)
    shared(TEXTS[0], out_length=2)
    gc.collect()

    assert kept
    assert not any(each() is not None for each in kept)

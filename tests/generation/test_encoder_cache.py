"""What is kept of earlier sources changes nothing but how often the encoder runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from plug.errors import UsageError
from plug.generation.async_engine import AsyncEngine
from plug.generation.encoder_cache import EncoderCache
from plug.generation.generator import Generator, generate
from plug.generation.model_runner import ModelRunner, PreparedModel, Size
from plug.generation.pipeline import TextGenerationPipeline
from plug.generation.settings import GenerationSettings
from plug.model.layers import KeyValue
from plug.model.plug import Plug
from plug.tokenization import PlugTokenizer

Sources = Sequence[Sequence[int]]


def count_reads(prepared: PreparedModel) -> list[list[int]]:
    """The sources that the encoder reads from now on."""
    read: list[list[int]] = []
    encode = prepared.model.encode

    def counted(sources: Sources) -> list[list[KeyValue]]:
        read.extend(list(source) for source in sources)
        return encode(sources)

    prepared.model.encode = counted  # type: ignore[method-assign]
    return read


@pytest.fixture
def make_generator(lively_model: Plug, tiny_tokenizer: PlugTokenizer) -> Callable[[int], Generator]:
    return lambda reuse_bytes: Generator(lively_model, tiny_tokenizer, reuse_bytes=reuse_bytes)


OPTIONS: list[dict[str, Any]] = [
    {"do_sample": False, "out_length": 20},
    {"out_length": 30, "window": 7, "temperature": 2.0},
    {"out_length": 20, "num_beams": 3},
    {"out_length": 30, "window": 7, "mode": "original", "do_sample": False},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_repeated_source_gives_the_same_and_is_read_once(
    options: dict[str, Any], make_generator: Callable[[int], Generator]
) -> None:
    texts = ["山上有座庙", "公园", "山上有座庙"]
    expected = generate(texts, model=make_generator(0), seed=[1, 2, 1], **options)
    generator = make_generator(10**6)
    read = count_reads(generator.prepared)

    first = generate(texts, model=generator, seed=[1, 2, 1], **options)
    after_first = len(read)
    again = generate(texts, model=generator, seed=[1, 2, 1], **options)

    assert [each.token_ids for each in first] == [each.token_ids for each in expected]
    assert [each.token_ids for each in again] == [each.token_ids for each in expected]
    assert after_first == len(set(map(tuple, read))), "read twice"
    assert len(read) == after_first


def test_pipeline_and_async_engine_reuse_what_generate_read(
    make_generator: Callable[[int], Generator],
) -> None:
    plain, generator = make_generator(0), make_generator(10**6)
    expected = [generate("公园", model=plain, seed=seed, out_length=20) for seed in range(3)]
    read = count_reads(generator.prepared)

    results = [generate("公园", model=generator, seed=0, out_length=20).text]
    pipe = TextGenerationPipeline(generator)
    results += [each["generated_text"] for each in pipe("公园", seed=1, out_length=20)]
    with AsyncEngine(generator, rows=2) as engine:
        request = engine.submit("公园", GenerationSettings(out_length=20), seed=2)
        results.append(request.result().text)

    assert results == [each.text for each in expected]
    assert len(read) == 1


def test_a_source_that_differs_in_one_id_is_not_taken_for_another(lively_model: Plug) -> None:
    base = [2, 9, 8, 7, 6, 3]
    sources = [base, *([*base[:at], 40, *base[at + 1 :]] for at in range(len(base))), base[:-1]]
    keeping, plain = (
        ModelRunner(PreparedModel(lively_model, reuse_bytes=size), Size(1, 6, 1))
        for size in (10**6, 0)
    )

    for source in sources * 2:
        for each in (keeping, plain):
            each.start([source])
        assert torch.equal(keeping.logits([2], [0]), plain.logits([2], [0]))


def test_what_is_kept_is_not_changed_by_writing(make_generator: Callable[[int], Generator]) -> None:
    generator = make_generator(10**6)
    generate("公园", model=generator, out_length=5, seed=0)
    [(source, pairs)] = generator.prepared.encoder_cache._kept.items()
    before = [states.clone() for pair in pairs for states in pair]

    generate(["山上有座庙", "公园"], model=generator, out_length=40, window=9, seed=0)

    after = [states for pair in generator.prepared.encoder_cache._kept[source] for states in pair]
    assert all(map(torch.equal, before, after))


def key_values(source: Sequence[int]) -> list[KeyValue]:
    """A layer of 8 bytes a token, made of the ids, in memory shared with a larger batch."""
    whole = torch.tensor([source, source], dtype=torch.float32).view(2, 1, -1, 1)
    return [(whole[0], whole[1])]


@given(
    limit=st.integers(0, 200),
    calls=st.lists(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=9), max_size=4)),
)
def test_the_bound_holds_and_the_least_recently_used_goes_first(
    limit: int, calls: list[list[list[int]]]
) -> None:
    kept = EncoderCache(limit)
    order: list[tuple[int, ...]] = []  # a plain list as the model: oldest first

    for sources in calls:
        read: list[tuple[int, ...]] = []

        def encode(missing: Sources, read: list[tuple[int, ...]] = read) -> list[list[KeyValue]]:
            read.extend(map(tuple, missing))
            return [key_values(source) for source in missing]

        result = kept.encode(sources, encode)

        for [(key, value)], source in zip(result, sources, strict=True):
            assert key.flatten().tolist() == value.flatten().tolist() == source
        asked = list(dict.fromkeys(map(tuple, sources)))
        assert read == [key for key in asked if key not in order] or not limit
        for each in asked:
            if each in order:
                order.remove(each)
            elif 8 * len(each) > limit:
                continue
            order.append(each)
            while sum(8 * len(other) for other in order) > limit:
                order.pop(0)
        held = [states for pairs in kept._kept.values() for pair in pairs for states in pair]
        assert list(kept._kept) == order
        assert sum(states.untyped_storage().nbytes() for states in held) == kept.num_bytes <= limit


@pytest.mark.parametrize("value", [-1, 1.5, True])
def test_a_bound_out_of_range_is_refused(
    value: Any, make_generator: Callable[[int], Generator]
) -> None:
    with pytest.raises(UsageError, match="reuse_bytes"):
        make_generator(value)

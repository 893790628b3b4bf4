"""Continuous batching against each text written alone."""

from __future__ import annotations

import gc
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch import Tensor

from plug.errors import PlugError, UsageError
from plug.generation.async_engine import AsyncEngine, Progress, Request
from plug.generation.generator import Generator, generate
from plug.generation.settings import GenerationSettings
from plug.loading.load import load
from plug.loading.save import save
from plug.model.plug import Plug
from plug.quantization.convert import quantize_directory
from plug.tokenization import PlugTokenizer

CASES: list[tuple[str, dict[str, Any]]] = [
    ("山上有座庙", {"do_sample": False, "out_length": 30}),
    ("今天天气很好，我们去公园看花。", {"temperature": 1.5, "top_k": 50, "out_length": 7}),
    ("我" * 60, {"top_k": 0, "top_p": 0.7, "out_length": 120, "window": 25}),
    ("好", {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2, "out_length": 40}),
    ("庙", {"mode": "original", "temperature": 3.0, "window": 7, "out_length": 33}),
    ("公园", {"out_length": 1}),
    ("看花", {"min_length": 20, "temperature": 2.0, "out_length": 50}),
]


@pytest.fixture
def engine(generator: Generator) -> Iterator[AsyncEngine]:
    with AsyncEngine(generator, rows=3, max_waiting=8) as engine:
        yield engine


@pytest.fixture
def hold(generator: Generator) -> Iterator[threading.Event]:
    """Steps wait while the event is not set, which it is at first."""
    may_step = threading.Event()
    may_step.set()
    decode = generator.prepared.model.decode

    def held(*inputs: Any) -> Tensor:
        may_step.wait(20)
        return decode(*inputs)

    generator.prepared.model.decode = held  # type: ignore[method-assign]
    yield may_step
    may_step.set()


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


@pytest.mark.parametrize("order", [1, -1])
def test_each_text_is_what_it_is_alone_whoever_joins_and_leaves(
    order: int, generator: Generator
) -> None:
    cases = CASES[::order]
    alone = [
        generate(text, model=generator, seed=index, **options)
        for index, (text, options) in enumerate(cases)
    ]

    with AsyncEngine(generator, rows=3, max_waiting=8) as engine:
        requests = [
            engine.submit(text, GenerationSettings(**options), seed=index)
            for index, (text, options) in enumerate(cases)
        ]
        results = [request.result() for request in requests]

    for result, expected in zip(results, alone, strict=True):
        assert result.token_ids == expected.token_ids
        assert result.text == expected.text
        assert result.finish_reason == expected.finish_reason
        assert result.prompt_token_count == expected.prompt_token_count
    assert len({len(result.token_ids) for result in results}) > 4, "all alike: no test"


def test_threads_submit_and_read_at_once(engine: AsyncEngine, generator: Generator) -> None:
    texts: dict[int, str] = {}

    def ask(seed: int) -> None:
        settings = GenerationSettings(out_length=5 + seed, temperature=2.0)
        texts[seed] = "".join(engine.submit("山上", settings, seed=seed))

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)

    engine.close()
    for seed in range(6):
        alone = generate("山上", model=generator, out_length=5 + seed, temperature=2.0, seed=seed)
        assert texts[seed] == alone.text


def test_the_first_to_come_are_the_first_to_be_written(
    engine: AsyncEngine, generator: Generator
) -> None:
    joined: list[int] = []
    encode = generator.prepared.encode

    def spy(sources: list[list[int]], numbers: list[int]) -> Any:
        joined.extend(source[1] for source in sources)
        return encode(sources, numbers)

    generator.prepared.encode = spy  # type: ignore[method-assign, assignment]
    settings = GenerationSettings(out_length=6, min_length=6)
    characters = "山天气很好我们去"
    requests = [engine.submit(text, settings) for text in characters]
    for request in requests:
        request.result()

    assert joined == [generator.tokenizer.encode(text)[0] for text in characters]


@pytest.mark.parametrize(
    ("limit", "texts", "groups"),
    [
        (10, ["山上有座庙"] * 2 + ["今天天气"] * 2, [2, 2]),  # a prompt's tokens count once
        (14, ["山上有座庙", "今天天气", "我去看花"], [2, 1]),
        (5, ["山上有座庙", "今天天气"], [1, 1]),  # longer than the limit: alone
        (None, ["山上有座庙", "今天天气", "我去看花"], [3]),
    ],
)
def test_a_step_encodes_no_more_than_so_many_tokens(
    limit: int | None,
    texts: list[str],
    groups: list[int],
    generator: Generator,
    hold: threading.Event,
) -> None:
    joined: list[int] = []
    encode = generator.prepared.encode

    def spy(sources: list[list[int]], numbers: list[int]) -> Any:
        joined.append(len(sources))
        return encode(sources, numbers)

    generator.prepared.encode = spy  # type: ignore[method-assign, assignment]
    settings = GenerationSettings(out_length=6, min_length=6)
    hold.clear()
    with AsyncEngine(generator, rows=5, max_num_batched_tokens=limit) as engine:
        first = engine.submit("庙", settings)
        wait_until(lambda: not engine._waiting)
        requests = [engine.submit(text, settings, seed=3) for text in texts]
        hold.set()
        results = [request.result() for request in [first, *requests]]
        expected = generator(texts, settings, seed=3)

    assert joined == [1, *groups, len(texts)]
    assert [each.text for each in results[1:]] == [each.text for each in expected]


def test_texts_that_come_one_by_one_wait_for_each_other_while_others_run(
    engine: AsyncEngine,
) -> None:
    """As on a GPU, where each encoding takes the host long. The engine's own thread sleeps here."""
    running: Any = SimpleNamespace(running=[object()])
    idle: Any = SimpleNamespace(running=[])

    def comes(seconds_ago: float = 0.0, tokens: int = 4) -> None:
        source, began = [0] * tokens, time.perf_counter() - seconds_ago
        work: Any = SimpleNamespace(sequence=SimpleNamespace(source=source), began=began)
        engine._waiting.append(work)

    assert not engine._gathers(running)
    engine._gather_seconds, engine._encoded_at_once = 60.0, 100
    comes()
    assert engine._gathers(running)  # more may come
    assert not engine._gathers(running)  # nobody came
    engine._seen = 0
    assert not engine._gathers(idle)  # nothing runs meanwhile
    engine._seen = 0
    comes()
    assert not engine._gathers(running)  # both slots that are free are taken
    engine._waiting.clear()
    engine._seen = 0
    comes(tokens=100)
    assert not engine._gathers(running)  # as much as is encoded at once
    engine._waiting.clear()
    engine._seen = 0
    comes(seconds_ago=61)
    assert not engine._gathers(running)  # it has waited long enough
    engine._waiting.clear()


def test_too_many_waiting_are_refused_and_the_others_go_on(
    engine: AsyncEngine, hold: threading.Event
) -> None:
    hold.clear()
    settings = GenerationSettings(out_length=3, min_length=3)
    going = [engine.submit("山上", settings)]
    wait_until(lambda: not engine._waiting)
    going += [engine.submit("山上", settings) for _ in range(8)]

    with pytest.raises(PlugError, match="8 个，满了"):
        engine.submit("山上", settings)

    hold.set()
    assert [len(each.result().token_ids) for each in going] == [3] * 9


def leave_with_cancel(request: Request) -> None:
    request.cancel()


def leave_the_block(request: Request) -> None:
    with pytest.raises(ConnectionError), request:
        raise ConnectionError


@pytest.mark.parametrize("leave", [leave_with_cancel, leave_the_block])
def test_a_cancelled_text_makes_room_and_the_others_are_unharmed(
    leave: Callable[[Request], None], engine: AsyncEngine, generator: Generator
) -> None:
    endless = GenerationSettings(out_length=100_000, min_length=100_000)
    others = [engine.submit("山上", endless) for _ in range(2)]
    kept = engine.submit("庙", GenerationSettings(out_length=40), seed=3)
    waiting = engine.submit("公园", GenerationSettings(out_length=5), seed=4)
    next(iter(others[0]))

    for other in others:
        leave(other)

    kept_result, waiting_result = kept.result(), waiting.result()
    with pytest.raises(PlugError, match="取消"):
        others[0].result()
    engine.close()
    expected = generate("庙", model=generator, out_length=40, seed=3)
    assert kept_result.token_ids == expected.token_ids
    expected = generate("公园", model=generator, out_length=5, seed=4)
    assert waiting_result.token_ids == expected.token_ids


def test_a_request_that_nobody_refers_to_any_more_is_cancelled(engine: AsyncEngine) -> None:
    endless = GenerationSettings(out_length=100_000, min_length=100_000)
    pieces = [iter(engine.submit("山上", endless)) for _ in range(3)]
    for each in pieces:
        next(each)

    del pieces, each  # as when the connection that read them is gone
    gc.collect()

    assert (
        len(engine.submit("庙", GenerationSettings(out_length=4, min_length=4)).result().token_ids)
        == 4
    )


def test_what_waits_can_be_cancelled_too(engine: AsyncEngine, hold: threading.Event) -> None:
    hold.clear()
    settings = GenerationSettings(out_length=2)
    going = [engine.submit("山上", settings) for _ in range(3)]
    waiting = engine.submit("庙", settings)
    waiting.cancel()
    hold.set()

    with pytest.raises(PlugError, match="取消"):
        waiting.result()
    for each in going:
        each.result()


@pytest.mark.parametrize(
    ("text", "options", "says"),
    [
        ("山上", {"window": 41, "out_length": 50}, r"window=41 超过缓存的长度 40"),
        ("山上", {"window": 97, "out_length": 20}, "window=97"),
        ("山上", {"num_beams": 2}, "num_beams=1"),
        ("山上", {"num_return_sequences": 2}, "提交 2 次"),
        ("", {}, "空"),
    ],
)
def test_what_cannot_be_written_is_refused_at_once_and_the_others_go_on(
    text: str, options: dict[str, Any], says: str, generator: Generator
) -> None:
    with AsyncEngine(generator, rows=2, capacity=40) as engine:
        other = engine.submit("庙", GenerationSettings(out_length=20, min_length=20))
        with pytest.raises(UsageError, match=says):
            engine.submit(text, GenerationSettings(**options))
        assert len(other.result().token_ids) == 20


def test_a_text_longer_than_the_caches_is_written_in_windows(generator: Generator) -> None:
    with AsyncEngine(generator, rows=2, capacity=40) as engine:
        result = engine.submit("庙", GenerationSettings(out_length=100), seed=1).result()

    expected = generate("庙", model=generator, out_length=100, window=40, seed=1)
    assert result.token_ids == expected.token_ids


def test_closing_fails_what_is_not_done(generator: Generator) -> None:
    engine = AsyncEngine(generator, rows=1)
    endless = GenerationSettings(out_length=100_000, min_length=100_000)
    requests = [engine.submit("山上", endless) for _ in range(2)]

    engine.close()

    for request in requests:
        with pytest.raises(PlugError, match="关闭"):
            request.result()
    with pytest.raises(PlugError, match="关闭"):
        engine.submit("山上")


def test_a_step_that_fails_ends_its_requests_and_no_others(
    generator: Generator, caplog: pytest.LogCaptureFixture
) -> None:
    """The device fails once, with one request on it and one waiting."""
    decode = generator.prepared.model.decode
    may_fail = threading.Event()

    def fail_once(*_: Any) -> Tensor:
        generator.prepared.model.decode = decode  # type: ignore[method-assign]
        may_fail.wait(20)
        raise RuntimeError("设备坏了")

    expected = generate("庙", model=generator, out_length=5, seed=3)
    generator.prepared.model.decode = fail_once  # type: ignore[method-assign]
    with AsyncEngine(generator, rows=1) as engine:
        broken = engine.submit("山上", out_length=5)
        waiting = engine.submit("庙", out_length=5, seed=3)
        may_fail.set()
        with pytest.raises(PlugError, match="设备坏了"):
            broken.result()
        assert waiting.result().token_ids == expected.token_ids
        assert engine.submit("庙", out_length=5, seed=3).result().text == expected.text
    assert "1 个请求失败" in caplog.text


def test_what_goes_wrong_for_one_request_is_its_own(generator: Generator) -> None:
    """Its detokenizer fails, in the middle of the text."""
    expected = generate("庙", model=generator, out_length=20, min_length=20, seed=3)
    with AsyncEngine(generator, rows=2) as engine:
        broken = engine.submit("山上", out_length=20, min_length=20, seed=1)
        other = engine.submit("庙", out_length=20, min_length=20, seed=3)
        pushed = 0

        def fail_later(_: int) -> bool:
            nonlocal pushed
            pushed += 1
            if pushed > 5:
                raise ValueError("坏了")
            return False

        broken._work.sequence.detokenizer.push = fail_later  # type: ignore
        with pytest.raises(PlugError, match=r"ValueError：坏了.*不受影响"):
            broken.result()
        assert other.result().token_ids == expected.token_ids


@pytest.mark.parametrize(
    "options", [{"do_sample": False}, {}, {"top_k": 0}, {"prompt_lookup_num_tokens": 8}], ids=str
)
def test_a_request_that_forbids_every_token_fails_alone(
    options: dict[str, Any], generator: Generator
) -> None:
    """`no_repeat_ngram_size=1` forbids each id of a small vocabulary in turn."""
    hostile = {"out_length": 400, "min_length": 400, "no_repeat_ngram_size": 1, "seed": 1}
    expected = generate("庙", model=generator, out_length=30, seed=3)
    with AsyncEngine(generator, rows=2) as engine:
        request = engine.submit("山上", **hostile, **options)
        good = engine.submit("庙", out_length=30, seed=3)
        assert good.result().token_ids == expected.token_ids
        with pytest.raises(UsageError, match="禁止了所有的词元"):
            request.result()
        assert engine.submit("庙", out_length=30, seed=3).result().text == expected.text
    with pytest.raises(UsageError, match="禁止了所有的词元"):
        generate("山上", model=generator, **hostile, **options)


def test_waiting_for_a_result_may_end_before_the_text(
    engine: AsyncEngine, hold: threading.Event
) -> None:
    hold.clear()
    request = engine.submit("山上", out_length=5, min_length=5)
    with pytest.raises(TimeoutError, match="还没有写完"):
        request.result(timeout=0.05)
    hold.set()
    assert len(request.result(timeout=20).token_ids) == 5
    assert len(request.result(timeout=0).token_ids) == 5


def test_options_are_keywords_or_settings_or_both(
    engine: AsyncEngine, generator: Generator
) -> None:
    settings = GenerationSettings(out_length=9, temperature=2.0)
    expected = generator("山上", settings, seed=1, out_length=5)
    assert len(expected.token_ids) == 5
    assert engine.submit("山上", settings, seed=1, out_length=5).result().text == expected.text
    with pytest.raises(UsageError, match=r"out_lengt.*out_length"):
        engine.submit("山上", out_lengt=5)


def test_the_generator_serves_other_calls_meanwhile(
    engine: AsyncEngine, generator: Generator
) -> None:
    expected = generate("庙", model=generator, out_length=20, seed=3)
    endless = engine.submit("山上", out_length=100_000, min_length=100_000)
    next(iter(endless))

    assert generate("庙", model=generator, out_length=20, seed=3).token_ids == expected.token_ids
    endless.cancel()


@pytest.mark.parametrize("name", ["rows", "max_waiting", "capacity", "max_num_batched_tokens"])
def test_a_size_out_of_range_is_refused(name: str, generator: Generator) -> None:
    with pytest.raises(UsageError, match=f"{name}=0"):
        AsyncEngine(generator, **{name: 0})


def test_an_engine_may_be_made_of_a_directory(model_directory: Path, generator: Generator) -> None:
    with AsyncEngine(model_directory) as engine:
        written = engine.submit("山上", out_length=5, seed=1).result()
    with AsyncEngine(Generator(model_directory)) as engine:
        assert engine.submit("山上", out_length=5, seed=1).result().token_ids == written.token_ids
    with pytest.raises(UsageError, match=r"AsyncEngine 要一个 plug\.Generator.*而不是 list"):
        AsyncEngine([generator])


def test_a_listener_hears_of_each_step_and_of_the_end(generator: Generator) -> None:
    settings = GenerationSettings(out_length=9, ignore_eos=True, logprobs=1)
    heard: list[Progress] = []
    done = threading.Event()

    def listen(news: Progress) -> None:
        heard.append(news)
        if news.result is not None:
            done.set()

    with AsyncEngine(generator, rows=2) as engine:
        with engine.submit("今天天气", settings, seed=3, listener=listen):
            assert done.wait(20)
        stats = engine.stats
    [expected] = generator(["今天天气"], settings, seed=3)

    assert "".join(news.text for news in heard) == expected.text
    assert [each for news in heard for each in news.token_ids] == list(expected.token_ids)
    assert [each for news in heard for each in news.logprobs] == list(expected.logprobs or ())
    assert heard[-1].result is not None
    assert heard[-1].result.finish_reason == "length"
    assert [news.result for news in heard[:-1]] == [None] * (len(heard) - 1)
    assert stats.steps >= 9
    assert stats.encoder_seconds > 0
    assert stats.decoder_seconds > 0
    assert stats.cache_bytes > 0


def test_a_listener_hears_that_its_request_was_cancelled(generator: Generator) -> None:
    heard: list[Progress] = []
    with AsyncEngine(generator, rows=2) as engine:
        request = engine.submit(
            "今天天气", out_length=50_000, ignore_eos=True, listener=heard.append
        )
        while not heard:
            time.sleep(0.001)
        request.cancel()
        while heard[-1].error is None:
            time.sleep(0.001)

    assert "已取消" in str(heard[-1].error)


@pytest.mark.parametrize("is_quantized", [False, True])
def test_texts_at_random_with_cancellations_are_what_they_are_alone(
    is_quantized: bool, lively_model: Plug, tiny_tokenizer: PlugTokenizer, tmp_path: Path
) -> None:
    model = lively_model
    if is_quantized:
        save(model, tmp_path / "whole", tokenizer=None)
        quantize_directory(tmp_path / "whole", tmp_path / "small", bits=8)
        model = load(tmp_path / "small")
    generator = Generator(model, tiny_tokenizer)
    draw = random.Random(5)
    cases: list[tuple[str, dict[str, Any]]] = [
        (
            "".join(draw.choices("山上有座庙今天我们去公园看花", k=draw.randint(1, 40))),
            {"seed": draw.randrange(1000), "out_length": draw.randint(1, 16), "window": 9},
        )
        for _ in range(60)
    ]

    with AsyncEngine(generator, rows=5, max_waiting=len(cases)) as engine:
        engine._gather_seconds = 0.05  # as on a GPU
        requests = [engine.submit(text, **options) for text, options in cases]
        for request in draw.sample(requests, 12):
            request.cancel()
        finished = 0
        for request, (text, options) in zip(requests, cases, strict=True):
            try:
                result = request.result(60)
            except PlugError as error:
                if "取消" not in str(error):
                    raise
                continue
            finished += 1
            assert result.token_ids == generate(text, model=generator, **options).token_ids

    assert finished >= len(cases) - 12


def test_a_program_may_end_with_an_open_engine(model_directory: Path) -> None:
    program = f"""
from plug.generation.async_engine import AsyncEngine
engine = AsyncEngine({str(model_directory)!r}, rows=2)
request = engine.submit("今天", out_length=9000, ignore_eos=True)
next(iter(request))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)

    assert done.returncode == 0, done.stderr

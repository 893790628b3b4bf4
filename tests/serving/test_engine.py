"""The server's engine, with a real model behind it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from plug.generation.generator import Generator
from plug.generation.settings import GenerationSettings
from plug.model.plug import Plug
from plug.serving.engine import Engine
from plug.serving.jobs import End, Piece
from plug.tokenization import PlugTokenizer

PROMPT = [7, 8, 9]
BEAMS = GenerationSettings(num_beams=3, out_length=40, min_length=40, do_sample=False)


@pytest.fixture
def engine(
    lively: Callable[..., Plug], config: Any, tiny_tokenizer: PlugTokenizer
) -> Iterator[Any]:
    engine = Engine(Generator(lively(config), tiny_tokenizer), rows=2)
    yield engine
    engine.close()


class Steps:
    """Steps of the device, of which each waits for a permit."""

    def __init__(self, engine: Engine) -> None:
        model = engine.generator.prepared.model
        self._decode, self.count = model.decode, 0
        self._permits = threading.Semaphore(0)
        model.decode = self._step  # type: ignore[method-assign]

    def _step(self, *inputs: Any) -> torch.Tensor:
        assert self._permits.acquire(timeout=20)
        self.count += 1
        return self._decode(*inputs)

    def allow(self, count: int) -> None:
        self._permits.release(count)


def test_a_beam_search_that_is_cancelled_ends_with_its_step(engine: Engine) -> None:
    steps, heard, ended = Steps(engine), [], threading.Event()

    def listen(news: Piece | End) -> None:
        heard.append(news)
        ended.set()

    handle = engine.submit(PROMPT, BEAMS, 0, listen)
    steps.allow(3)
    while steps.count < 3:
        time.sleep(0.001)
    handle.cancel()
    steps.allow(100)

    assert ended.wait(20)
    assert steps.count <= 5
    assert [str(each.error) for each in heard if isinstance(each, End)] == ["请求已取消。"]
    waits = engine.submit(PROMPT, BEAMS, 0, listen)
    waits.cancel()  # another one begins as if nothing had been
    ended.clear()
    engine.submit(PROMPT, BEAMS, 0, listen)
    while not (isinstance(heard[-1], End) and heard[-1].error is None):
        assert ended.wait(20)
        ended.clear()


def test_closing_ends_a_beam_search(engine: Engine) -> None:
    steps, ended = Steps(engine), threading.Event()
    engine.submit(
        PROMPT, BEAMS, 0,
        lambda news: ended.set() if isinstance(news, End) else None,
    )  # fmt: skip
    steps.allow(1)
    engine.close()
    steps.allow(2)

    assert ended.wait(20)
    assert steps.count <= 3

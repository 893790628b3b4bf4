"""A model in two processes, of which the first answers HTTP."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from torch.distributed import TCPStore

from plug.generation.generator import Generator

Start = Callable[..., tuple[str, list[subprocess.Popen[str]]]]


@pytest.fixture
def start(model_directory: Path) -> Iterator[Start]:
    """`start(*options)`: address of the server, and both processes, as `torchrun` starts them."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # the agent's
    running: list[subprocess.Popen[str]] = []

    def processes(*options: str) -> tuple[str, list[subprocess.Popen[str]]]:
        with socket.socket() as trial:
            trial.bind(("127.0.0.1", 0))
            port = str(trial.getsockname()[1])
        command = [sys.executable, "-m", "plug", "serve", "--model", str(model_directory)]
        command += ["--port", port, "--device", "cpu", "--max-num-seqs", "3", *options]
        for rank in range(2):
            environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
            environment |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "WORLD_SIZE": "2"}
            environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"}
            running.append(
                subprocess.Popen(
                    command, env=os.environ | environment, stderr=subprocess.PIPE, text=True
                )
            )
        address = f"http://127.0.0.1:{port}"
        end = time.monotonic() + 60
        while running[0].poll() is None:
            try:
                urllib.request.urlopen(f"{address}/ready", timeout=5).close()
                break
            except urllib.error.URLError:
                assert time.monotonic() < end
                time.sleep(0.1)
        return address, running

    yield processes
    for each in running:
        each.kill()
        each.communicate()


def complete(address: str, **body: Any) -> Any:
    request = urllib.request.Request(
        f"{address}/v1/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


def ended(processes: list[subprocess.Popen[str]]) -> list[tuple[int, str]]:
    """Exit statuses and what each said."""
    said = [each.communicate(timeout=30)[1] for each in processes]
    return [(each.returncode, text) for each, text in zip(processes, said, strict=True)]


def test_texts_are_those_of_one_process_and_sigterm_ends_both(
    start: Start, model_directory: Path
) -> None:
    address, processes = start()
    bodies = [
        {"prompt": "今天天气", "max_tokens": 30, "seed": 1},
        {"prompt": "山上有座庙", "max_tokens": 9, "seed": 2, "n": 3},
        {"prompt": "我们去公园", "max_tokens": 20, "seed": 3, "stop": "山"},
        {"prompt": "好", "max_tokens": 25, "seed": 4, "prompt_lookup_num_tokens": 4},
    ]
    answers: dict[int, Any] = {}

    def ask(index: int) -> None:
        answers[index] = complete(address, **bodies[index])

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(len(bodies))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    with pytest.raises(urllib.error.HTTPError) as refused:
        complete(address, prompt="好", num_beams=2, max_tokens=5)
    long = threading.Thread(
        target=lambda: answers.update(
            {9: complete(address, prompt="好", max_tokens=300, ignore_eos=True)}
        )
    )
    long.start()
    time.sleep(0.3)
    for each in processes:  # as `torchrun` does
        each.send_signal(signal.SIGTERM)
    long.join(30)

    alone = Generator(model_directory, device="cpu")
    for index, body in enumerate(bodies):
        names = ("seed", "stop", "prompt_lookup_num_tokens")
        options = {name: body[name] for name in names if name in body}
        expected = alone([body["prompt"]], out_length=body["max_tokens"],
                         num_return_sequences=body.get("n", 1), **options)  # fmt: skip
        assert [each["text"] for each in answers[index]["choices"]] == [x.text for x in expected]
    assert refused.value.code == 400
    assert answers[9]["usage"]["completion_tokens"] == 300  # it was drained
    assert [status for status, _ in ended(processes)] == [0, 0]


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_one_that_is_killed_ends_the_other(rank: int, start: Start) -> None:
    address, processes = start()
    complete(address, prompt="好", max_tokens=5)
    processes[rank].kill()
    if rank == 1:  # the first learns of it in its next step
        with pytest.raises((urllib.error.URLError, ConnectionError)):
            complete(address, prompt="好", max_tokens=5)

    [other] = ended([processes[1 - rank]])
    assert other[0] == 1
    assert ("另一个进程中断了" if rank == 0 else "写作的线程已停止") in other[1]


@pytest.mark.slow
def test_what_needs_one_process_is_refused(start: Start, tmp_path: Path) -> None:
    _, processes = start("--models-dir", str(tmp_path))
    found = ended(processes)

    assert [status for status, _ in found] == [2, 2]
    assert "".join(text for _, text in found).count("--models-dir 不能和多个进程一起用") == 1

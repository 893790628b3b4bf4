"""Several processes that work together, without the seconds that `torchrun` takes to start."""

from __future__ import annotations

import json
import multiprocessing
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch.distributed import TCPStore

WORKER = Path(__file__).with_name("worker.py")


@pytest.fixture(scope="session")
def run_together(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[Any]]:
    """`run_together(2, "write", …)`: what each of two processes answers (see `worker.py`)."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["plug.generation.generator"])  # imported once for all

    def run(count: int, function: str, **options: Any) -> list[Any]:
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # the agent's
        answers = [tmp_path_factory.mktemp("answers") / f"{rank}.json" for rank in range(count)]
        processes = []
        for rank, answer in enumerate(answers):
            environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port}
            environment |= {"TORCHELASTIC_USE_AGENT_STORE": True}
            environment |= {"WORLD_SIZE": count, "RANK": rank, "LOCAL_RANK": rank}
            given = {
                "environment": {name: str(value) for name, value in environment.items()},
                "job": (function, options),
                "output": str(answer),
            }
            arguments = (str(WORKER), given, "worker")
            processes.append(context.Process(target=runpy.run_path, args=arguments))
        for process in processes:
            process.start()
        for process in processes:
            process.join(60)
            process.kill()
        assert [process.exitcode for process in processes] == [0] * count
        return [json.loads(answer.read_text(encoding="utf-8")) for answer in answers]

    return run

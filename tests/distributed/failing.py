"""`plug`, started by `torchrun`, whose process FAILING_RANK fails at the fifth step."""

from __future__ import annotations

import os
import sys
from typing import Any

from plug.cli import main
from plug.errors import PlugError
from plug.generation.model_runner import ModelRunner

step = ModelRunner.step
steps = 0


def failing(self: ModelRunner, plan: Any) -> Any:
    global steps
    steps += 1
    if steps == 5:
        raise PlugError("显存用完了。")
    return step(self, plan)


if os.environ["RANK"] == os.environ["FAILING_RANK"]:
    ModelRunner.step = failing  # type: ignore[method-assign]
sys.exit(main())

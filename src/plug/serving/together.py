"""One model in several processes that `torchrun` started: the first answers HTTP.

The others take part in its steps (`plug.generation.async_engine.follow`) and end when it ends.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

import torch

from plug.distributed.processes import Processes
from plug.errors import UsageError
from plug.generation.async_engine import follow
from plug.generation.generator import Generator
from plug.loading.estimate import Room
from plug.serving.loading import serve_plug
from plug.serving.server import serve
from plug.serving.settings import ServeSettings


def serve_together(
    name: str,
    directory: str | Path,
    settings: ServeSettings,
    processes: Processes,
    *,
    dtype: torch.dtype | None,
    on_started: Callable[[str], None],
) -> None:
    """Serve a model that is shared out among ``processes``; arguments as in `load_models`.

    It writes, and does nothing else: understanding needs the whole model in one process.

    Raises:
        UsageError: the model cannot be shared out, or the address cannot be listened on.
        PlugError: it is damaged or does not fit; or the engine stopped.
        RuntimeError: another process is gone.
    """
    if settings.models_dir is not None:
        raise UsageError("--models-dir 不能和多个进程一起用。请去掉它，或用一个进程。")
    rows = settings.max_num_seqs
    generator = Generator(directory, dtype=dtype, room=Room(batch_size=rows), processes=processes)
    if processes.is_first:
        model = serve_plug(name, generator, rows, settings.max_num_batched_tokens)
        serve([model], settings, None, on_started, ends_with_engines=True)
        return
    # `torchrun` and Ctrl-C tell all processes to end; these end when the first one has drained.
    for each in (signal.SIGTERM, signal.SIGINT):
        signal.signal(each, signal.SIG_IGN)
    follow(generator, rows=rows)

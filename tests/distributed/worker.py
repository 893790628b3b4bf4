"""What one of several processes does; `conftest.py` runs this file in each of them.

It is given ``environment``, what `torchrun` would set, ``job``, a function's name and its keyword
arguments, and ``output``, a file for the answer.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import io
import json
import os
import resource
import runpy
import signal
import sys
import threading
import time
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch


def write(model: str, settings: dict[str, dict[str, Any]], fused: bool = False) -> dict[str, Any]:
    """What is written with each of the settings, and the bytes this process holds of the model."""
    if fused:
        os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined
    import plug
    from plug.distributed.processes import start_processes

    with start_processes("cpu") as processes:
        share = plug.load(model, processes=processes)
        held = sum(x.untyped_storage().nbytes() for x in [*share.parameters(), *share.buffers()])
        generator = plug.Generator(model, processes=processes)
        if fused:
            from plug.generation.fused_model import FusedModel

            generator.prepared.model = FusedModel(share)
        written = {
            name: [list(each.token_ids) for each in plug.generate(model=generator, **options)]
            for name, options in settings.items()
        }
        return {"written": written, "held": held}


def program(command: list[str]) -> None:
    """Run a file, or a module after "-m", as `python` would with these arguments.

    Raises:
        SystemExit: it ended with another status than 0.
    """
    warnings.resetwarnings()
    sys.argv = command[1:] if command[0] == "-m" else list(command)
    try:
        if command[0] == "-m":
            runpy.run_module(command[1], run_name="__main__", alter_sys=True)
        else:
            sys.path.insert(0, str(Path(command[0]).parent))
            runpy.run_path(command[0], run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise


def command(
    arguments: list[str], failing_rank: int | None = None, first_is_late: float = 0.0
) -> dict[str, Any]:
    """Run `plug`: exit status, standard output and standard error.

    With ``first_is_late`` the first process begins so many seconds after the others.
    """
    if os.environ["RANK"] == "0":
        time.sleep(first_is_late)
    from plug.cli import main
    from plug.errors import PlugError
    from plug.generation.plain_model import PlainModel

    if failing_rank == int(os.environ["RANK"]):

        def fail(*_: object) -> None:
            raise PlugError("显存用完了。")

        PlainModel.decode = fail  # type: ignore[assignment]
    sys.argv = ["plug", *arguments]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main()
    return {"status": status, "out": out.getvalue(), "err": err.getvalue()}


def close(fails: bool) -> dict[str, Any]:
    """Whether the group was still there when an owner of it was closed, and is there at the end."""
    import torch.distributed as dist

    from plug.distributed.processes import close_with_group, start_processes

    class Owner:
        def __init__(self) -> None:
            self.saw: list[bool] = []

        def close(self) -> None:
            self.saw.append(dist.is_initialized())

    owner = Owner()
    with contextlib.suppress(KeyboardInterrupt), start_processes("cpu"):
        close_with_group(owner)
        if fails:
            raise KeyboardInterrupt
    return {"saw": owner.saw, "is_left": dist.is_initialized()}


def finetune(
    settings: dict[str, Any], resume: bool = False, kill_at: int = 0, in_half: bool = False
) -> dict[str, Any]:
    """Fine-tune: the metrics, and the most bytes of parameters that this process held at a step.

    With ``kill_at`` the first process dies at that call of `save` of a sharded checkpoint, as by
    `kill -9`, when half of the files are there. With ``in_half`` gathered layers are bfloat16 here
    too, as on a GPU.
    """
    from transformers import TrainerCallback

    from plug.checkpoints import sharded
    from plug.finetuning import sharding
    from plug.finetuning.run import finetune
    from plug.finetuning.settings import FinetuneSettings

    held = 0

    class Holds(TrainerCallback):
        def on_step_end(self, *_: Any, model: Any, **__: Any) -> None:
            nonlocal held
            held = max(held, sum(local(x).nbytes for x in model.parameters()))

    calls, save = 0, sharded.save

    def save_and_die(*arguments: Any, **options: Any) -> None:
        nonlocal calls
        calls += 1
        save(*arguments, **options)
        if calls == kill_at:
            os._exit(9)

    sharded.save = save_and_die  # type: ignore[assignment]
    if in_half:
        sharding.computes_in_half = lambda *_: True
    made = FinetuneSettings(**settings)
    result = finetune(made, device="cpu", resume=resume, callbacks=[Holds()])
    return {"metrics": result.metrics, "held": held, "facts": result.facts}


def step_in_backward(
    folder: str,
    steps: list[int],
    half: bool,
    sharded: bool = True,
    resume: bool = False,
    kind: str = "cpu",
) -> dict[str, Any]:
    """Train by `FusedAdamW8bit`, all processes on the same batches; the weights go to a file.

    They are in "weights.pt" of ``folder``, beside a checkpoint, which a run with ``resume`` goes on
    from. Not ``sharded``, a process has the whole model, and writes no checkpoint.

    Returns:
        What had a gradient while a weight took its step: the most shards, and names of gathered
        weights.
    """
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    from plug import PlugForConditionalGeneration, PlugTransformersConfig
    from plug.distributed.fully_sharded import gathered, shard
    from plug.distributed.settings import ParallelSettings
    from plug.finetuning.fused_backward import FusedAdamW8bit
    from plug.finetuning.recomputation import recompute_layers
    from plug.finetuning.sharded_state import (
        read_optimizer,
        read_weights,
        write_optimizer,
        write_weights,
    )
    from plug.model.configuration import PRESETS

    torch.manual_seed(0)
    values = PRESETS["test"].to_dict()
    values |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    dtype = torch.bfloat16 if half else torch.float32
    device = torch.device(kind)
    if kind == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    model: Any = PlugForConditionalGeneration(PlugTransformersConfig(**values))
    model.to(device, dtype).train()
    model.warns_of_half_precision = False
    recompute_layers(model, 2)
    if sharded:
        dist.init_process_group("gloo" if kind == "cpu" else "cpu:gloo,cuda:nccl")
        mesh = init_device_mesh(kind, (dist.get_world_size(),))
        shard(model, mesh, ParallelSettings(), reduce_dtype=dtype)
    shards, whole = [0], set()

    def look(_: Any) -> None:
        having = {name: x for name, x in model.named_parameters() if x.grad is not None}
        shards.append(sum(hasattr(x, "to_local") for x in having.values()))
        whole.update(name for name, x in having.items() if not hasattr(x, "to_local"))

    trained = [each for each in model.parameters() if each.requires_grad]
    for parameter in trained:
        parameter.register_post_accumulate_grad_hook(look)
    optimizer = FusedAdamW8bit(trained, lr=1e-3, weight_decay=0.01, seed=3)
    optimizer.fuse()
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    if resume:
        read_weights(Path(folder), model)
        read_optimizer(Path(folder), model, optimizer, schedule)
    for number in steps:
        generator = torch.Generator().manual_seed(number)
        ids = torch.randint(5, 300, (2, 9), generator=generator).to(device)
        model(input_ids=ids, labels=ids[:, :4]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    weights = dict(model.named_parameters())
    if sharded:
        write_weights(Path(folder), model)
        write_optimizer(Path(folder), model, optimizer, schedule)
        weights = dict(gathered(weights))
    if os.environ["RANK"] == "0":
        state = {name: x.detach().cpu() for name, x in weights.items()}
        torch.save(state, Path(folder, "weights.pt"))
    if sharded:
        dist.destroy_process_group()
    return {"shards": max(shards), "whole": sorted(whole)}


def pretrain(
    stage: int,
    settings: dict[str, Any],
    resume: bool = False,
    die_at: int = 0,
    emulates: bool = False,
    kill: dict[str, Any] | None = None,
    full_at: int = 0,
    spoil: list[int] | None = None,
) -> dict[str, Any]:
    """Pre-train: the most bytes of weights that this process held.

    With ``emulates`` products in FP8 are emulated, which are refused on a CPU otherwise.
    With ``die_at`` all processes die at that checkpoint, as by `kill -9`, while it is written.
    With ``kill`` the process "rank" is killed "seconds" after it has begun step "step".
    With ``full_at`` no file grows past 20,000 bytes from that checkpoint on, as on a full disk.
    With ``spoil``, a rank and a step (from 0), that process's losses of stage 1 are NaN in it.
    """
    from plug.checkpoints import sharded
    from plug.pretraining import loop, run
    from plug.pretraining.run import pretrain
    from plug.pretraining.settings import RunConfig

    held, calls, now = 0, 0, -1
    take_step, async_save = loop.take_step, sharded.async_save
    losses = loop.loss_functions.structbert_losses

    def spoiled(*arguments: Any) -> Any:
        is_spoiled = [int(os.environ["RANK"]), now] == spoil
        found = losses(*arguments)
        return {name: x * float("nan") if is_spoiled else x for name, x in found.items()}

    def watched(state: Any, *arguments: Any) -> Any:
        nonlocal held, now
        now = arguments[-1]
        held = max(held, sum(local(x).nbytes for x in state.model.parameters()))
        if kill and (kill["rank"], kill["step"]) == (int(os.environ["RANK"]), state.step):
            end = (os.getpid(), signal.SIGKILL)
            threading.Timer(kill["seconds"], os.kill, end).start()
        return take_step(state, *arguments)

    def save_and_die(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == full_at:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
        future = async_save(*arguments, **options)
        if calls == die_at:
            os._exit(9)
        return future

    if settings["compile"]:  # traced, with autograd; code for the processor takes minutes
        warnings.simplefilter("ignore")  # torch's compiler imports what torch deprecates
        torch.compile = partial(torch.compile, backend="aot_eager")
        # Else each trace begins anew where a float (a rate of dropout) cannot stay a symbol.
        torch._dynamo.config.specialize_float = True
    if emulates:
        run.check_fp8 = lambda _: None
    loop.take_step = watched  # type: ignore[assignment]
    loop.loss_functions.structbert_losses = spoiled
    sharded.async_save = save_and_die  # type: ignore[assignment]
    pretrain(stage, RunConfig(**settings), resume=resume, device="cpu")
    return {"held": held}


def held_for_a_step(tensor: int, layers: int, reshards: bool = True) -> dict[str, int]:
    """Bytes of weights, before and after a forward pass in float32, and of what it keeps of tokens.

    The model has so many layers in either half, and reads and writes 3 rows of 11 tokens.
    """
    from plug.distributed.fully_sharded import run_forward
    from plug.distributed.processes import start_processes
    from plug.distributed.settings import ParallelSettings
    from plug.model.configuration import PRESETS
    from plug.model.plug import Plug
    from plug.pretraining.sharded import shard_new

    config = replace(
        PRESETS["test"], num_hidden_layers=layers, num_decoder_layers=layers,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    kept: dict[int, int] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        own = local(x)
        if own.shape[0] in (3, 33) and own.shape[-1] > 1:  # no weight, no row's mean or deviation
            kept[own.untyped_storage().data_ptr()] = own.untyped_storage().nbytes()
        return x

    with start_processes("cpu") as alone:
        processes = replace(alone, tensor=tensor)
        with torch.device("meta"):
            model = Plug(config).train()
        parallel = ParallelSettings(sharding="fsdp", tensor=tensor, reshard_after_forward=reshards)
        shard_new(model, parallel, processes, seed=0, source=None, compute_dtype=None)
        weights = sum(local(x).nbytes for x in model.parameters())
        ids = torch.randint(5, 100, (3, 11))

        def forward() -> torch.Tensor:
            states = model.encoder(model.embeddings(ids), None)
            keys_values = model.decoder.project_encoder(states)
            return model.decoder(model.embeddings(ids), keys_values, None)

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            run_forward(model, forward)
        after = sum(local(x).nbytes for x in model.parameters())
    return {"weights": weights, "after": after, "kept": sum(kept.values())}


def finetune_by_deepspeed(**options: Any) -> dict[str, Any]:
    """As `finetune`. Accelerate knows DeepSpeed on GPUs alone, so it is told of it here."""
    warnings.simplefilter("ignore")  # of deepspeed
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    deepspeed.init_distributed("gloo")
    PartialState(cpu=True)
    PartialState._shared_state["distributed_type"] = DistributedType.DEEPSPEED
    return finetune(**options)


def failing(**options: Any) -> str:
    """What a run says when it cannot be done; "" where another process ended first."""
    from plug.distributed.processes import is_loss_of_another
    from plug.errors import PlugError

    try:
        pretrain(**options) if "stage" in options else finetune(**options)
    except PlugError as error:
        return str(error)
    except RuntimeError as error:
        if not is_loss_of_another(error):
            raise
    return ""


def save_undrawn(_figure: Any, file: Any, **_options: Any) -> None:
    """`Figure.savefig` without the drawing, which is most of a small training run."""
    content = b"\x89PNG, not drawn"
    file.write(content) if hasattr(file, "write") else Path(file).write_bytes(content)


def local(x: Any) -> torch.Tensor:
    """The process's own part of a tensor."""
    return x.to_local() if hasattr(x, "to_local") else x


if __name__ == "worker":
    given: dict[str, Any] = globals()
    gc.freeze()  # what the server of forks has imported need not be looked at again
    os.environ.update(given["environment"])
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    if importlib.util.find_spec("matplotlib"):
        from matplotlib.figure import Figure

        Figure.savefig, Figure.tight_layout = save_undrawn, lambda _figure: None
    function, options = given["job"]
    answer = globals()[function](**options)
    Path(given["output"]).write_text(json.dumps(answer), encoding="utf-8")

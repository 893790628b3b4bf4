"""Pre-training over processes of which each holds a shard of every layer (FSDP2).

What differs from whole copies: how the model begins, its gradients, and its checkpoints, which are
written while training goes on and are read by any number of processes.
"""

from __future__ import annotations

import hashlib
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from plug.checkpoints.directory import write_configs
from plug.checkpoints.sharded import METADATA_FILE, Copier, Writing, begin_sharded, read_sharded
from plug.checkpoints.weights import TensorSpec
from plug.distributed.fully_sharded import as_shard, copies, own_region, shard
from plug.distributed.norms import clip_shards
from plug.distributed.processes import Processes
from plug.distributed.settings import ParallelSettings
from plug.errors import PlugError
from plug.files import remove_directory, replace_directory, write_json
from plug.jsonfiles import read_json
from plug.loading.shards import fill, write_gathered
from plug.model.heads import MaskedLMHead
from plug.model.plug import Plug
from plug.tokenization import PlugTokenizer

CHECKPOINTS = "checkpoints"  # of a sharded run: a directory `step-N` each
WEIGHT = "model."  # before the names of weights in a checkpoint
_OPTIMIZER = "optimizer/"  # likewise of states
STATE_FILE = "state.json"  # in it: the step, and what else is the same in all processes


def shard_new(
    model: Plug,
    settings: ParallelSettings,
    processes: Processes,
    *,
    seed: int,
    source: Path | None,
    compute_dtype: torch.dtype | None,
) -> None:
    """Shard ``model``, which has no memory yet, and give each process its rows.

    Values come from ``source`` where that has them. Others are drawn by the seed and the tensor's
    name, a tensor at a time, so that they do not depend on the number of processes.

    Args:
        model: on the meta device.
        settings: of the run.
        processes: this one and how many there are.
        seed: of what is drawn.
        source: a model directory whose tensors have the model's shapes, or None.
        compute_dtype: what layers compute in.
    """
    kind = processes.device.type
    if processes.tensor > 1:
        shape = (processes.data_size, processes.tensor)
        mesh = init_device_mesh(kind, shape, mesh_dim_names=("data", "tensor"))
    else:
        mesh = init_device_mesh(kind, (processes.world_size,))
    shard(model, mesh, settings, compute_dtype)
    place = torch.device("cpu") if settings.cpu_offload else processes.device
    drawn = {}
    for name, parameter in model.named_parameters():
        whole = _drawn(model, name, tuple(parameter.shape), seed)
        sharded = cast(DTensor, parameter)
        drawn[name] = as_shard(whole[own_region(sharded)].to(place, copy=True), sharded)
    if source is not None:
        found = fill(model, source, place, partly=True)
        drawn = {name: tensor for name, tensor in drawn.items() if name not in found}
    model.load_state_dict(drawn, strict=False, assign=True)


def _drawn(model: Plug, name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """A new parameter, whole, as `initialize_weights` has it."""
    module = model.get_submodule(name.rpartition(".")[0])
    if isinstance(module, nn.LayerNorm):
        return torch.ones(shape) if name.endswith("weight") else torch.zeros(shape)
    if name.endswith("bias") or (isinstance(module, MaskedLMHead) and len(shape) == 1):
        return torch.zeros(shape)
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=7).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little"))
    residual = "decoder." in name and name.endswith(("out_proj.weight", "fc2.weight"))
    scale = (2 * max(model.config.num_decoder_layers, 1)) ** -0.5 if residual else 1.0
    std = model.config.initializer_range * scale
    return torch.empty(shape).normal_(std=std, generator=generator)


class ShardedGradients:
    """As `Gradients`, of a sharded model: FSDP2 sums them during backward.

    Args:
        model: of `shard_new`.
        processes: this one and how many there are.
    """

    def __init__(self, model: Plug, processes: Processes) -> None:
        self._parameters = [
            cast(DTensor, each) for each in model.parameters() if each.requires_grad
        ]
        self._processes = processes
        meshes = (each.device_mesh for each in self._parameters)
        mesh = next((each for each in meshes if each.ndim == 2), None)
        self._group = None if mesh is None else mesh.get_group("tensor")

    def begin(self, *, is_last: bool) -> None:
        """Nothing: each part of a batch is summed at once, so that shards alone are kept."""

    def clear(self) -> None:
        """Free all gradients."""
        for parameter in self._parameters:
            parameter.grad = None

    def close(self) -> None:
        """Let go of what training alone needs."""
        self.clear()

    def finish(self, max_norm: float) -> Tensor:
        """Clip the gradients' norm to ``max_norm``, and return the norm before that.

        Values that several processes hold count once.
        """
        own: dict[int, list[Tensor]] = {}  # this process's gradients, by the number of their copies
        for parameter in self._parameters:
            if parameter.grad is not None:
                local = cast(DTensor, parameter.grad).to_local()
                own.setdefault(copies(parameter), []).append(local)
        for count, gradients in own.items():
            if count > 1:
                self._equal(gradients)
        return clip_shards(own, max_norm, self._processes.device)

    def _equal(self, gradients: list[Tensor]) -> None:
        """Give copies of a gradient their mean, so that rounding cannot part the weights."""
        flat = torch.cat([each.flatten() for each in gradients]).to(self._processes.device)
        dist.all_reduce(flat, group=self._group)
        flat /= self._processes.tensor
        pieces = flat.split([each.numel() for each in gradients])
        torch._foreach_copy_(
            gradients, [x.view(y.shape) for x, y in zip(pieces, gradients, strict=True)]
        )


class ShardedCheckpoints:
    """Writes checkpoints while training goes on; the last ones are kept, each whole or not at all.

    Args:
        output: of the run.
        processes: this one and how many there are.
        kept: how many checkpoints.
        tokenizer: of the run; with the model's config it is in each checkpoint, so that
            `plug convert --from-checkpoint` needs nothing else.
    """

    def __init__(
        self, output: Path, processes: Processes, kept: int, tokenizer: PlugTokenizer
    ) -> None:
        self.folder, self.processes, self.kept = output / CHECKPOINTS, processes, kept
        self.tokenizer = tokenizer
        self._group = dist.new_group(backend="gloo")  # threads that write have one of their own
        self._copier = Copier(processes.device)
        self._writing: Writing | None = None
        self._thread = ThreadPoolExecutor(1)
        self._end: Future[None] | None = None  # of the writing; its files have got their name

    def watch(self, optimizers: list[Optimizer]) -> None:
        """Have the optimisers wait for what is still being copied before they change it."""
        for optimizer in optimizers:
            optimizer.register_step_pre_hook(lambda *_: self._wait_for_copy())

    def _wait_for_copy(self) -> None:
        if self._writing is not None:
            self._writing.wait_for_copy()

    def prepare(self, model: Plug, optimizers: list[Optimizer]) -> Future[Any] | None:
        """Begin to reserve the memory of copies, when the optimisers' states are there.

        Pinned memory takes seconds to get. What is copied meanwhile is thrown away.

        Returns:
            What is done when the memory is there; None on a CPU, which reserves none.
        """
        if self.processes.device.type != "cuda":
            return None
        return self._copier.stage(_tensors(model, optimizers))

    def save(
        self,
        model: Plug,
        optimizers: list[Optimizer],
        values: dict[str, Any],
        *,
        waits: bool = False,
    ) -> None:
        """Begin to write a checkpoint; all processes call it together.

        Returns at once: the tensors are copied before the next step changes them (`watch`), and
        written after that. With ``waits`` it returns when they are on the disk.

        Args:
            model: whose weights it has.
            optimizers: whose states it has.
            values: what else it has; its "step" names it.
            waits: see above.

        Raises:
            PlugError: the disk is full, this time or the last.
        """
        self.finish()
        place = self.folder / f"step-{values['step']}"
        tensors = _tensors(model, optimizers)

        def write_beside(directory: Path) -> None:
            write_json(directory / STATE_FILE, values)
            _write_configs(directory, model, self.tokenizer)

        self._writing = begin_sharded(place, tensors, self._group, write_beside, self._copier)
        self._end = self._thread.submit(self._finish, self._writing)
        if waits:
            self.finish()

    def look(self) -> None:
        """Raise what went wrong with a checkpoint whose writing has ended since the last step.

        Raises:
            PlugError: the disk is full, or the directory cannot be written.
        """
        if self._end is not None and self._end.done():
            self._wait()

    def finish(self) -> None:
        """Wait for what is being written; all processes call it together.

        Raises:
            PlugError: as `look` does.
        """
        self._wait()
        dist.barrier(group=self._group)

    def _wait(self) -> None:
        if self._end is not None:
            end, self._end, self._writing = self._end, None, None
            end.result()

    def close(self) -> None:
        """Wait for what is being written, and free the memory of copies; this process alone."""
        self._thread.shutdown()
        self._copier.close()

    def _finish(self, writing: Writing) -> None:
        """Give a checkpoint its name and remove older ones, in a thread beside training."""
        writing.finish()
        if self.processes.is_first:
            for path in found(self.folder)[: -self.kept]:
                remove_directory(path)


def restore(model: Plug, optimizers: list[Optimizer], path: Path) -> None:
    """Give a sharded model and its optimisers what the checkpoint in ``path`` has.

    Raises:
        PlugError: it is damaged, or of a model of another shape.
    """
    from torch.distributed.checkpoint.state_dict import set_optimizer_state_dict

    tensors = _tensors(model, optimizers)
    read_sharded(path, tensors)
    states = {name.removeprefix(_OPTIMIZER): x for name, x in tensors.items() if _OPTIMIZER in name}
    set_optimizer_state_dict(model, optimizers, states, options=_options())


def found(folder: Path) -> list[Path]:
    """Return the checkpoints in ``folder`` that are whole, the newest last."""
    steps = [path.parent for path in folder.glob(f"step-*/{METADATA_FILE}")]
    return sorted(steps, key=lambda path: int(path.name.rpartition("-")[2]))


def read_values(path: Path) -> dict[str, Any]:
    """Return what a checkpoint says besides its tensors.

    Raises:
        PlugError: the file is missing or damaged.
    """
    values = read_json(path / STATE_FILE)
    if not isinstance(values, dict):
        raise PlugError(f"检查点 {path} 的 {STATE_FILE} 已损坏。请删去它，从更早的检查点继续。")
    return values


def _options() -> Any:
    from torch.distributed.checkpoint.state_dict import StateDictOptions

    return StateDictOptions(flatten_optimizer_state_dict=True)


def _tensors(model: Plug, optimizers: list[Optimizer]) -> dict[str, Any]:
    """All weights and the optimisers' states by name, sharded as this process has them."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    states = get_optimizer_state_dict(model, optimizers, options=_options())
    weights = {f"{WEIGHT}{name}": x.detach() for name, x in model.named_parameters()}
    return weights | {f"{_OPTIMIZER}{name}": x for name, x in states.items()}


def save_whole(
    model: Plug, directory: Path, tokenizer: PlugTokenizer, processes: Processes
) -> None:
    """Write a sharded model as an ordinary directory, a tensor at a time; all call it together."""
    tensors: dict[str, Tensor] = dict(model.named_parameters())
    with ExitStack() as stack:
        place = Path()
        if processes.is_first:
            place = stack.enter_context(replace_directory(directory, "config.json"))
        write_gathered(place, tensors, writes=processes.is_first)
        if processes.is_first:
            _write_configs(place, model, tokenizer)
    dist.barrier()


def _write_configs(directory: Path, model: Plug, tokenizer: PlugTokenizer) -> None:
    """Write what a model directory has beside its weights."""
    specs = {name: TensorSpec(x.dtype, tuple(x.shape)) for name, x in model.named_parameters()}
    write_configs(directory, model.config, specs)
    tokenizer.save(directory, model_max_length=model.config.max_source_length)

"""`finetune`: a pre-trained model, a task and its data to a directory that solves the task.

The directory holds the model and its tokenizer, `finetuning.json` (settings, labels),
`log.jsonl`, the report (`report.md`, `report.html`, plots, `metrics.json`) and
`predictions.jsonl`. While a run goes on, `checkpoints/` is what it can resume from.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import plug.hf  # noqa: F401 (first: it says what to install)

# isort: split

import torch
import transformers
from transformers import (
    EarlyStoppingCallback,
    PrinterCallback,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.training_args import OptimizerNames
from transformers.utils.import_utils import is_torch_tf32_available

from plug.checkpoints.directory import (
    ADAPTER_CONFIG,
    CONFIG_FILE,
    RUN_FILE,
    find_model_directory,
    load_tokenizer,
)
from plug.checkpoints.hub import write_finetuned_configuration
from plug.checkpoints.weights import writing_errors
from plug.device import find_device
from plug.distributed.fully_sharded import reshard
from plug.errors import NonFiniteError, PlugError, UsageError
from plug.evaluation.report import Plot, curves_plot, write_report
from plug.files import (
    add_files,
    hold,
    is_used,
    plain_errors,
    remove_directory,
    write_json,
    write_text,
)
from plug.finetuning.adapted_layers import adapt_layers
from plug.finetuning.checkpoints import Checkpoints, check_checkpoint, last_checkpoint
from plug.finetuning.fused_backward import check_optimizer
from plug.finetuning.kind import Collator, Kind, find_kind
from plug.finetuning.lora import adapt, check_base, multiplies_in_fp8, save_adapter
from plug.finetuning.memory import Case, decide
from plug.finetuning.predict import read_run, write_predictions
from plug.finetuning.readers import Example, text_of
from plug.finetuning.recomputation import layers_of, recompute_cheap_parts, recompute_layers
from plug.finetuning.settings import FinetuneSettings
from plug.finetuning.sharded_state import check_engine
from plug.finetuning.sharding import (
    Layout,
    find_layout,
    gathered_adapter,
    load_sharded,
    save_model,
    write_model_configs,
)
from plug.finetuning.tasks import Task, find_task, fingerprint_of, read_examples
from plug.finetuning.trainer import ChildTuning, FinetuneTrainer, Tell
from plug.interrupts import Interrupts
from plug.jsonfiles import read_json
from plug.loading.adapters import BASE_KEY, fingerprint
from plug.loading.estimate import OVERHEAD_BYTES
from plug.loading.host_memory import free_host_memory
from plug.loading.memory import free_memory
from plug.model.configuration import PlugConfig
from plug.quantization.scheme import read_scheme
from plug.textfiles import Notes
from plug.tokenization import PlugTokenizer
from plug.traditional import is_mostly_traditional, is_traditional_alone

CHECKPOINTS = "checkpoints"
DATA_KEY = "data"  # in `finetuning.json`: fingerprints of the training and evaluation data
PROCESSES_KEY = "processes"  # in `finetuning.json`: how many took each step together
# What a resumed run may change: the examples of a step are compared, not those of a process.
_SHARING = ("parallel", "batch_size", "gradient_accumulation_steps")
_FREE_ON_RESUME = frozenset({"output", *_SHARING})
_LOOKED_AT = 200  # characters of a text
_ASKED = "asked"  # of `finetuning.json`: settings as they were before `auto` decided them


@dataclass(frozen=True, slots=True)
class FinetuneResult:
    """Where the model is, its scores on the evaluation file, and what the report says of the run.

    `facts`: the settings, numbers of examples and steps, the device, versions.
    """

    directory: Path
    metrics: dict[str, float]
    facts: dict[str, Any]


def finetune(
    settings: FinetuneSettings,
    *,
    device: str | None = None,
    resume: bool = False,
    resumable: bool = True,
    callbacks: Sequence[TrainerCallback] = (),
) -> FinetuneResult:
    """Fine-tune a model; the weights of the best epoch are kept.

    Under `torchrun` (or another launcher that sets RANK and WORLD_SIZE) each process has a copy of
    the model and its share of every batch, so that a step is batch size times processes.

    Args:
        settings: of the run.
        device: "cpu", "cuda", …; None is CUDA where there is one, and there in bfloat16.
        resume: go on with the run that was interrupted in the same output.
        resumable: keep what ``resume`` needs after every epoch, three times the model's size; False
            keeps the best weights alone, for many short runs.
        callbacks: of `transformers`, for the Trainer.

    Raises:
        UsageError: data, settings or output make no sense; nothing was trained.
        PlugError: a file is broken, or the disk is full.
    """
    output, asked = Path(settings.output), settings
    if os.environ.get("RANK", "0") != "0":  # of several processes, one writes
        settings = _as_before(output, asked, resume)
        return _finished(output, settings, resume) or _run(
            settings, asked, device, resume, resumable, callbacks
        )
    _check_output(output, asked, resume)
    with hold(output):
        _check_output(output, asked, resume)  # again: another process may have been at work
        settings = _as_before(output, asked, resume)
        if (result := _finished(output, settings, resume)) is not None:
            remove_directory(output / CHECKPOINTS)
            return result
        return _run(settings, asked, device, resume, resumable, callbacks)


def _run(
    settings: FinetuneSettings,
    asked: FinetuneSettings,
    device: str | None,
    resume: bool,
    resumable: bool,
    callbacks: Sequence[TrainerCallback],
) -> FinetuneResult:
    """What `finetune` does once the output is this process's own.

    ``asked`` are the user's settings; ``settings`` are those of before, if the run is resumed.
    """
    began = time.perf_counter()
    task, output = find_task(settings.task), Path(settings.output)
    is_main = os.environ.get("RANK", "0") == "0"
    directory = find_model_directory(settings.model)
    config = PlugConfig.from_file(directory / CONFIG_FILE)
    settings.check_lengths(config.max_position_embeddings)
    notes, eval_notes = Notes(), Notes()
    examples = read_examples(task, Path(settings.train), answered=True, at_least=2, notes=notes)
    held_out = read_examples(task, Path(settings.eval), answered=True, notes=eval_notes)
    prints = {"train": fingerprint_of(examples), "eval": fingerprint_of(held_out)}
    if resume:
        _check_data(output, settings, prints)
    if settings.memory != "auto":
        check_base(settings, directory)
    check_optimizer(settings)
    tokenizer = load_tokenizer(directory)
    for found, told in ((examples, notes), (held_out, eval_notes)):
        _note_traditional(found, tokenizer, told)
    cls = find_kind(task.kind)
    kind = cls(
        tokenizer,
        task.labels or cls.labels_of(examples, settings.train),
        source_length=settings.source_length,
        target_length=settings.target_length,
        num_beams=settings.num_beams,
        **cls.facts_of(examples),
    )
    _check_earlier_labels(directory, settings, kind.labels)
    kind.check(examples, training=True)
    kind.check(held_out, training=False)
    chosen = find_device(device)
    if chosen.index:  # the Trainer takes the first GPU that it sees
        raise UsageError(
            f"微调只用第一个 GPU。要用 {device}，请设 CUDA_VISIBLE_DEVICES={chosen.index}。"
        )
    features = kind.features(examples)
    _note_cut(kind, examples, features, notes)
    case = _case(config, directory, task, features, chosen)
    layout = find_layout(settings, case, chosen)
    is_sharded = layout.is_sharded
    if is_sharded:
        offload = settings.parallel.cpu_offload or layout.offloads
        case = replace(case, cards=layout.processes, offload=offload, host=free_host_memory())
    decision = decide(settings, case)
    settings = decision.settings
    check_base(settings, directory)
    multiplies_in_fp8(settings, chosen)
    if is_main and decision.told:
        print(decision.told, file=sys.stderr)  # noqa: T201
    set_seed(settings.seed)
    is_adapter = settings.is_adapter
    in_bf16 = settings.precision == "bf16"
    half = in_bf16 and (settings.is_fused or (is_adapter and chosen.type == "cuda"))
    # Before the model: transformers partitions it for DeepSpeed while it is loaded.
    arguments = training_arguments(settings, task, output, chosen, resumable, layout)
    if layout.is_fsdp:
        model = load_sharded(kind, directory, settings, layout)
    else:
        model = kind.load_model(
            directory,
            from_scratch=settings.from_scratch,
            dtype=torch.bfloat16 if half else torch.float32,
        )
        model = prepare(model, settings, chosen)
    if is_main:
        base = {BASE_KEY: fingerprint(directory)} if is_adapter else {}
        kept = {"settings": settings.to_dict(), **_asked(asked, settings)}
        kept |= {PROCESSES_KEY: layout.processes, DATA_KEY: prints}
        write_json(output / RUN_FILE, {**kept, **kind.to_dict(), **base})

    def predict(model: Any) -> list[Any]:
        try:
            return kind.predict(model, held_out, batch_size=settings.eval_batch_size)
        finally:
            if layout.is_fsdp:
                reshard(model)

    best = _Best(task.metric)

    def score(model: Any) -> dict[str, float]:
        try:
            predictions = predict(model)
        except NonFiniteError as error:
            raise trainer.diverged("模型输出") from error
        metrics = kind.evaluate(held_out, predictions).metrics
        best.offer(trainer.state.global_step, metrics, predictions)
        return metrics

    interrupts = Interrupts()
    checkpoint = last_checkpoint(output / CHECKPOINTS) if resume else None
    if checkpoint is not None:
        check_engine(checkpoint, layout.engine, layout.processes)
        check_checkpoint(checkpoint)

    def write_beside(folder: Path) -> None:
        """So that `plug convert --from-checkpoint` can make a model of a checkpoint."""
        if is_adapter:
            return
        if layout.is_fsdp:
            write_model_configs(model, folder)
        write_files(folder)

    def write_files(folder: Path) -> None:
        tokenizer.save(
            folder, model_max_length=config.max_source_length, by_character=kind.by_character
        )
        write_finetuned_configuration(folder, task.kind, settings.num_beams)

    trainer = FinetuneTrainer(
        score=score,
        settings=settings,
        write_beside=write_beside,
        model=model,
        args=arguments,
        train_dataset=features,
        eval_dataset=held_out,
        data_collator=Collator(tokenizer.pad_token_id),
        callbacks=[
            *_callbacks(settings, task),
            Checkpoints(interrupts, output, resumable),
            *callbacks,
        ],
    )
    trainer.remove_callback(PrinterCallback)
    advice = "请检查磁盘空间和权限，再加 --resume 从上一个检查点继续"
    with interrupts, plain_errors(output, advice), writing_errors(), _enough_memory(settings):
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    trainer.accelerator.wait_for_everyone()  # all have read the best weights
    is_best = best.step == trainer.state.best_global_step  # it is not after a resumption
    predictions = best.predictions if is_best else predict(model)
    evaluation = kind.evaluate(held_out, predictions)
    history = trainer.state.log_history
    evaluation.plots.extend(_curves(history, task.metric))
    facts = {
        **settings.to_dict(),
        "train_examples": len(examples),
        "eval_examples": len(held_out),
        **({"train_notes": "".join(notes.lines())} if notes.lines() else {}),
        **({"eval_notes": "".join(eval_notes.lines())} if eval_notes.lines() else {}),
        "steps": trainer.state.global_step,
        "best_step": trainer.state.best_global_step,
        "seconds": round(time.perf_counter() - began, 1),
        "device": torch.cuda.get_device_name() if chosen.type == "cuda" else "CPU",
        **({"precision": "fp32"} if chosen.type == "cpu" and not half else {}),
        **({"tag_scheme": kind.tag_scheme} if kind.tag_scheme else {}),
        **({"processes": layout.processes} if layout.processes > 1 else {}),
        **({"sharding": "fsdp" if layout.is_fsdp else "ZeRO-3"} if is_sharded else {}),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    state = gathered_adapter(model) if is_adapter and is_sharded else None
    if not is_main and is_sharded and not is_adapter:
        save_model(model, None)
    if is_main:
        with add_files(output, last=_last_file(settings)) as new, writing_errors():
            if is_adapter:
                save_adapter(model, new, settings.model, state)
            else:
                if is_sharded:
                    save_model(model, new)
                else:
                    model.save_pretrained(new)
                write_files(new)
            write_report(new, f"{task.title}：微调", asked.command(), facts, evaluation)
            lines = [json.dumps(entry, ensure_ascii=False) + "\n" for entry in history]
            write_text(new / "log.jsonl", "".join(lines))
            write_predictions(new / "predictions.jsonl", kind, held_out, predictions)
        remove_directory(output / CHECKPOINTS)
    trainer.accelerator.wait_for_everyone()  # the output is whole for each of them
    return FinetuneResult(output, evaluation.metrics, facts)


def prepare(model: Any, settings: FinetuneSettings, device: torch.device) -> Any:
    """Return a loaded model as it is trained: with adapters, and layers that are recomputed."""
    if settings.is_adapter:
        model = adapt(model, settings)
        if device.type == "cuda" and settings.precision == "bf16":
            adapt_layers(model, in_fp8=multiplies_in_fp8(settings, device))
    every_layer = len(layers_of(model)) if settings.gradient_checkpointing else 0
    recompute_layers(model, settings.recomputed_layers or every_layer)
    if settings.is_fused:
        recompute_cheap_parts(model)
    return model


class _Best:
    """The predictions of the best evaluation so far, so that it need not be repeated at the end."""

    def __init__(self, metric: str) -> None:
        self.metric = metric
        self.value = -math.inf
        self.step: int | None = None
        self.predictions: list[Any] = []

    def offer(self, step: int, metrics: dict[str, float], predictions: list[Any]) -> None:
        if metrics[self.metric] > self.value:
            self.value, self.step, self.predictions = metrics[self.metric], step, predictions


def _last_file(settings: FinetuneSettings) -> str:
    """Name the file that moves to the output last: where it is, the run was finished."""
    return ADAPTER_CONFIG if settings.is_adapter else CONFIG_FILE


def _finished(output: Path, settings: FinetuneSettings, resume: bool) -> FinetuneResult | None:
    """The result of a run that was stopped when only its checkpoints were left to be removed."""
    if not resume or not (output / _last_file(settings)).is_file():
        return None
    metrics = read_json(output / "metrics.json")
    if not isinstance(metrics, dict):
        raise PlugError(f"{output / 'metrics.json'} 已损坏。请删去它所在的目录，重新训练。")
    return FinetuneResult(output, metrics, settings.to_dict())


def _asked(asked: FinetuneSettings, decided: FinetuneSettings) -> dict[str, Any]:
    """What `finetuning.json` says of settings that were decided otherwise than they were asked."""
    now = decided.to_dict()
    changed = {name: value for name, value in asked.to_dict().items() if now[name] != value}
    return {_ASKED: changed} if changed else {}


def _as_before(output: Path, settings: FinetuneSettings, resume: bool) -> FinetuneSettings:
    """Return the settings that the run went on with so far, whatever the card has free now.

    What a resumed run may change is as it is asked for now: another number of processes takes other
    numbers of examples at once.
    """
    if not resume or settings.memory != "auto" or not (output / RUN_FILE).is_file():
        return settings
    run = read_run(output)
    before = replace(FinetuneSettings(**run["settings"]), output=settings.output)
    asked, now = run["settings"] | run.get(_ASKED, {}), settings.to_dict()
    if run.get(PROCESSES_KEY) == _process_count() and all(
        asked.get(name) == now[name] for name in _SHARING
    ):
        return before
    return replace(before, **{name: getattr(settings, name) for name in _SHARING})


def _process_count() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def _enough_memory(settings: FinetuneSettings) -> Iterator[None]:
    """Raise a `PlugError` where a device's memory does not do after all."""
    try:
        yield
    except torch.OutOfMemoryError:
        size, steps = settings.batch_size, settings.gradient_accumulation_steps
        advice = "请关掉占着显存的别的程序，再加 --resume 接着训练"
        if size > 1 and not settings.is_fused:
            smaller = size // 2 if size % 2 == 0 else 1
            advice += (
                f"；或加 --batch-size {smaller} --set gradient_accumulation_steps="
                f"{steps * size // smaller} --resume"
            )
        raise PlugError(f"显存用完了（一批 {size} 个例子）。{advice}。") from None


def _case(
    config: PlugConfig, directory: Path, task: Task, features: list[Any], device: torch.device
) -> Case:
    """What decides how a run fits its device."""
    room = free_memory(device)
    processes = _process_count()
    if room is not None and processes > 1:
        # All processes have to decide alike, and what is free differs a little between cards.
        total = torch.cuda.get_device_properties(device).total_memory
        room = total - 2 * OVERHEAD_BYTES
    scheme = read_scheme(directory / CONFIG_FILE)
    writes = task.kind == "generation"
    return Case(
        config=config,
        bits=None if scheme is None else scheme.bits,
        source_length=max(len(each["input_ids"]) for each in features),
        target_length=max(len(each["labels"]) for each in features) if writes else 0,
        room=room,
        on_gpu=device.type == "cuda",
        processes=processes,
    )


def _check_data(output: Path, settings: FinetuneSettings, prints: dict[str, str]) -> None:
    """Refuse to go on with other examples than those that the run began with."""
    before = read_run(output).get(DATA_KEY)  # runs of earlier versions have none
    for name, file in (("train", settings.train), ("eval", settings.eval)):
        if isinstance(before, dict) and before.get(name) != prints[name]:
            raise UsageError(
                f"接着训练时数据不能变：{file} 的内容和开始训练时不同。"
                "请用原来的文件，或换一个输出目录。"
            )


def _note_traditional(examples: Sequence[Example], tokenizer: PlugTokenizer, notes: Notes) -> None:
    """Count the examples that the model reads as bytes, and warn of them."""
    for example in examples:
        if is_cut_into_bytes(text_of(example), tokenizer):
            notes.add(
                "多是繁体，而模型的词表里没有这些字，会学得差。请先转成简体（opencc -c t2s）",
                example.place,
            )
    notes.log()


def _note_cut(
    kind: Kind[Any, Any], examples: Sequence[Example], features: Sequence[Any], notes: Notes
) -> None:
    """Count the examples of which the model does not read the end, and warn of them."""
    if kind.reads_all:
        return
    most, longer = kind.source_length, copy(kind)
    longer.source_length = most + 1
    full = [e for e, f in zip(examples, features, strict=True) if len(f["input_ids"]) == most]
    for example, feature in zip(full, longer.features(full), strict=True):
        if len(feature["input_ids"]) > most:
            notes.add(
                f"比 source_length={most} 个词元长，只读开头（--source-length 可以加大）",
                example.place,
            )
    notes.log()


def is_cut_into_bytes(text: str, tokenizer: PlugTokenizer) -> bool:
    """Whether a text is mostly traditional and ``tokenizer`` has no tokens for its characters.

    Its first characters decide.
    """
    head = text[:_LOOKED_AT]
    if not is_mostly_traditional(head):
        return False
    alone = filter(is_traditional_alone, sorted(set(head)))
    return any(len(tokenizer.encode(each)) > 1 for each in alone)


def _check_output(output: Path, settings: FinetuneSettings, resume: bool) -> None:
    """Refuse an output unless it is new, or holds this run, stopped, and ``resume`` is asked for.

    `_last_file` moves to the output last, and the checkpoints are removed after it.
    """
    if not is_used(output):
        if resume:
            raise UsageError(f"{output} 里没有可以接着进行的训练。请去掉 --resume。")
        return
    if not output.is_dir():
        raise UsageError(f"{output} 是一个文件，不能作为输出目录。请换一个路径。")
    if not (output / RUN_FILE).is_file():
        raise UsageError(f"输出目录 {output} 里有别的东西，不会覆盖。请换一个目录。")
    is_finished = any((output / name).is_file() for name in (CONFIG_FILE, ADAPTER_CONFIG))
    if is_finished and not (resume and (output / CHECKPOINTS).is_dir()):
        raise UsageError(f"{output} 里已有一次完成的训练。请换一个目录，或先删去它。")
    if not resume:
        raise UsageError(f"{output} 里有一次没有完成的训练。请加 --resume 接着进行，或换一个目录。")
    run, now, processes = read_run(output), settings.to_dict(), _process_count()
    asked = run.get(_ASKED, {})
    before = run["settings"] | asked
    if now["memory"] == "auto":  # it takes what was taken
        before["memory"] = "auto"
    elif asked.get("memory") == "auto":  # what `auto` took is asked for by name
        before = run["settings"]
    together = before["batch_size"] * before.get("gradient_accumulation_steps", 1)
    together *= run.get(PROCESSES_KEY, 1)
    step = settings.batch_size * settings.gradient_accumulation_steps * processes
    if step != together:
        raise UsageError(
            f"接着训练时每步的例子数不能变：原来是 {together}，现在是 {step}（batch_size"
            f" {settings.batch_size} × {settings.gradient_accumulation_steps} 批 × {processes}"
            " 个进程）。请改 batch_size 或 gradient_accumulation_steps。"
        )
    changed = sorted(name for name in now.keys() - _FREE_ON_RESUME if now[name] != before.get(name))
    if changed:
        told = "、".join(f"{name}：{before.get(name)} → {now[name]}" for name in changed)
        raise UsageError(f"接着训练时设置不能变（{told}）。请用原来的设置，或换一个输出目录。")


def _check_earlier_labels(directory: Path, settings: FinetuneSettings, labels: list[str]) -> None:
    """A model that was fine-tuned before can go on with the same labels alone."""
    if (directory / RUN_FILE).is_file() and not settings.from_scratch:
        earlier = read_run(directory)
        kinds = [find_task(run["task"]).kind for run in (earlier["settings"], settings.to_dict())]
        if kinds[0] != kinds[1] or earlier["labels"] != labels:
            raise UsageError(
                f"{directory} 是为 {earlier['settings']['task']} 微调过的模型，种类或标签与"
                f" {settings.task} 不同，不能接着微调。请用预训练的模型。"
            )


def training_arguments(
    settings: FinetuneSettings,
    task: Task,
    output: Path,
    device: torch.device,
    resumable: bool,
    layout: Layout | None = None,
) -> TrainingArguments:
    """Return what the Trainer is told of a run; it writes checkpoints below ``output``."""
    on_gpu = device.type == "cuda"
    in_bf16 = settings.precision == "bf16"
    is_deepspeed = layout is not None and layout.deepspeed is not None
    arguments = TrainingArguments(
        output_dir=str(output / CHECKPOINTS),
        num_train_epochs=settings.epochs,
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation_steps,
        learning_rate=settings.learning_rate,
        warmup_steps=settings.warmup_fraction,
        weight_decay=settings.weight_decay,
        max_grad_norm=0.0 if settings.is_fused else settings.clip_grad_norm,
        train_sampling_strategy="group_by_length",
        seed=settings.seed,
        use_cpu=not on_gpu,
        # Weights of a fused optimizer are in bfloat16 already; sharded layers are gathered in it.
        bf16=on_gpu and in_bf16 and not settings.is_fused and not (layout and layout.is_fsdp),
        deepspeed=layout.deepspeed if layout else None,
        tf32=not in_bf16 if on_gpu and is_torch_tf32_available() else None,
        dataloader_pin_memory=on_gpu,
        remove_unused_columns=False,
        ddp_find_unused_parameters=False,  # every parameter has its part in the loss
        eval_strategy="epoch",
        save_strategy="epoch" if resumable else "best",
        save_only_model=not resumable and not is_deepspeed,
        save_total_limit=None,  # `Checkpoints` removes what is no longer needed
        load_best_model_at_end=True,
        metric_for_best_model=f"eval_{task.metric}",
        greater_is_better=True,
        logging_steps=0.01,  # of all steps: a hundred points
        logging_nan_inf_filter=False,  # it waits for the GPU at every step; `log` checks the loss
        report_to="none",
        disable_tqdm=True,  # `Tell` has the bar
    )
    if settings.optimizer == "adamw8bit":
        arguments.optim = OptimizerNames.ADAMW_TORCH_8BIT
    arguments._n_gpu = min(arguments.n_gpu, 1)  # else DataParallel makes another batch size of it
    return arguments


def _callbacks(settings: FinetuneSettings, task: Task) -> list[TrainerCallback]:
    callbacks: list[TrainerCallback] = [Tell(task.metric)]
    if settings.patience:
        callbacks.append(EarlyStoppingCallback(settings.patience))
    if settings.child_tuning < 1:
        callbacks.append(ChildTuning(settings.child_tuning))
    return callbacks


def _curves(history: list[dict[str, float]], metric: str) -> list[Plot]:
    """Loss and score over the steps."""
    plots = []
    for name, key in (("loss", "loss"), (metric, f"eval_{metric}")):
        points = [(entry["step"], entry[key]) for entry in history if key in entry]
        if points:
            plots.append(curves_plot(f"curve-{name}", f"{name} 的变化", {name: points}, "step"))
    return plots

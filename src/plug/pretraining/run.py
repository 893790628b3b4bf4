"""One run of one stage, `plug pretrain stage1|stage2`: what it starts from, and what it leaves.

`state.py` holds what is on disk, `loop.py` the training itself.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
import torch.distributed as dist

from plug.checkpoints.directory import CONFIG_FILE, find_model_directory, refuse_quantized
from plug.distributed.fully_sharded import is_fully_sharded
from plug.distributed.parallel_layers import check_mesh
from plug.distributed.processes import Processes, Vote, start_processes
from plug.errors import PlugError, UsageError, install
from plug.files import hold, recover
from plug.finetuning.recomputation import recompute_layers
from plug.loading.estimate import OVERHEAD_BYTES
from plug.loading.load import load
from plug.loading.memory import free_memory
from plug.loading.save import save
from plug.model.configuration import PRESETS, PlugConfig
from plug.model.plug import Plug
from plug.pretraining.adamw8bit import check_torchao
from plug.pretraining.batches import BatchPlan, PalmBatches, StructBertBatches
from plug.pretraining.compiled import compile_model, keep_bf16
from plug.pretraining.end_page import is_told, write_page
from plug.pretraining.fp8 import check_fp8, multiply_in_fp8
from plug.pretraining.loop import Batches, train
from plug.pretraining.memory import need_of, recomputed_layers
from plug.pretraining.optimization import build_optimizers
from plug.pretraining.record import plot_losses
from plug.pretraining.settings import RunConfig
from plug.pretraining.sharded import save_whole, shard_new
from plug.pretraining.state import (
    CHECKPOINT,
    MODEL,
    State,
    check_output,
    is_finished,
    read_saved,
    sharding_of,
    write_settings,
)
from plug.pretraining.tokens import fingerprint, read_tokens
from plug.pretraining.watching import check_board
from plug.tokenization import PlugTokenizer


def pretrain(
    stage: int, config: RunConfig, *, resume: bool = False, device: str | None = None
) -> None:
    """Run one stage and leave `OUTPUT/model`, a directory that `plug.load` reads.

    Ctrl-C and SIGTERM save a checkpoint after the step at work; a second Ctrl-C ends at once.

    Args:
        stage: 1 (StructBERT, encoder alone) or 2 (PALM, the whole model).
        config: the settings.
        resume: go on from `OUTPUT/checkpoint`, or from the beginning if the run was stopped before
            its first checkpoint.
        device: as in `find_device`; under `torchrun` "cuda" is the GPU of the process's number.

    Raises:
        UsageError: settings, corpus and model do not fit each other; `OUTPUT` holds a run and
            ``resume`` is False, or the reverse; or it is another run.
        BusyError: another process writes `OUTPUT`.
        Interrupted: a signal came, and a checkpoint was saved.
        PlugError: the loss is no longer a number; the disk or the memory is full.
    """
    output = Path(config.output)
    if config.tensorboard:
        check_board()
    check_torchao(config.optimizer)
    joins_alone = config.parallel.asked == "fsdp"
    with start_processes(device, joins_alone=joins_alone) as joined, ExitStack() as stack:
        processes = dataclasses.replace(joined, tensor=config.parallel.tensor)
        if config.fp8_products:
            check_fp8(processes.device)
        if processes.is_first:
            check_output(output, resume=resume)
            stack.enter_context(hold(output))
            check_output(output, resume=resume)  # again: another process may have been at work
            recover(output / CHECKPOINT)
        _wait(processes)  # none goes on with an output that the first one refuses
        state = _start(stage, config, resume, processes)
        batches = _build_batches(stage, config, state.tokenizer, processes)
        _wait(processes)  # all have read OUTPUT before the first one writes there
        with _plain_errors(config):
            is_repeated = resume and is_finished(output)
            if is_repeated:
                _tell(processes, f"{output} 的训练已经完成，模型在 {output / MODEL}。")
            else:
                if processes.is_first:
                    write_settings(output, stage, config)
                train(state, batches, processes, output)
                if is_fully_sharded(state.model):
                    save_whole(state.model, output / MODEL, state.tokenizer, processes)
                elif processes.is_first:
                    save(state.model, output / MODEL, tokenizer=state.tokenizer)
            if processes.is_first and not (is_repeated and is_told(output)):
                _plot(output, state.skipped)
                write_page(output, stage, config, state.skipped)


def _wait(processes: Processes) -> None:
    if processes.world_size > 1:
        dist.barrier()


def _tell(processes: Processes, message: str) -> None:
    if processes.is_first:
        print(message, file=sys.stderr)  # noqa: T201


def _plot(output: Path, skipped: list[int]) -> None:
    try:
        plot_losses(output / "log.csv", output / "loss.png", skipped)
    except ImportError:
        print(f"没有画损失曲线。要画，请安装：{install('train')}", file=sys.stderr)  # noqa: T201


@contextmanager
def _plain_errors(config: RunConfig) -> Iterator[None]:
    """Raise what the machine lacks while training as a `PlugError`."""
    try:
        yield
    except BrokenPipeError:  # nobody reads our progress any more
        raise
    except OSError as error:
        raise PlugError(
            f"没能写入 {config.output}：{error.strerror or error}。请检查磁盘空间和权限，"
            "再用 --resume 从上一个检查点继续。"
        ) from error
    except torch.OutOfMemoryError:
        raise PlugError(
            f"显存不足。请调小 micro_batch_tokens（现在是 {config.micro_batch_tokens}）。"
        ) from None
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise PlugError(
            "生成批次的进程意外退出，多半是内存不足。"
            f"请调小 workers（现在是 {config.workers}），再用 --resume 从上一个检查点继续。"
        ) from error


def _start(stage: int, config: RunConfig, resume: bool, processes: Processes) -> State:
    """The model and the optimisers as the first step finds them."""
    output = Path(config.output)
    read_tokens(Path(config.corpus))  # says what is wrong with a corpus
    tokenizer = PlugTokenizer.load(config.corpus)
    corpus = fingerprint(Path(config.corpus))
    model_config = _model_config(stage, config, tokenizer)
    is_sharded = is_to_be_sharded(
        stage, config, model_config, output if resume else None, processes
    )
    saved = None
    if resume:
        saved = read_saved(output, stage, config, processes, corpus, is_sharded)
    if resume and saved is None and not is_finished(output):
        _tell(processes, f"{output} 里还没有检查点，从头开始训练。")
    torch.manual_seed(config.seed)
    source = config.init_from if saved is None else str(output / CHECKPOINT)
    if is_sharded:
        source = config.init_from if saved is None else ""
    model = _build_model(stage, config, model_config, tokenizer, source, processes, is_sharded)
    optimizers = build_optimizers(
        model,
        name=config.optimizer,
        learning_rate=config.learning_rate,
        betas=(config.betas[0], config.betas[1]),
        weight_decay=config.weight_decay,
        rank=processes.rank,
        world_size=processes.world_size,
        is_sharded=is_sharded,
    )
    state = State(stage, config, model, tokenizer, list(optimizers), corpus=corpus)
    if saved is not None:
        state.restore(saved)
    return state


def is_to_be_sharded(
    stage: int,
    config: RunConfig,
    model: PlugConfig,
    resumed: Path | None,
    processes: Processes,
) -> bool:
    """Return whether each process is to hold a shard of the model.

    "auto" shards a model of which a card has no room for a copy. A resumed run goes on as its
    checkpoint says.

    Raises:
        UsageError: sharding is asked for without a launcher, or the mesh does not divide the model.
    """
    parallel = config.parallel
    asked = parallel.asked
    if asked == "fsdp" and "LOCAL_RANK" not in os.environ:
        raise UsageError(
            "parallel.sharding=fsdp、parallel.tensor 和 parallel.cpu_offload 要由 torchrun 启动："
            "torchrun --nproc-per-node 卡数 -m plug pretrain …。"
        )
    check_mesh(model, processes)
    if asked != "auto":
        return asked == "fsdp"
    if resumed is not None and (was := sharding_of(resumed)):
        return was == "fsdp" and processes.world_size > 1
    room = free_memory(processes.device)
    if processes.world_size == 1 or room is None:
        return False
    least = 0 if config.recomputation == "auto" else int(config.recomputation)
    need = need_of(model, config, stage, processes.world_size, 1, least) + OVERHEAD_BYTES
    is_sharded = bool(Vote(processes.world_size)(int(need > room)))
    picked, word = ("fsdp", "放不下") if is_sharded else ("none", "放得下")
    _tell(
        processes,
        f"parallel.sharding=auto：用 {picked}，每张卡{word}整个模型的训练"
        f"（预计 {need / 1e9:.1f} GB，空闲 {room / 1e9:.1f} GB）。",
    )
    return is_sharded


def _model_config(stage: int, settings: RunConfig, tokenizer: PlugTokenizer) -> PlugConfig:
    preset = PRESETS[settings.preset].to_dict()
    given = {
        "vocab_size": -(-tokenizer.vocab_size // 128) * 128,  # whole tiles for the GPU
        "num_emitted_tokens": tokenizer.vocab_size,
        "pad_token_id": tokenizer.pad_token_id,
        "unk_token_id": tokenizer.unk_token_id,
        "decoder_start_token_id": tokenizer.cls_token_id,
        "eos_token_id": tokenizer.sep_token_id,
        "mask_token_id": tokenizer.mask_token_id,
    }
    if clashing := sorted(given.keys() & settings.model.keys()):
        raise UsageError(f"model 里的 {'、'.join(clashing)} 由语料的分词器决定，请删去。")
    config = PlugConfig.from_dict(preset | settings.model | given)
    if config.type_vocab_size < 2:
        raise UsageError("预训练要分两段：type_vocab_size 应不小于 2。")
    if stage == 2 and config.num_decoder_layers == 0:
        raise UsageError("第二阶段需要解码器：num_decoder_layers 应不小于 1。")
    return dataclasses.replace(config, num_decoder_layers=0) if stage == 1 else config


def _build_model(
    stage: int,
    settings: RunConfig,
    config: PlugConfig,
    tokenizer: PlugTokenizer,
    source: str,
    processes: Processes,
    is_sharded: bool,
) -> Plug:
    """A new model, with the weights of ``source`` if that is not empty."""
    longest = max(max(shape) for shape, _ in settings.parsed_shapes(dimensions=stage))
    if longest > config.max_position_embeddings:
        raise UsageError(
            f"shapes 里的长度 {longest} 超过了 max_position_embeddings="
            f"{config.max_position_embeddings}。"
        )
    dropout = settings.dropout
    with torch.device("meta" if is_sharded else "cpu"):
        model = Plug(
            dataclasses.replace(
                config, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout
            )
        )
    model.config = config  # saved with the preset's dropout, which fine-tuning wants
    directory = _check_source(model, source, tokenizer, settings.corpus) if source else None
    if is_sharded:
        model.train()
    else:
        if directory is not None:
            saved = load(directory)
            is_partial = (model.decoder is None) != (saved.decoder is None)
            model.load_state_dict(saved.state_dict(), strict=not is_partial)
        model.to(processes.device).train()
    if stage == 2:
        model.sentence_head.requires_grad_(False)
    is_half = settings.precision == "bf16"
    if is_half:
        keep_bf16(model)
    again = recomputed_layers(
        config,
        settings,
        stage,
        processes.device,
        world_size=processes.data_size,
        cards=processes.world_size if is_sharded else 1,
    )
    recompute_layers(model, again)
    if settings.fp8_products:
        multiply_in_fp8(model)
    if again and settings.recomputation == "auto":
        _tell(processes, f"为了放得下，反向时重算 {again} 层。")
    if settings.compile:
        compile_model(model, is_sharded=is_sharded)
    if is_sharded:
        shard_new(
            model,
            settings.parallel,
            processes,
            seed=settings.seed,
            source=directory,
            compute_dtype=torch.bfloat16 if is_half else None,
        )
    return model


def _check_source(model: Plug, source: str, tokenizer: PlugTokenizer, corpus: str) -> Path:
    """Return the directory of a checkpoint, or of stage 1, if its weights are for ``model``.

    A decoder that it lacks stays new.
    """
    directory = find_model_directory(source)
    refuse_quantized(directory)
    theirs = PlugConfig.from_file(directory / CONFIG_FILE).to_dict()
    ours = model.config.to_dict()
    differing = {name for name in ours if ours[name] != theirs[name]}
    if (model.decoder is None) != (theirs["num_decoder_layers"] == 0):
        differing.remove("num_decoder_layers")
    if differing:
        listed = "、".join(
            f"{name} 是 {theirs[name]}，这里要 {ours[name]}" for name in sorted(differing)
        )
        raise UsageError(f"模型 {source} 的形状与设置不同：{listed}。")
    vocabulary = PlugTokenizer.load(directory).backend.get_vocab()
    if vocabulary != tokenizer.backend.get_vocab():
        raise UsageError(f"模型 {source} 的词表与语料 {corpus} 的不同。请用它的词表编码语料。")
    return directory


def _build_batches(
    stage: int, config: RunConfig, tokenizer: PlugTokenizer, processes: Processes
) -> Batches:
    plan = BatchPlan(
        domains=read_tokens(Path(config.corpus)),
        tokenizer=tokenizer,
        shapes=config.parsed_shapes(dimensions=stage),
        batch_tokens=config.batch_tokens,
        domain_exponent=config.domain_exponent,
        domain_factors=config.domain_factors,
        mlm_rate=config.mlm_rate,
        seed=config.seed,
        rank=processes.data_rank,
        world_size=processes.data_size,
    )
    if stage == 1:
        return StructBertBatches(
            plan,
            shuffle_rate=config.shuffle_rate,
            sentence_objective=config.sentence_objective,
        )
    return PalmBatches(
        plan,
        clean_from=round(config.mlm_fraction * config.steps),
        whole_sentence_share=config.whole_sentence_share,
    )

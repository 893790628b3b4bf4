"""The training loop of both stages: `plug pretrain stage1|stage2`.

A plain PyTorch loop on a CPU, one GPU, or (under `torchrun`) one process a device: every process
makes its share of each batch, gradients are summed. A run is exact to resume: batch, dropout and
learning rate of a step depend on the seed and the step alone.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader

from plug.checkpoints.directory import CONFIG_FILE, find_model_directory, refuse_quantized
from plug.checkpoints.weights import save_pickle
from plug.distributed.processes import Processes, start_processes
from plug.errors import PlugError, UsageError
from plug.files import replace_directory
from plug.loading.load import load
from plug.loading.save import save, write_model
from plug.model.configuration import PRESETS, PlugConfig
from plug.model.plug import Plug
from plug.pretraining import losses as loss_functions
from plug.pretraining.batches import (
    Batch,
    BatchPlan,
    PalmBatches,
    StructBertBatches,
    global_batch_tokens,
)
from plug.pretraining.optimization import build_optimizers, learning_rate_scale
from plug.pretraining.progress import Progress
from plug.pretraining.record import Record, plot_losses
from plug.pretraining.settings import RunConfig
from plug.pretraining.tokens import read_tokens
from plug.tokenization import PlugTokenizer

STATE_FILE = "training_state.pt"
# settings that change nothing of what is computed
FREE_ON_RESUME = frozenset({"output", "workers", "checkpoint_every", "log_every"})

LossFunction = Callable[[Plug, Batch], dict[str, Tensor]]


def pretrain(
    stage: int, config: RunConfig, *, resume: bool = False, device: str | None = None
) -> None:
    """Run one stage and leave `OUTPUT/model`, a directory that `plug.load` reads.

    Args:
        stage: 1 (StructBERT, encoder alone) or 2 (PALM, the whole model).
        config: the settings.
        resume: go on from `OUTPUT/checkpoint`.
        device: as in `find_device`; under `torchrun` "cuda" is the GPU of the process's number.

    Raises:
        UsageError: settings, corpus and model do not fit each other; or `OUTPUT` holds a run.
        PlugError: the loss is no longer a number; the disk or the memory is full.
    """
    with start_processes(device) as processes:
        run = _Run(stage, config, resume, processes)
        if processes.world_size > 1:
            dist.barrier()  # all have looked at OUTPUT before the first writes there
        with _plain_errors(config):
            run.train()


@contextmanager
def _plain_errors(config: RunConfig) -> Iterator[None]:
    """What the machine may lack while training, as a `PlugError`."""
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


class _Run:
    """One run in one process."""

    def __init__(self, stage: int, config: RunConfig, resume: bool, processes: Processes) -> None:
        self.stage, self.config, self.processes = stage, config, processes
        self.output = Path(config.output)
        self.tokenizer = PlugTokenizer.load(config.corpus)
        self.first_step = 0
        state = self._read_state() if resume else None
        if not resume:
            self._check_new()
        torch.manual_seed(config.seed)
        self.model = self._build_model(resume)
        self.batches = self._build_batches()
        self.losses: LossFunction = (
            loss_functions.structbert_losses if stage == 1 else loss_functions.palm_losses
        )
        self.optimizers = build_optimizers(
            self.model,
            name=config.optimizer,
            learning_rate=config.learning_rate,
            betas=(config.betas[0], config.betas[1]),
            weight_decay=config.weight_decay,
        )
        self.tokens = 0
        if state is not None:
            for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(saved)
            self.first_step, self.tokens = state["step"], state["tokens"]

    def _check_new(self) -> None:
        if self.output.exists() and not self.output.is_dir():
            raise UsageError(f"输出目录 {self.output} 是一个文件。请换一个 output。")
        if self.output.exists() and any(self.output.iterdir()):
            raise UsageError(
                f"输出目录 {self.output} 已有内容。接着训练请加 --resume，否则请换一个 output。"
            )

    def _read_state(self) -> dict[str, Any]:
        path = self.output / "checkpoint" / STATE_FILE
        if not path.is_file():
            raise UsageError(f"{self.output} 里没有可以接着训练的检查点（缺 {path}）。")
        try:
            state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
            saved = {"stage": state["stage"], **state["config"]}
            processes_before = state["world_size"]
        except Exception as error:  # torch raises whatever the bytes lead to
            reason = str(error).split("\n")[0]
            raise PlugError(
                f"检查点 {path} 已损坏（{reason}）。请换一个 output 重新训练。"
            ) from None
        wanted = {"stage": self.stage, **dataclasses.asdict(self.config)}
        differing = sorted(
            name for name in wanted.keys() - FREE_ON_RESUME if saved.get(name) != wanted[name]
        )
        if differing:
            raise UsageError(
                f"检查点 {path} 是用别的设置训练的，不同之处：{'、'.join(differing)}。"
                "请改回来，或换一个 output 重新训练。"
            )
        # Batches are the same whatever the number of processes; the draws of dropout are not.
        if self.config.dropout and processes_before != self.processes.world_size:
            raise UsageError(
                f"检查点 {path} 是用 {processes_before} 个进程训练的，现在有"
                f" {self.processes.world_size} 个，而 dropout={self.config.dropout}："
                "接下去不会与不中断的训练相同。请用同样多的进程"
                f"（torchrun --nproc-per-node {processes_before}），或换一个 output 重新训练。"
            )
        return state

    def _model_config(self) -> PlugConfig:
        preset, tokenizer = PRESETS[self.config.preset].to_dict(), self.tokenizer
        given = {
            "vocab_size": -(-tokenizer.vocab_size // 128) * 128,  # whole tiles for the GPU
            "num_emitted_tokens": tokenizer.vocab_size,
            "pad_token_id": tokenizer.pad_token_id,
            "unk_token_id": tokenizer.unk_token_id,
            "decoder_start_token_id": tokenizer.cls_token_id,
            "eos_token_id": tokenizer.sep_token_id,
            "mask_token_id": tokenizer.mask_token_id,
        }
        if clashing := sorted(given.keys() & self.config.model.keys()):
            raise UsageError(f"model 里的 {'、'.join(clashing)} 由语料的分词器决定，请删去。")
        config = PlugConfig.from_dict(preset | self.config.model | given)
        if config.type_vocab_size < 2:
            raise UsageError("预训练要分两段：type_vocab_size 应不小于 2。")
        if self.stage == 2 and config.num_decoder_layers == 0:
            raise UsageError("第二阶段需要解码器：num_decoder_layers 应不小于 1。")
        return dataclasses.replace(config, num_decoder_layers=0) if self.stage == 1 else config

    def _build_model(self, resume: bool) -> Plug:
        config = self._model_config()
        longest = max(max(shape) for shape, _ in self._shapes())
        if longest > config.max_position_embeddings:
            raise UsageError(
                f"shapes 里的长度 {longest} 超过了 max_position_embeddings="
                f"{config.max_position_embeddings}。"
            )
        dropout = self.config.dropout
        model = Plug(
            dataclasses.replace(
                config, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout
            )
        )
        model.config = config  # saved with the preset's dropout, which fine-tuning wants
        source = str(self.output / "checkpoint") if resume else self.config.init_from
        if source:
            self._read_weights(model, source)
        model.to(self.processes.device).train()
        if self.stage == 2:
            model.sentence_head.requires_grad_(False)
        if self.config.compile:
            compile_layers(model)
        return model

    def _read_weights(self, model: Plug, source: str) -> None:
        """Weights of a checkpoint, or of stage 1 (the decoder stays new if it has none)."""
        directory = find_model_directory(source)
        refuse_quantized(directory)
        saved = load(directory)
        ours, theirs = model.config.to_dict(), saved.config.to_dict()
        differing = {name for name in ours if ours[name] != theirs[name]}
        is_partial = (model.decoder is None) != (saved.decoder is None)
        if is_partial:
            differing.remove("num_decoder_layers")
        if differing:
            listed = "、".join(
                f"{name} 是 {theirs[name]}，这里要 {ours[name]}" for name in sorted(differing)
            )
            raise UsageError(f"模型 {source} 的形状与设置不同：{listed}。")
        vocabulary = PlugTokenizer.load(directory).backend.get_vocab()
        if vocabulary != self.tokenizer.backend.get_vocab():
            raise UsageError(
                f"模型 {source} 的词表与语料 {self.config.corpus} 的不同。请用它的词表编码语料。"
            )
        model.load_state_dict(saved.state_dict(), strict=not is_partial)

    def _shapes(self) -> list[tuple[tuple[int, ...], float]]:
        return self.config.parsed_shapes(dimensions=self.stage)

    def _build_batches(self) -> StructBertBatches | PalmBatches:
        config = self.config
        plan = BatchPlan(
            domains=read_tokens(Path(config.corpus)),
            tokenizer=self.tokenizer,
            shapes=self._shapes(),
            batch_tokens=config.batch_tokens,
            domain_exponent=config.domain_exponent,
            domain_factors=config.domain_factors,
            mlm_rate=config.mlm_rate,
            seed=config.seed,
            rank=self.processes.rank,
            world_size=self.processes.world_size,
        )
        if self.stage == 1:
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

    def train(self) -> None:
        config, first = self.config, self.processes.is_first
        if first:
            self.output.mkdir(parents=True, exist_ok=True)
            settings = {"stage": self.stage, **dataclasses.asdict(config)}
            (self.output / "settings.json").write_text(
                json.dumps(settings, ensure_ascii=False, indent=2) + "\n", encoding="utf-8"
            )
        names = ["mlm", "word", "sentence"] if self.stage == 1 else ["lm", "mlm"]
        record = Record(self.output / "log.csv", names, self.first_step) if first else None
        loader = DataLoader(
            self.batches,
            batch_size=None,
            sampler=range(self.first_step, config.steps),
            num_workers=config.workers,
            pin_memory=self.processes.device.type == "cuda",
        )
        began, seconds_before = time.perf_counter(), record.seconds_before if record else 0.0
        since, tokens_since = began, self.tokens
        with Progress(config.steps, self.first_step, shown=first) as progress:
            for step, batch in enumerate(loader, start=self.first_step):
                means, grad_norm = self._step(step, batch)
                self.tokens += global_batch_tokens(batch, config.batch_tokens)
                done = step + 1
                is_last = done == config.steps
                saves = done % config.checkpoint_every == 0 and not is_last
                logs = done % config.log_every == 0 or is_last
                if logs or saves:
                    values = {name: float(mean) for name, mean in means.items()}
                    _check_finite({**values, "grad_norm": float(grad_norm)}, done)
                if logs:
                    now = time.perf_counter()  # float() above waited for the device
                    rate = (self.tokens - tokens_since) / (now - since)
                    since, tokens_since = now, self.tokens
                    row = {
                        "step": done,
                        "tokens": self.tokens,
                        "seconds": round(seconds_before + now - began, 2),
                        "tokens_per_second": round(rate),
                        "learning_rate": self.optimizers[0].param_groups[0]["lr"],
                        "grad_norm": round(float(grad_norm), 4),
                        **{name: round(value, 6) for name, value in values.items()},
                    }
                    if record:
                        record.add(row)
                    progress.update(done, rate, values)
                if saves and first:
                    self._save_checkpoint(done)
        if first:
            self._finish()

    def _step(self, step: int, batch: Batch) -> tuple[dict[str, Tensor], Tensor]:
        """One optimiser step; mean losses by name and the gradient's norm, left on the device."""
        config, processes = self.config, self.processes
        # dropout depends on the step and the process alone, so that a resumed run repeats it
        torch.manual_seed((config.seed * 1_000_003 + step) * 4099 + processes.rank)
        batch = {
            name: tensor.to(processes.device, non_blocking=True) for name, tensor in batch.items()
        }
        counts = loss_functions.prediction_counts(batch)
        if processes.world_size > 1:
            for count in counts.values():
                dist.all_reduce(count)
        sums = {name: torch.zeros((), device=processes.device) for name in counts}
        for part in _split(batch, config.micro_batch_tokens):
            with torch.autocast(
                processes.device.type, torch.bfloat16, enabled=config.precision == "bf16"
            ):
                part_sums = self.losses(self.model, part)
            # a count is 0 where no trigram was free to be shuffled
            means = [part_sums[name] / counts[name].clamp(min=1) for name in part_sums]
            torch.stack(means).sum().backward()
            for name, value in part_sums.items():
                sums[name] += value.detach()
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        if processes.world_size > 1:
            waiting = [dist.all_reduce(p.grad, async_op=True) for p in parameters]
            waiting += [dist.all_reduce(value, async_op=True) for value in sums.values()]
            for handle in waiting:
                handle.wait()
        grad_norm = torch.nn.utils.clip_grad_norm_(parameters, config.clip_grad_norm)
        warmup = round(config.warmup_fraction * config.steps)
        scale = learning_rate_scale(step, config.steps, warmup, config.schedule)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate * scale
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return {name: sums[name] / counts[name].clamp(min=1) for name in sums}, grad_norm

    def _save_checkpoint(self, step: int) -> None:
        state = {
            "stage": self.stage,
            "step": step,
            "tokens": self.tokens,
            "world_size": self.processes.world_size,
            "config": dataclasses.asdict(self.config),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }
        with replace_directory(self.output / "checkpoint", CONFIG_FILE) as directory:
            write_model(self.model, directory, tokenizer=self.tokenizer)
            save_pickle(state, directory / STATE_FILE)

    def _finish(self) -> None:
        save(self.model, self.output / "model", tokenizer=self.tokenizer)
        try:
            plot_losses(self.output / "log.csv", self.output / "loss.png")
        except ImportError:
            print('没有画损失曲线：请安装 pip install "plug-zh[train]"。', file=sys.stderr)  # noqa: T201


def _check_finite(values: dict[str, float], step: int) -> None:
    broken = [name for name, value in values.items() if not math.isfinite(value)]
    if broken:
        raise PlugError(
            f"第 {step} 步的 {'、'.join(broken)} 不再是有限的数。"
            "请降低 learning_rate 或加大 warmup_fraction，换一个 output 重新训练。"
        )


def _split(batch: Batch, micro_batch_tokens: int) -> Iterator[Batch]:
    """The batch in parts of at most ``micro_batch_tokens`` tokens (at least one row each)."""
    rows = len(batch["input_ids"])
    tokens = sum(batch[k].numel() for k in ("input_ids", "decoder_input_ids") if k in batch)
    parts = min(rows, -(-tokens // micro_batch_tokens))
    size = -(-rows // parts)
    for start in range(0, rows, size):
        yield {name: tensor[start : start + size] for name, tensor in batch.items()}


def compile_layers(model: Plug) -> None:
    """`torch.compile` each layer in place: they share one compiled graph, so it takes seconds."""
    for part in (model.encoder, model.decoder):
        for layer in part.layers if part is not None else ():
            layer.compile()
    model.embeddings.compile()
    loss_functions.cross_entropy_sum = torch.compile(loss_functions.cross_entropy_sum)

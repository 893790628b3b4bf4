"""The Trainer of `transformers`, scored by a `Kind`, and what may be added to its steps."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Sampler
from tqdm.auto import tqdm
from transformers import Trainer, TrainerCallback
from transformers.trainer_pt_utils import LengthGroupedSampler

from plug.distributed.fully_sharded import is_fully_sharded
from plug.distributed.norms import clip_shards, norm_of
from plug.errors import PlugError
from plug.finetuning import sharded_state
from plug.finetuning.fused_backward import FusedAdafactor, FusedAdamW8bit
from plug.finetuning.kind import Features
from plug.finetuning.settings import FinetuneSettings
from plug.finetuning.sharding import without_wrapper
from plug.hf.base import cross_entropy
from plug.model.heads import IGNORE_INDEX

_INPUTS = ("input_ids", "token_type_ids")  # of `Features`; the others are labels
_FUSED = {"adafactor": FusedAdafactor, "adamw8bit_fused": FusedAdamW8bit}


class FinetuneTrainer(Trainer):
    """Evaluates by ``score``; layer-wise rates, R-Drop, smoothing and FGM as the settings say.

    Args:
        score: given the model, metrics by name.
        settings: of the run.
        write_beside: given a checkpoint's directory, writes what a model directory has beside its
            weights; in the first process.
        options: those of `Trainer`.
    """

    def __init__(
        self,
        *,
        score: Callable[[Any], dict[str, float]],
        settings: FinetuneSettings,
        write_beside: Callable[[Path], None] = lambda _directory: None,
        **options: Any,
    ) -> None:
        self.write_beside = write_beside
        self.is_sharded = is_fully_sharded(options["model"])
        if features := options.get("train_dataset"):
            args = options["args"]
            options["train_dataset"] = filled_up(features, args.train_batch_size * args.world_size)
        self.example_count = len(features or ())
        super().__init__(**options)
        self.model_accepts_loss_kwargs = True  # every loss is a mean over the step, not a batch
        self.score = score
        self.settings = settings
        self.is_fused = settings.is_fused  # steps are taken in the backward pass
        self.order = torch.Generator()  # of the examples of an epoch; `Epochs` seeds it
        self.add_callback(Epochs(self.order))
        if self.is_sharded:
            options["model"]._is_accelerate_prepared = True  # else Accelerate wraps it for DDP
        if self.is_deepspeed_enabled:  # its optimizer has weights of its own, in float32
            without_wrapper(options["model"]).warns_of_half_precision = False

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        if not self.is_sharded:  # shards are where they belong
            super()._move_model_to_device(model, device)

    def _get_train_sampler(self, *_args: Any, **_kwargs: Any) -> Sampler[int]:
        """Texts of like length together; the order is the same for any number of processes."""
        args, dataset = self.args, self.train_dataset
        assert isinstance(dataset, list)
        together = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        lengths = [len(each["input_ids"]) for each in dataset[: self.example_count]]
        return _FilledUp(len(dataset), together, lengths=lengths, generator=self.order)

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        """As `Trainer`'s; on a CPU, and of shards there, torch's own norm would be too small."""
        most, device = self.args.max_grad_norm, self.args.device
        if not self.is_sharded and (device.type != "cpu" or self.is_deepspeed_enabled):
            return super()._clip_grad_norm(model)
        parameters = [each for each in model.parameters() if each.grad is not None]
        gradients: list[Any] = [each.grad for each in parameters]
        if self.is_sharded:
            return clip_shards({1: [each.to_local() for each in gradients]}, most, device)
        norm = norm_of(gradients)
        nn.utils.clip_grads_with_norm_(parameters, most, norm)
        return norm

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As `Trainer.save_model`; of a sharded model each process writes what it trains."""
        directory = Path(output_dir or str(self.args.output_dir))
        if self.is_deepspeed_enabled:  # weights are in what its engine saves, with the states
            directory.mkdir(parents=True, exist_ok=True)
            return
        if self.is_sharded:
            sharded_state.write_weights(directory, self._bare_model())
        else:
            super().save_model(output_dir, _internal_call)
        if self.args.should_save:
            self.write_beside(directory)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_sharded:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        sharded_state.write_optimizer(
            Path(output_dir), self._bare_model(), self._bare_optimizer(), self.lr_scheduler
        )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if not self.is_sharded:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        sharded_state.read_weights(Path(resume_from_checkpoint), self._bare_model())

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if not self.is_sharded or checkpoint is None:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        sharded_state.read_optimizer(
            Path(checkpoint), self._bare_model(), self._bare_optimizer(), self.lr_scheduler
        )

    def _load_best_model(self) -> None:
        if not self.is_sharded:
            super()._load_best_model()
            return
        assert self.state.best_model_checkpoint is not None
        sharded_state.read_weights(Path(self.state.best_model_checkpoint), self._bare_model())

    def _bare_model(self) -> nn.Module:
        assert self.model is not None
        return self.model

    def _bare_optimizer(self) -> torch.optim.Optimizer:
        optimizer: Any = self.optimizer
        return getattr(optimizer, "optimizer", optimizer)  # out of Accelerate's

    def evaluate(self, *_args: Any, metric_key_prefix: str = "eval", **_kwargs: Any) -> Any:
        """Metrics of the evaluation file, logged and told to the callbacks."""
        scores = self.score(self.model)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in scores.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def create_optimizer(self, *_args: Any) -> Any:
        """Make the optimizer; with `layer_decay` a group of parameters has its own rate."""
        model: Any = self.model
        if self.optimizer is None:
            decayed = set(self.get_decay_parameter_names(model))
            groups: dict[tuple[float, float], list[nn.Parameter]] = {}
            scales = learning_rate_scales(model, self.settings.layer_decay)
            for name, parameter in model.named_parameters():
                if parameter.requires_grad:
                    weight_decay = self.args.weight_decay if name in decayed else 0.0
                    groups.setdefault((scales[name], weight_decay), []).append(parameter)
            options: dict[str, Any] = {"lr": self.args.learning_rate, "seed": self.settings.seed}
            cls: Any = _FUSED.get(self.settings.optimizer)
            if cls is None:
                cls, options = self.get_optimizer_cls_and_kwargs(self.args, model)
            rate = options.pop("lr")
            optimizer = cls(
                [
                    {"params": parameters, "lr": rate * scale, "weight_decay": weight_decay}
                    for (scale, weight_decay), parameters in groups.items()
                ],
                lr=rate,
                **options,
            )
            if self.is_fused:
                optimizer.fuse()
                model.warns_of_half_precision = False
            self.optimizer = optimizer
        return self.optimizer

    def diverged(self, what: str) -> PlugError:
        """Return the error of a run whose ``what`` is NaN or infinite."""
        return PlugError(
            f"第 {self.state.global_step} 步的 {what} 不再是有限的数。"
            f"请降低 learning_rate（现在是 {self.settings.learning_rate}），换一个输出目录。"
        )

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As `Trainer.log`; a loss that is no number ends the run."""
        if not math.isfinite(logs.get("loss", 0.0)):
            raise self.diverged("loss")
        if self.is_fused:
            logs.pop("grad_norm", None)  # nobody knows it
        super().log(logs, *args, **kwargs)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any) -> Tensor:
        """Gradients of a batch; with `fgm` also those at embeddings moved against the loss."""
        loss = super().training_step(model, inputs, *args)
        if self.settings.fgm:
            bare: Any = self.model
            with moved_uphill(bare.embeddings.word_embeddings.weight, self.settings.fgm):
                super().training_step(model, inputs, *args)
        return loss

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Any]:
        """As `Trainer`'s: the batches of a step, and how many labels, or answers, it has."""
        batches, items = super().get_batch_samples(*args, **kwargs)
        if items is None and batches:  # it counts `labels` alone
            device = self.args.device
            counts = [_answers(batch).ne(IGNORE_INDEX).sum().to(device) for batch in batches]
            items = self.accelerator.gather(torch.stack(counts).sum()).sum()
        return batches, items

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The mean over the step's labels, or answers, in all of its batches and processes.

        It is smoothed, or of two passes and their divergence, as the settings say.

        Source: R-Drop is Liang et al. 2021, arXiv:2106.14448, equation 4: both passes' negative
        log-likelihoods, plus alpha times the mean of the two divergences. Smoothing is Szegedy et
        al. 2016, arXiv:1512.00567, section 7.
        """
        smoothing, r_drop = self.settings.label_smoothing, self.settings.r_drop
        answers = _answers(inputs)
        if answers.dim() > 1 and not (smoothing or r_drop):  # labels of tokens
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        # The items are those of all processes, whose gradients are then averaged.
        processes, items = self.accelerator.num_processes, num_items_in_batch
        counted = answers.ne(IGNORE_INDEX)
        if items is None:
            items = counted.sum() * processes
        if r_drop:
            inputs = {name: torch.cat([value, value]) for name, value in inputs.items()}
        outputs = model(**inputs)
        if "labels" in inputs:
            # With R-Drop each item stands twice: the sum is both passes' negative log-likelihoods.
            loss = cross_entropy(outputs.logits, inputs["labels"], 1, smoothing)
        else:
            loss = outputs.loss * counted.sum()
        if r_drop:
            first, second = outputs.logits.chunk(2)
            loss = loss + r_drop * symmetric_divergence(first[counted], second[counted])
        loss = loss / items * processes
        return (loss, outputs) if return_outputs else loss


class _FilledUp(LengthGroupedSampler):
    """The examples in the order of `LengthGroupedSampler`, then those of `filled_up`."""

    def __init__(self, total: int, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.total = total

    def __len__(self) -> int:
        return self.total

    def __iter__(self) -> Iterator[int]:
        yield from super().__iter__()
        yield from range(len(self.lengths), self.total)


def filled_up(features: list[Features], multiple: int) -> list[Features]:
    """The features, and as many without labels as make their number a multiple of ``multiple``.

    So each process gets as many batches as the others. Accelerate would repeat examples, which
    would count twice.
    """
    shortest = min(features, key=lambda each: len(each["input_ids"]))
    empty = {
        name: value if name in _INPUTS else _ignored(value) for name, value in shortest.items()
    }
    return [*features, *[empty] * (-len(features) % multiple)]


def _ignored(labels: Any) -> Any:
    return [IGNORE_INDEX] * len(labels) if isinstance(labels, list) else IGNORE_INDEX


def _answers(inputs: dict[str, Any]) -> Tensor:
    """Labels of a batch, (batch,) or of tokens; of reading, where the answers begin."""
    return inputs["labels" if "labels" in inputs else "start_positions"]


@contextmanager
def moved_uphill(weight: nn.Parameter, length: float) -> Iterator[None]:
    """In its block ``weight`` is moved by ``length`` along its gradient, where the loss rises.

    Source: Miyato et al. 2017, arXiv:1605.07725, equation 5; on the table, not on each text's
    vectors, as is usual in fine-tuning.
    """
    assert weight.grad is not None
    gradient = weight.grad.detach()
    tiny = torch.finfo(gradient.dtype).tiny  # no gradient, no step
    before = weight.detach().clone()
    weight.data += length * gradient / gradient.norm().clamp(min=tiny)
    yield
    weight.data.copy_(before)


def symmetric_divergence(first: Tensor, second: Tensor) -> Tensor:
    """Sum over rows of the mean of both Kullback-Leibler divergences between logits, in nats.

    Args:
        first: (rows, labels).
        second: as many.
    """
    p, q = first.float().log_softmax(-1), second.float().log_softmax(-1)
    both = [F.kl_div(a, b, log_target=True, reduction="sum") for a, b in ((p, q), (q, p))]
    return torch.stack(both).mean()


def learning_rate_scales(model: Any, decay: float) -> dict[str, float]:
    """For each parameter, ``decay`` to the power of its layers below the top.

    Embeddings are below the encoder's layers, those below the decoder's; all else is at the top.

    Source: Howard and Ruder 2018, arXiv:1801.06146, section 3.2, layer by layer as in ELECTRA.
    """
    names = [name for name, _ in model.named_parameters()]
    depths = {name: _depth(name, model.config.num_hidden_layers) for name in names}
    top = max(depth for depth in depths.values() if depth is not None) + 1
    return {
        name: decay ** (top - (top if depth is None else depth)) for name, depth in depths.items()
    }


def _depth(name: str, num_hidden_layers: int) -> int | None:
    name = name.removeprefix("base_model.model.")  # of peft
    if name.startswith("embeddings."):
        return 0
    if match := re.match(r"(encoder|decoder)\.layers\.(\d+)\.", name):
        return 1 + int(match[2]) + (num_hidden_layers if match[1] == "decoder" else 0)
    return num_hidden_layers if name.startswith("encoder.final_norm") else None


class Epochs(TrainerCallback):
    """Seeds the order of the examples by the run's seed and the epoch alone.

    So a resumed run sees the examples that are left, on any number of processes.
    """

    def __init__(self, order: torch.Generator) -> None:
        self.order = order

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        self.order.manual_seed(args.seed * 1_000_003 + math.floor((state.epoch or 0) + 1e-6))


class ChildTuning(TrainerCallback):
    """Keeps a random share of the gradients of every step, and makes them larger to match.

    Source: Xu et al. 2021, arXiv:2109.05687, Child-Tuning-F.
    """

    def __init__(self, share: float) -> None:
        self.share = share

    def on_pre_optimizer_step(
        self, *_args: Any, model: nn.Module | None = None, **_kwargs: Any
    ) -> None:
        assert model is not None
        for parameter in model.parameters():
            if parameter.grad is not None:
                kept = torch.rand_like(parameter.grad) < self.share
                parameter.grad *= kept / self.share


class Tell(TrainerCallback):
    """Shows on standard error how far training is: a bar on a terminal, a line an evaluation.

    The Trainer's own callbacks print its logs as dictionaries. Here they go to `log.jsonl` alone.

    Args:
        metric: the score that a line shows.
    """

    def __init__(self, metric: str) -> None:
        self.metric = metric
        self.bar: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        if state.is_world_process_zero:
            is_terminal = sys.stderr.isatty()
            self.bar = tqdm(total=state.max_steps, dynamic_ncols=True, disable=not is_terminal)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        if self.bar is not None:
            value = kwargs["metrics"][f"eval_{self.metric}"]
            self.bar.write(
                f"第 {state.epoch:g} 轮（{state.global_step}/{state.max_steps} 步）："
                f"{self.metric} {value:.4f}",
                file=sys.stderr,
            )

    def on_train_end(self, *_args: Any, **_kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None

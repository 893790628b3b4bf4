"""The Trainer of `transformers`, scored by a `Kind`, and what may be added to its steps."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import Trainer, TrainerCallback

from plug.errors import PlugError
from plug.finetuning.fused_backward import FusedAdafactor
from plug.finetuning.settings import FinetuneSettings
from plug.hf.base import cross_entropy
from plug.model.heads import IGNORE_INDEX


class FinetuneTrainer(Trainer):
    """Evaluates by ``score``; layer-wise rates, R-Drop, smoothing and FGM as the settings say.

    Args:
        score: given the model, metrics by name.
        settings: of the run.
        options: those of `Trainer`.
    """

    def __init__(
        self,
        *,
        score: Callable[[Any], dict[str, float]],
        settings: FinetuneSettings,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.score = score
        self.settings = settings
        self.is_fused = settings.optimizer == "adafactor"  # steps are taken in the backward pass

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
            cls: Any = FusedAdafactor
            options: dict[str, Any] = {"lr": self.args.learning_rate, "seed": self.settings.seed}
            if not self.is_fused:
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

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The model's loss; smoothed, or of two passes and their divergence, as the settings say.

        Source: R-Drop is Liang et al. 2021, arXiv:2106.14448, equation 4: both passes' negative
        log-likelihoods, plus alpha times the mean of the two divergences. Smoothing is Szegedy et
        al. 2016, arXiv:1512.00567, section 7.
        """
        smoothing, r_drop = self.settings.label_smoothing, self.settings.r_drop
        if not (smoothing or r_drop):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        # The items are those of all processes, whose gradients are then averaged. Classification is
        # not told of them; there each process has as many.
        processes, items = self.accelerator.num_processes, num_items_in_batch
        if items is None:
            items = inputs["labels"].ne(IGNORE_INDEX).sum() * processes
        if r_drop:
            inputs = {name: torch.cat([value, value]) for name, value in inputs.items()}
        outputs = model(**inputs)
        # With R-Drop each item stands twice: the sum is both passes' negative log-likelihoods.
        loss = cross_entropy(outputs.logits, inputs["labels"], items, smoothing) * processes
        if r_drop:
            loss = loss + r_drop * symmetric_divergence(*outputs.logits.chunk(2))
        return (loss, outputs) if return_outputs else loss


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
    """Mean of both Kullback-Leibler divergences between logits (batch, labels), in nats."""
    p, q = first.float().log_softmax(-1), second.float().log_softmax(-1)
    both = [F.kl_div(a, b, log_target=True, reduction="batchmean") for a, b in ((p, q), (q, p))]
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

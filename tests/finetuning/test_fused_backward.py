"""Steps in the backward pass: the same as after it, with one gradient at a time."""

from __future__ import annotations

import gc
import io
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

from plug import PlugForConditionalGeneration, PlugTransformersConfig
from plug.finetuning.fused_backward import FusedAdafactor, FusedAdamW8bit, FusedOptimizer
from plug.finetuning.recomputation import recompute_layers
from plug.model.configuration import PlugConfig

BOTH = pytest.mark.parametrize("cls", [FusedAdafactor, FusedAdamW8bit])


def make(
    config: PlugConfig,
    dtype: torch.dtype,
    seed: int = 0,
    cls: type[FusedAdafactor | FusedAdamW8bit] = FusedAdafactor,
) -> tuple[Any, FusedOptimizer]:
    torch.manual_seed(0)
    model = PlugForConditionalGeneration(PlugTransformersConfig(**config.to_dict())).to(dtype)
    model.train()
    model.warns_of_half_precision = False
    trained = [each for each in model.parameters() if each.requires_grad]
    groups = [
        {"params": trained[::2], "weight_decay": 0.01},
        {"params": trained[1::2], "lr": 2e-3},
    ]
    return model, cls(groups, lr=1e-3, seed=seed)


def batch(number: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(number)
    return {
        "input_ids": torch.randint(5, 300, (2, 9), generator=generator),
        "labels": torch.randint(5, 300, (2, 4), generator=generator),
    }


def train(model: Any, optimizer: FusedOptimizer, steps: range) -> list[float]:
    losses = []
    for number in steps:
        torch.manual_seed(number)  # of dropout
        loss = model(**batch(number)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


@BOTH
@pytest.mark.parametrize("recomputes", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_equals_unfused_bit_for_bit(
    dtype: torch.dtype,
    recomputes: bool,
    cls: type[FusedAdafactor | FusedAdamW8bit],
    config: PlugConfig,
) -> None:
    plain, optimizer = make(config, dtype, cls=cls)
    expected = train(plain, optimizer, range(3))
    fused, optimizer = make(config, dtype, cls=cls)
    if recomputes:
        recompute_layers(fused, 99)
    optimizer.fuse()
    assert train(fused, optimizer, range(3)) == expected
    for (name, parameter), other in zip(plain.named_parameters(), fused.parameters(), strict=True):
        assert torch.equal(parameter, other), name
        assert other.grad is None


def test_each_weight_takes_one_step_and_few_gradients_exist_at_once(config: PlugConfig) -> None:
    model, optimizer = make(config, torch.bfloat16)
    counts: dict[int, int] = {}
    alive = []
    for parameter in model.parameters():
        if parameter.requires_grad:

            def count(parameter: Tensor) -> None:
                counts[id(parameter)] = counts.get(id(parameter), 0) + 1
                alive.append(sum(each.grad is not None for each in model.parameters()))

            parameter.register_post_accumulate_grad_hook(count)
    optimizer.fuse()
    train(model, optimizer, range(1))
    trained = [each for each in model.parameters() if each.requires_grad]
    # The word table too, which the model reads in both halves and writes with.
    assert counts == {id(each): 1 for each in trained}
    assert max(alive) == 1
    assert all(optimizer.state[each]["step"] == 1 for each in trained)


@BOTH
def test_a_resumed_run_equals_an_unbroken_one(
    cls: type[FusedAdafactor | FusedAdamW8bit], config: PlugConfig
) -> None:
    whole, optimizer = make(config, torch.bfloat16, seed=3, cls=cls)
    optimizer.fuse()
    expected = train(whole, optimizer, range(6))

    broken, optimizer = make(config, torch.bfloat16, seed=3, cls=cls)
    optimizer.fuse()
    first = train(broken, optimizer, range(3))
    saved = io.BytesIO()
    torch.save([broken.state_dict(), optimizer.state_dict()], saved)
    saved.seek(0)
    weights, state = torch.load(saved, weights_only=True)
    resumed, optimizer = make(config, torch.bfloat16, seed=3, cls=cls)
    resumed.load_state_dict(weights)
    optimizer.fuse()
    optimizer.load_state_dict(state)
    assert first + train(resumed, optimizer, range(3, 6)) == expected
    for parameter, other in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(parameter, other)


def test_rates_are_read_in_the_backward_pass(config: PlugConfig) -> None:
    model, optimizer = make(config, torch.float32)
    optimizer.fuse()
    optimizer.load_state_dict(optimizer.state_dict())  # it makes new groups, as accelerate does
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: float(step > 0))
    before = [each.detach().clone() for each in model.parameters()]
    train(model, optimizer, range(1))  # at a rate of 0
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    schedule.step()
    train(model, optimizer, range(1, 2))
    trained = {id(each) for _, _, each in optimizer._parameters()}
    for parameter, earlier in zip(model.parameters(), before, strict=True):
        assert torch.equal(parameter, earlier) == (id(parameter) not in trained)


def test_gradients_cannot_be_added_up(config: PlugConfig) -> None:
    model, optimizer = make(config, torch.float32)
    optimizer.fuse()
    model(**batch(0)).loss.backward()
    with pytest.raises(RuntimeError, match="no gradient accumulation"):
        model(**batch(1)).loss.backward()


def test_a_model_is_freed_with_its_optimizer(config: PlugConfig) -> None:
    model, optimizer = make(config, torch.bfloat16)
    optimizer.fuse()
    train(model, optimizer, range(1))
    parameter = weakref.ref(next(model.parameters()))
    del model, optimizer
    gc.collect()
    assert parameter() is None


@pytest.mark.gpu
def test_a_whole_set_of_gradients_never_exists() -> None:
    config = PlugConfig(hidden_size=2048, num_attention_heads=32, intermediate_size=8192)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = PlugForConditionalGeneration(PlugTransformersConfig(**config.to_dict())).train()
    torch.set_default_dtype(torch.float32)
    model.warns_of_half_precision = False
    recompute_layers(model, 99)
    optimizer = FusedAdafactor([each for each in model.parameters() if each.requires_grad], lr=1e-5)
    optimizer.fuse()
    inputs = {name: value.cuda() for name, value in batch(0).items()}
    weights = torch.cuda.memory_allocated()
    for _ in range(2):
        torch.cuda.reset_peak_memory_stats()
        model(**inputs).loss.backward()
        optimizer.step()
    largest = max(each.numel() for each in model.parameters()) * 2
    # The word table's gradient from each of its four uses, and small activations; all gradients are
    # 3.2 GB.
    assert torch.cuda.max_memory_allocated() - weights < 5 * largest

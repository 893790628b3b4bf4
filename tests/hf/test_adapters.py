"""peft on quantised directories, by the classes for transformers."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import plug
from plug.errors import PlugError, UsageError
from plug.hf.adapters import TARGET_MODULES
from plug.loading.load import load
from plug.loading.save import save
from plug.model.configuration import PRESETS, PlugConfig
from plug.model.plug import Plug
from plug.quantization.convert import quantize_directory
from plug.tokenization import PlugTokenizer

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")

BOTH = pytest.mark.parametrize("bits", [8, 4])
IDS = torch.tensor([[2, 9, 8, 7, 3], [2, 30, 31, 3, 0]])
ALL = [
    (plug.PlugForConditionalGeneration, "SEQ_2_SEQ_LM", {"labels": IDS[:, 1:]}),
    (plug.PlugForSequenceClassification, "SEQ_CLS", {"labels": torch.tensor([1, 0])}),
    (plug.PlugForTokenClassification, "TOKEN_CLS", {"labels": IDS % 2}),
    (
        plug.PlugForQuestionAnswering,
        "QUESTION_ANS",
        {"start_positions": torch.tensor([1, 1]), "end_positions": torch.tensor([2, 1])},
    ),
]


@pytest.fixture
def directory(
    make_model: Callable[[PlugConfig], Plug], tiny_tokenizer: PlugTokenizer, tmp_path: Path
) -> Callable[[int], Path]:
    """`directory(bits)`: a quantised model with dropout."""
    config = dataclasses.replace(PRESETS["test"], hidden_size=128, intermediate_size=256)
    save(make_model(config), tmp_path / "wide", tokenizer=tiny_tokenizer)

    def make(bits: int) -> Path:
        quantize_directory(tmp_path / "wide", tmp_path / f"bits-{bits}", bits=bits)
        return tmp_path / f"bits-{bits}"

    return make


def adapt(model: Any, task: str | None = None, **options: Any) -> Any:
    """The model with adapters that change its outputs."""
    torch.manual_seed(1)
    options = {"r": 2, "target_modules": TARGET_MODULES, "task_type": task} | options
    adapted = peft.get_peft_model(model, peft.LoraConfig(**options))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    return adapted


def loss(model: Any, **inputs: Tensor) -> Tensor:
    torch.manual_seed(2)
    return model(input_ids=IDS, **inputs).loss


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_quantised_directory_loads_as_plug_load_reads_it_and_is_saved_again(
    bits: int, dtype: torch.dtype, directory: Callable[[int], Path], tmp_path: Path
) -> None:
    found = directory(bits)
    expected = load(found, dtype=dtype).state_dict()

    model = plug.PlugForConditionalGeneration.from_pretrained(found, dtype=dtype)
    model.save_pretrained(tmp_path / "again")

    for state in (model.state_dict(), load(tmp_path / "again", dtype=dtype).state_dict()):
        assert state.keys() == expected.keys()
        for name, tensor in state.items():
            assert tensor.dtype == expected[name].dtype
            assert torch.equal(tensor, expected[name])


def test_integers_that_do_not_fit_the_config_are_refused(directory: Callable[[int], Path]) -> None:
    found = directory(8)
    config = json.loads((found / "config.json").read_text())
    config["quantization"] |= {"version": 7}
    (found / "config.json").write_text(json.dumps(config))

    with pytest.raises(UsageError, match="version=7"):
        plug.PlugForConditionalGeneration.from_pretrained(found)
    del config["quantization"]
    (found / "config.json").write_text(json.dumps(config))
    with pytest.raises(PlugError):
        plug.PlugForConditionalGeneration.from_pretrained(found)


@pytest.mark.parametrize(("model_class", "task", "labels"), ALL)
@pytest.mark.parametrize(("bits", "dora"), [(8, False), (4, True)])
def test_peft_trains_saves_and_loads_adapters_of_a_quantised_base(
    bits: int,
    model_class: type[Any],
    task: str,
    labels: dict[str, Tensor],
    dora: bool,
    directory: Callable[[int], Path],
    tmp_path: Path,
) -> None:
    found = directory(bits)
    torch.manual_seed(0)
    model = model_class.from_pretrained(found, dtype=torch.float32)
    head = ["classifier"] if task == "QUESTION_ANS" else None  # peft looks for `qa_outputs` there
    adapted = adapt(model, task, use_dora=dora, lora_dropout=0.1, modules_to_save=head)
    frozen = {
        name: tensor.clone()
        for name, tensor in adapted.state_dict().items()
        if "lora_" not in name and "classifier" not in name
    }
    trained = [each for each in adapted.parameters() if each.requires_grad]

    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    before = loss(adapted, **labels)
    for _ in range(3):
        loss(adapted, **labels).backward()
        assert all(each.grad is not None for each in trained)
        optimizer.step()
        optimizer.zero_grad()

    assert loss(adapted, **labels) < before
    state = adapted.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in frozen.items())
    adapted.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(
        model_class.from_pretrained(found, dtype=torch.float32), tmp_path / "adapter"
    )
    with torch.no_grad():
        assert loss(again.eval(), **labels) == loss(adapted.eval(), **labels)
    with pytest.raises(UsageError, match="plug merge"):
        adapted.merge_and_unload()


@BOTH
def test_gradients_are_those_of_the_dequantised_model(
    bits: int, directory: Callable[[int], Path]
) -> None:
    found = directory(bits)
    quantised = plug.PlugForConditionalGeneration.from_pretrained(found, dtype=torch.float32)
    plain = plug.PlugForConditionalGeneration.from_pretrained(
        found.parent / "wide", dtype=torch.float32
    )
    with torch.no_grad():
        for name, layer in quantised.named_modules():
            if hasattr(layer, "dequantized"):
                plain.get_submodule(name).weight.copy_(layer.dequantized(torch.float32))
    models = [adapt(model, "SEQ_2_SEQ_LM") for model in (quantised, plain)]

    losses = [loss(model, labels=IDS[:, 1:]) for model in models]

    torch.testing.assert_close(losses[0], losses[1])
    for each in losses:
        each.backward()
    expected = dict(models[1].named_parameters())
    for name, parameter in models[0].named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, expected[name].grad)


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable:FutureWarning")
@BOTH
def test_recomputation_changes_nothing_dropout_included(
    bits: int, directory: Callable[[int], Path]
) -> None:
    model = plug.PlugForConditionalGeneration.from_pretrained(directory(bits), dtype=torch.float32)
    adapted = adapt(model, "SEQ_2_SEQ_LM", lora_dropout=0.2).train()

    found = []
    for recomputes in (False, True):
        if recomputes:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        adapted.zero_grad()
        value = loss(adapted, labels=IDS[:, 1:])
        value.backward()
        gradients = [each.grad.clone() for each in adapted.parameters() if each.requires_grad]
        found.append([value.detach(), *gradients])

    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))

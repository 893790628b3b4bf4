"""An adapter in the weights of its model: the same outputs, or a change that is told."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from plug.errors import PlugError, UsageError
from plug.finetuning.merge import merge_directory
from plug.finetuning.predict import Predictor
from plug.finetuning.run import finetune
from plug.finetuning.settings import FinetuneSettings
from plug.loading.adapters import fingerprint
from plug.loading.load import load
from plug.loading.save import save
from plug.model.configuration import PRESETS
from plug.model.plug import Plug
from plug.quantization.convert import quantize_directory
from plug.tokenization import PlugTokenizer

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")


@pytest.fixture
def base(tiny_tokenizer: PlugTokenizer, tmp_path: Path) -> Path:
    torch.manual_seed(0)
    config = replace(PRESETS["test"], hidden_size=128, intermediate_size=256)
    save(Plug(config), tmp_path / "wide", tokenizer=tiny_tokenizer)
    return tmp_path / "wide"


@pytest.fixture
def train(
    settings: Callable[..., FinetuneSettings], data: Callable[..., Path], tmp_path: Path
) -> Callable[..., Path]:
    """`train(task, base, **changes)`: the directory of an adapter that moves outputs."""

    def run(task: str, base: Path, **changes: Any) -> Path:
        options = {"memory": "lora", "lora_alpha": 64.0, "model": str(base)} | changes
        run = settings(task, data(task), output=str(tmp_path / "adapter"), **options)
        return finetune(run, device="cpu").directory

    return run


@pytest.mark.parametrize("dora", [False, True])
def test_floats_are_merged_exactly(
    dora: bool, base: Path, train: Callable[..., Path], tmp_path: Path
) -> None:
    adapter = train("generation", base, dora=dora)

    change = merge_directory(base, adapter, tmp_path / "merged")

    assert change is not None
    assert change.largest < 1e-5
    assert change.same_choice == 1
    expected = load(base, adapter=adapter).state_dict()
    for name, tensor in load(tmp_path / "merged").state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    save(load(base), tmp_path / "half", tokenizer=None, dtype=torch.bfloat16)
    half = load_file(tmp_path / "half" / "model.safetensors")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "half" / name).write_bytes((base / name).read_bytes())
    merge_directory(tmp_path / "half", adapter, tmp_path / "merged-half", compares=False)
    merged = load_file(tmp_path / "merged-half" / "model.safetensors")
    assert {name: tensor.dtype for name, tensor in merged.items()} == {
        name: tensor.dtype for name, tensor in half.items()
    }


@pytest.mark.parametrize(("task", "of", "bits"), [
    ("generation", None, 8), ("generation", 4, 4), ("generation", 4, None),
    ("classification", None, None), ("classification", 8, 4), ("reading", None, None),
    ("labelling", 8, 8),
])  # fmt: skip
def test_what_is_merged_predicts_as_the_adapter_beside_its_model(
    task: str,
    of: int | None,
    bits: int | None,
    base: Path,
    train: Callable[..., Path],
    data: Callable[..., Path],
    tmp_path: Path,
) -> None:
    if of is not None:
        quantize_directory(base, tmp_path / "small", bits=of)
        base = tmp_path / "small"
    adapter = train(task, base, memory="lora" if of is None else "qlora")

    change = merge_directory(base, adapter, tmp_path / "merged", bits=bits)

    assert change is not None
    if bits is None:
        assert change.largest < 1e-5
    else:
        assert 1e-5 < change.largest < 0.5
    beside, merged = Predictor(None, "cpu", adapter=adapter), Predictor(tmp_path / "merged", "cpu")
    examples = merged.read(data(task))
    if bits is None and of is None:
        assert [
            {k: v for k, v in merged.kind.record(e, p).items() if not isinstance(v, float)}
            for e, p in zip(examples, merged(examples), strict=True)
        ] == [
            {k: v for k, v in beside.kind.record(e, p).items() if not isinstance(v, float)}
            for e, p in zip(examples, beside(examples), strict=True)
        ]
    model = merged.kind.load_model(tmp_path / "merged")  # by the classes for transformers
    assert (model.scheme is None) == (bits is None)
    if task != "generation":
        assert not (tmp_path / "merged" / "generation_config.json").exists()


def test_what_cannot_be_merged_is_refused_and_leaves_nothing(
    base: Path, train: Callable[..., Path], base_model: Path, tmp_path: Path
) -> None:
    adapter = train("classification", base)

    with pytest.raises(UsageError, match="不是在"):
        merge_directory(base_model, adapter, tmp_path / "merged")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").touch()
    with pytest.raises(UsageError, match="used"):
        merge_directory(base, adapter, tmp_path / "used")
    tensors = load_file(adapter / "adapter_model.safetensors")
    name = next(name for name in tensors if "fc1.lora_A" in name)
    save_file(
        tensors | {name: tensors[name][:, :100].contiguous()}, adapter / "adapter_model.safetensors"
    )
    with pytest.raises(PlugError, match=r"fc1.weight 是 \[256, 100\]"):
        merge_directory(base, adapter, tmp_path / "merged")
    (adapter / "finetuning.json").unlink()
    with pytest.raises(UsageError, match=r"没有 finetuning\.json"):
        merge_directory(base, adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_damaged_model_is_refused_in_its_own_name(
    base: Path, train: Callable[..., Path], tmp_path: Path
) -> None:
    """Rounded to integers, NaN would become numbers; floats in their place would count as such."""
    adapter = train("generation", base, epochs=1.0)
    layer = "encoder.layers.0.feed_forward.fc1"
    for bits in (None, 8, 4):
        damaged = tmp_path / f"damaged-{bits}"
        save(load(base), damaged, tokenizer=PlugTokenizer.load(base))
        if bits is not None:
            damaged = tmp_path / f"integers-{bits}"
            quantize_directory(base, damaged, bits=bits)
        weights = damaged / "model.safetensors"
        tensors = load_file(weights)
        part = f"{layer}.weight" if bits is None else f"{layer}.scale"
        cases = {
            f"{damaged.name} 里有 NaN 或无穷大：{part}": {part: tensors[part] * torch.nan},
            f"{layer}.weight 是 torch": {
                f"{layer}.weight": tensors[f"{layer}.weight"].to(
                    torch.int8 if bits is None else torch.float32
                )
            },
        }
        for complaint, changes in cases.items():
            save_file(tensors | changes, weights)
            for wanted in (8, 4, None):
                with pytest.raises(PlugError, match=complaint):
                    merge_directory(damaged, adapter, tmp_path / "merged", bits=wanted)


def test_an_adapter_of_the_model_is_none_of_the_merged_one(
    base: Path, train: Callable[..., Path], tmp_path: Path
) -> None:
    """The two have the same biases and norms, and the adapter would be in the weights twice."""
    adapter = train("generation", base, epochs=1.0)
    merge_directory(base, adapter, tmp_path / "merged", compares=False)
    quantize_directory(tmp_path / "merged", tmp_path / "small", bits=8)

    for other in ("merged", "small"):
        with pytest.raises(UsageError, match=f"不是在 .*{other} 上训练的"):
            load(tmp_path / other, adapter=adapter)
    assert fingerprint(tmp_path / "merged") == fingerprint(tmp_path / "small")


@pytest.mark.parametrize("task", ["classification", "generation"])
def test_labels_that_do_not_fit_the_head_are_refused(
    task: str, base: Path, train: Callable[..., Path], tmp_path: Path
) -> None:
    """When it is merged and when it is loaded; the head has 3 rows, or there is none."""
    adapter = train(task, base, epochs=1.0)
    file = adapter / "finetuning.json"
    run = json.loads(file.read_text(encoding="utf-8"))
    cases: list[tuple[str, list[str], str]] = [("classification", ["好", "坏"], "行，而.* 要 2 行")]
    if task == "classification":
        cases += [
            ("classification", ["好"], r"有 3 行，而它的 finetuning\.json 要 1 行"),
            ("classification", ["好", "坏", "中", "差"], "有 3 行，而.* 要 4 行"),
            ("classification", ["好", "坏", "好"], "labels 有重复"),
            ("classification", [], "labels 有重复，或与任务"),
            ("reading", [], "有 3 行，而.* 要 2 行"),
            ("generation", [], "有 3 行，而.* 要 0 行"),
        ]
        with pytest.raises(PlugError, match=r"输出层.*不能写作"):
            load(base, adapter=adapter)
    for named, labels, says in cases:
        run["settings"]["task"] = named
        file.write_text(json.dumps(run | {"labels": labels, "label_names": {}}), encoding="utf-8")
        with pytest.raises(PlugError, match=says):
            merge_directory(base, adapter, tmp_path / "merged")
        assert not (tmp_path / "merged").exists()
        with pytest.raises(PlugError, match="不能写作" if named == "generation" else says):
            Predictor(None, "cpu", adapter=adapter)

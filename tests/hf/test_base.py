"""What all classes share: directories, inputs, recomputation, adapters; against `Plug`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import plug
from plug.distributed.fully_sharded import shard
from plug.distributed.settings import ParallelSettings
from plug.errors import PlugError, UsageError
from plug.loading.save import save
from plug.model.configuration import PlugConfig
from plug.model.plug import Plug
from plug.tokenization import PlugTokenizer

transformers = pytest.importorskip("transformers")

from transformers import (  # noqa: E402
    Trainer,
    TrainingArguments,
)

from plug import (  # noqa: E402
    PlugForConditionalGeneration,
    PlugForMaskedLM,
    PlugForPreTraining,
    PlugForQuestionAnswering,
    PlugForSequenceClassification,
    PlugForTokenClassification,
    PlugModel,
    PlugTransformersConfig,
)

BATCH, SOURCE = 3, 7  # as in conftest.py
WHOLE = [PlugForPreTraining, PlugForConditionalGeneration, PlugModel]


@pytest.mark.parametrize("model_class", WHOLE)
def test_a_directory_of_plug_loads_here_bit_for_bit(
    model_class: type[Any],
    directory: Path,
    plug_model: Plug,
    assert_same_weights: Callable[..., None],
) -> None:
    model, info = model_class.from_pretrained(directory, output_loading_info=True)

    assert_same_weights(model, plug_model)
    assert not any(info.values())
    assert not model.training


@pytest.mark.parametrize("model_class", WHOLE)
def test_a_directory_saved_here_loads_in_plug_bit_for_bit(
    model_class: type[Any],
    directory: Path,
    plug_model: Plug,
    tmp_path: Path,
    assert_same_weights: Callable[..., None],
) -> None:
    model = model_class.from_pretrained(directory)

    model.save_pretrained(tmp_path / "again", max_shard_size="50KB")

    assert len(list((tmp_path / "again").glob("*.safetensors"))) > 1
    loaded = plug.load(tmp_path / "again")
    assert_same_weights(loaded, plug_model)
    assert loaded.config == plug_model.config


def test_saving_again_keeps_the_saved_type(
    plug_model: Plug, tmp_path: Path, assert_same_weights: Callable[..., None]
) -> None:
    save(plug_model, tmp_path / "half", tokenizer=None, dtype=torch.bfloat16)

    model = PlugForPreTraining.from_pretrained(tmp_path / "half")
    model.save_pretrained(tmp_path / "again")

    assert model.dtype == torch.bfloat16
    assert json.loads((tmp_path / "again/config.json").read_text())["dtype"] == "bfloat16"
    assert_same_weights(plug.load(tmp_path / "again"), plug.load(tmp_path / "half"))


@pytest.mark.parametrize("model_class", WHOLE)
def test_one_seed_gives_both_faces_the_same_new_weights(
    model_class: type[Any], config: PlugConfig, assert_same_weights: Callable[..., None]
) -> None:
    torch.manual_seed(3)
    expected = Plug(config)
    torch.manual_seed(3)

    assert_same_weights(model_class(PlugTransformersConfig(**config.to_dict())), expected)


def test_a_decoder_that_was_not_saved_starts_as_plug_starts_one(
    config: PlugConfig,
    make_model: Callable[[PlugConfig], Plug],
    tmp_path: Path,
    assert_same_weights: Callable[..., None],
) -> None:
    encoder_alone = make_model(dataclasses.replace(config, num_decoder_layers=0))
    save(encoder_alone, tmp_path / "stage1", tokenizer=None)

    model, info = PlugForConditionalGeneration.from_pretrained(
        tmp_path / "stage1", num_decoder_layers=2, output_loading_info=True
    )

    assert_same_weights(model.encoder, encoder_alone.encoder)
    assert info["missing_keys"] == {f"decoder.{name}" for name in model.decoder.state_dict()}
    assert not info["unexpected_keys"]
    for name, tensor in model.decoder.state_dict().items():
        if "norm" in name or name.endswith("bias"):
            assert tensor.eq(1.0 if name.endswith("weight") else 0.0).all(), name
        else:  # residual outputs by 1 / sqrt(2 * 2 layers)
            scale = 0.5 if name.endswith(("out_proj.weight", "fc2.weight")) else 1.0
            expected = scale * config.initializer_range
            assert tensor.std().item() == pytest.approx(expected, rel=0.1), name


def test_an_encoder_alone_is_refused_where_it_would_have_to_decode(config: PlugConfig) -> None:
    alone = PlugTransformersConfig(**config.to_dict() | {"num_decoder_layers": 0})
    with pytest.raises(UsageError, match="num_decoder_layers=0"):
        PlugForConditionalGeneration(alone)

    model = PlugForPreTraining(alone).eval()
    input_ids = torch.randint(5, 320, (BATCH, SOURCE))
    assert model(input_ids).logits is None
    with pytest.raises(UsageError, match="num_decoder_layers=0"):
        model(input_ids, labels=input_ids)


def test_the_tied_table_can_be_replaced_but_not_resized(directory: Path) -> None:
    model = PlugForConditionalGeneration.from_pretrained(directory)
    table = torch.nn.Embedding(320, 32)

    model.set_input_embeddings(table)

    hidden = torch.randn(4, 32)
    torch.testing.assert_close(model.lm_logits(hidden), hidden @ table.weight.T)
    with pytest.raises(UsageError, match="320"):
        model.resize_token_embeddings(321)


@torch.inference_mode()
def test_half_precision_loads_and_stays_near(
    directory: Path, plug_model: Plug, batch: dict[str, Tensor], source: dict[str, Tensor]
) -> None:
    model = PlugForPreTraining.from_pretrained(directory, dtype=torch.bfloat16)
    output = model(**batch)

    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert output.loss.dtype == torch.float32
    expected = plug_model.encode(**source)
    difference = (output.encoder_last_hidden_state.float() - expected).abs().mean()
    assert difference < 0.05  # values are of unit size, bfloat16 keeps 8 bits


def enable_checkpointing(model: Any) -> None:
    """The method's newer name where transformers has it (the older one warns there)."""
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable()
    else:
        model.gradient_checkpointing_enable()


def test_gradient_checkpointing_gives_the_same_loss_and_gradients(
    directory: Path, batch: dict[str, Tensor]
) -> None:
    def run(model: Any) -> tuple[Tensor, dict[str, Tensor], int]:
        calls: list[int] = []
        for module in model.modules():
            if type(module).__name__ == "FeedForward":
                module.register_forward_hook(lambda *_: calls.append(1))
        torch.manual_seed(2)  # dropout is on, and recomputation has to repeat it
        loss = model(**batch).loss
        loss.backward()
        gradients = {name: one.grad for name, one in model.named_parameters()}
        return loss.detach(), gradients, len(calls)

    plain = PlugForPreTraining.from_pretrained(directory).train()
    recomputed = PlugForPreTraining.from_pretrained(directory).train()
    enable_checkpointing(recomputed)

    expected_loss, expected, plain_calls = run(plain)
    loss, gradients, calls = run(recomputed)

    assert (plain_calls, calls) == (5, 10)  # 3 + 2 layers, each run again
    assert torch.equal(loss, expected_loss)
    assert all(gradient is not None for gradient in expected.values())
    torch.testing.assert_close(gradients, expected)


def test_gradient_accumulation_weighs_every_label_alike(
    directory: Path, tmp_path: Path, train: Callable[..., Any]
) -> None:
    def losses(micro_batch: int, accumulation: int) -> list[float]:
        model = PlugForConditionalGeneration.from_pretrained(
            directory, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
        )
        trainer = train(
            model,
            tmp_path / f"run-{accumulation}",
            per_device_train_batch_size=micro_batch,
            gradient_accumulation_steps=accumulation,
        )
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    whole, in_pieces = losses(4, 1), losses(2, 2)

    assert len(whole) == 3
    assert in_pieces == pytest.approx(whole, rel=1e-3)


ALL = [
    (PlugForConditionalGeneration, "SEQ_2_SEQ_LM", {"labels": torch.tensor([[10, 3], [4, -100]])}),
    (PlugForPreTraining, None, {"labels": torch.tensor([[10, 3], [4, -100]])}),
    (PlugForMaskedLM, None, {"labels": torch.tensor([[9] * 6, [-100] * 6])}),
    (PlugForSequenceClassification, "SEQ_CLS", {"labels": torch.tensor([1, 0])}),
    (PlugForTokenClassification, "TOKEN_CLS", {"labels": torch.ones(2, 6).long()}),
    (
        PlugForQuestionAnswering,
        "QUESTION_ANS",
        {"start_positions": torch.tensor([1, 0]), "end_positions": torch.tensor([2, 2])},
    ),
]
IDS = torch.randint(5, 311, (2, 6), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("model_class", "_task", "labels"), ALL)
def test_the_trainer_evaluates_every_class(
    model_class: type[Any], _task: str, labels: dict[str, Tensor], directory: Path, tmp_path: Path
) -> None:
    model = model_class.from_pretrained(directory)
    rows = [
        {"input_ids": IDS[row], **{key: value[row] for key, value in labels.items()}}
        for row in range(2)
    ]
    arguments = TrainingArguments(
        str(tmp_path / "run"), report_to=[], use_cpu=True, disable_tqdm=True,
        dataloader_pin_memory=False, label_names=list(labels),
    )  # fmt: skip

    loss = Trainer(model, arguments, eval_dataset=rows).evaluate()["eval_loss"]

    with torch.inference_mode():
        assert loss == pytest.approx(model(IDS, **labels).loss.item(), rel=1e-4)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # of peft
@pytest.mark.parametrize(("model_class", "task", "labels"), [each for each in ALL if each[1]])
def test_peft_adapts_and_merges_for_every_task(
    model_class: type[Any], task: str, labels: dict[str, Tensor], directory: Path
) -> None:
    peft = pytest.importorskip("peft")
    model = model_class.from_pretrained(directory, dtype=torch.float32)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type=task)
    adapted = peft.get_peft_model(model, config)

    adapted(input_ids=IDS, **labels).loss.backward()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    adapted.eval()
    with torch.inference_mode():
        before = adapted(input_ids=IDS, **labels).loss
        after = adapted.merge_and_unload()(input_ids=IDS, **labels).loss

    torch.testing.assert_close(before, after)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # of peft
def test_a_tuned_prefix_is_in_what_generate_writes(directory: Path) -> None:
    peft = pytest.importorskip("peft")
    model = PlugForConditionalGeneration.from_pretrained(directory, dtype=torch.float32)
    config = peft.PrefixTuningConfig(
        task_type="SEQ_2_SEQ_LM", num_virtual_tokens=3, num_layers=model.config.num_decoder_layers
    )
    adapted = peft.get_peft_model(model, config).eval()
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    inputs = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}

    written = adapted.generate(
        **inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False,
        output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip

    with torch.inference_mode():
        expected = adapted(**inputs, decoder_input_ids=written.sequences[:, :-1]).logits
    logits = torch.stack(written.logits, 1)  # up to 40
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # of peft
@pytest.mark.parametrize("how", ["lora", "copied"])
def test_an_adapter_of_the_word_table_moves_inputs_and_outputs_as_merging_does(
    how: str, directory: Path, tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft")
    model = PlugForConditionalGeneration.from_pretrained(directory)
    assert model.get_output_embeddings() is model.get_input_embeddings()
    words: dict[str, Any] = {"target_modules": ["word_embeddings"], "init_lora_weights": False}
    if how == "copied":
        words = {"target_modules": ["q_proj"], "modules_to_save": ["word_embeddings"]}
    inputs = {"input_ids": IDS, "decoder_input_ids": IDS[:, :4]}
    with torch.inference_mode():
        first = model(**inputs).logits
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, **words))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "modules_to_save" in name:
                parameter += 0.1 * torch.randn_like(parameter)

    with torch.inference_mode():
        before = adapted(**inputs).logits
        merged = adapted.merge_and_unload()
        after = merged(**inputs).logits

    assert (before - first).abs().max() > 0.1
    torch.testing.assert_close(after, before, atol=1e-4, rtol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    loaded = plug.load(tmp_path / "merged").embeddings.word_embeddings.weight
    assert torch.equal(loaded, merged.embeddings.word_embeddings.weight)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # of peft
def test_a_model_with_adapters_in_it_is_neither_saved_nor_half_loaded(
    directory: Path, tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft")
    from safetensors.torch import save_file

    model = PlugForConditionalGeneration.from_pretrained(directory)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    adapted = peft.get_peft_model(model, config)

    with pytest.raises(UsageError, match="merge_and_unload"):
        model.save_pretrained(tmp_path / "inner")
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    with pytest.raises(PlugError, match="merge_and_unload"):
        PlugForConditionalGeneration.from_pretrained(directory)

    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    plug.load(tmp_path / "merged")


def test_the_shipped_model_is_found_by_its_name(
    plug_model: Plug, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, byte_pieces: PlugTokenizer
) -> None:
    from plug.hf import PlugTokenizerFast

    save(plug_model, tmp_path / "plug-mini-zh", tokenizer=byte_pieces)
    monkeypatch.setattr("plug.checkpoints.directory.SHIPPED_DIRECTORY", tmp_path / "plug-mini-zh")

    assert PlugTransformersConfig.from_pretrained("plug-mini-zh").hidden_size == 32
    assert PlugTokenizerFast.from_pretrained("plug-mini-zh").mask_token_id == 4
    for model_class, *_ in ALL:
        assert model_class.from_pretrained("plug-mini-zh").config.hidden_size == 32


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"input_ids": torch.tensor([[5, 400]])}, "5…400"),
        ({"input_ids": torch.tensor([[5, -1]])}, "-1…5"),
        ({"input_ids": torch.tensor([5, 6])}, r"\(2,\)"),
        ({"input_ids": torch.zeros(2, 0, dtype=torch.long)}, r"\(2, 0\)"),
        ({"input_ids": torch.zeros(0, 2, dtype=torch.long)}, r"\(0, 2\)"),
        ({"input_ids": torch.ones(1, 97, dtype=torch.long)}, "97 个词元，模型最多读 96 个"),
        ({"input_ids": torch.ones(1, 2)}, "float32"),
        ({"input_ids": IDS, "attention_mask": torch.ones(2, 5)}, r"\(2, 5\)"),
        ({"input_ids": IDS, "token_type_ids": torch.full((2, 6), 3)}, "token_type_ids"),
        ({"input_ids": IDS, "token_type_ids": torch.zeros(2, 5).long()}, r"\(2, 5\)"),
        ({"inputs_embeds": torch.ones(2, 6, 31)}, r"\(2, 6, 31\)"),
        ({}, "input_ids"),
    ],
)
def test_inputs_that_make_no_sense_are_named(
    inputs: dict[str, Tensor], message: str, config: PlugConfig
) -> None:
    model = PlugForMaskedLM(PlugTransformersConfig(**config.to_dict())).eval()

    with pytest.raises(UsageError, match=message):
        model(**inputs)


@pytest.mark.parametrize(("model_class", "_task", "labels"), ALL[:3])
def test_every_class_compiles_whole(
    model_class: type[Any], _task: str, labels: dict[str, Tensor], config: PlugConfig
) -> None:
    model = model_class(PlugTransformersConfig(**config.to_dict()))

    for mode in (model.train(), model.eval()):
        torch.compile(mode, fullgraph=True, backend="eager")(IDS, **labels).loss.backward()


def test_training_half_precision_weights_is_said_once(
    directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for dtype, times in ((torch.float32, 0), (torch.bfloat16, 1)):
        caplog.clear()
        model = PlugForMaskedLM.from_pretrained(directory, dtype=dtype)
        model(IDS)  # not in training
        for _ in range(2):
            model.train()(IDS)

        told = [record for record in caplog.records if "torch.float32" in record.getMessage()]
        assert len(told) == times


def test_training_copies_in_half_precision_of_sharded_weights_is_not_said(
    directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mixed = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
        ours, others = (
            PlugForMaskedLM.from_pretrained(directory, dtype=torch.float32) for _ in range(2)
        )
        mesh = init_device_mesh("cpu", (1,))
        shard(ours, mesh, ParallelSettings(), torch.bfloat16)
        fully_shard(others, mesh=mesh, mp_policy=mixed)
        for model in (ours, others):
            assert model.train()(IDS).logits.dtype == torch.bfloat16
    finally:
        dist.destroy_process_group()

    assert "torch.float32" not in caplog.text


@torch.inference_mode()
def test_threads_that_look_inside_see_their_own_pass(directory: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    model = PlugForMaskedLM.from_pretrained(directory)

    def look(row: int) -> Tensor:
        with torch.inference_mode():
            return torch.stack(model(IDS[row : row + 1], output_hidden_states=True).hidden_states)

    expected = [look(0), look(1)]
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(look, [0, 1] * 20))

    for index, each in enumerate(found):
        assert torch.equal(each, expected[index % 2])

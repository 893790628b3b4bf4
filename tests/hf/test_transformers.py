"""The transformers face against `Plug`, on tiny random models with unlike sizes."""

from __future__ import annotations

import dataclasses
import importlib
import json
import re
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import plug
from plug.errors import PlugError, UsageError
from plug.loading.save import save
from plug.model.configuration import PRESETS, PlugConfig
from plug.model.plug import Plug
from plug.tokenization import BYTE_TOKENS, PlugTokenizer

transformers = pytest.importorskip("transformers")

from transformers import (  # noqa: E402
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForPreTraining,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    Trainer,
    TrainingArguments,
)

from plug import (  # noqa: E402
    PlugForConditionalGeneration,
    PlugForMaskedLM,
    PlugForPreTraining,
    PlugForSequenceClassification,
    PlugForTokenClassification,
    PlugModel,
    PlugTransformersConfig,
)

BATCH, SOURCE, TARGET, EMITTED = 3, 7, 5, 311
CLASSIFIERS = [PlugForSequenceClassification, PlugForTokenClassification]
WHOLE = [PlugForPreTraining, PlugForConditionalGeneration, PlugModel]


@pytest.fixture
def plug_model(config: PlugConfig, make_model: Callable[[PlugConfig], Plug]) -> Plug:
    """A model that writes lively text, and would write padding rows of its word table if let."""
    model = make_model(dataclasses.replace(config, num_emitted_tokens=EMITTED))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and name.startswith(("decoder", "embeddings.word")):
                parameter *= 3
        model.embeddings.word_embeddings.weight[EMITTED:] *= 4
    return model


@pytest.fixture
def directory(plug_model: Plug, tmp_path: Path) -> Path:
    save(plug_model, tmp_path / "model", tokenizer=None)
    return tmp_path / "model"


@pytest.fixture
def batch() -> dict[str, Tensor]:
    torch.manual_seed(1)
    mask = torch.ones(BATCH, SOURCE, dtype=torch.long)
    mask[1, 4:] = 0
    mask[2, 2:] = 0
    labels = torch.randint(5, EMITTED, (BATCH, TARGET))
    labels[1, 3:] = -100
    mlm_labels = torch.full((BATCH, SOURCE), -100)
    mlm_labels[:, 1] = torch.tensor([9, 8, 7])
    word_labels = torch.full((BATCH, SOURCE), -100)
    word_labels[0, 3:6] = torch.tensor([6, 5, 4])
    return {
        "input_ids": torch.randint(5, EMITTED, (BATCH, SOURCE)) * mask,
        "attention_mask": mask,
        "token_type_ids": torch.arange(SOURCE).ge(3).long().expand(BATCH, -1),
        "labels": labels,
        "mlm_labels": mlm_labels,
        "word_labels": word_labels,
        "sentence_labels": torch.tensor([2, 0, 1]),
    }


def source_of(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: batch[key] for key in ("input_ids", "attention_mask", "token_type_ids")}


def mean_nats(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy by hand, one position after another."""
    nats = [
        -row.double().log_softmax(-1)[label]
        for row, label in zip(logits.flatten(0, -2), labels.flatten().tolist(), strict=True)
        if label != -100
    ]
    return torch.stack(nats).mean().float()


def assert_same_weights(model: torch.nn.Module, other: torch.nn.Module) -> None:
    mine, theirs = model.state_dict(), other.state_dict()
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        assert torch.equal(tensor, theirs[name]), name


# --- configuration ---------------------------------------------------------------------------


@pytest.mark.parametrize("preset", PRESETS)
def test_the_config_has_the_keys_and_values_of_plug_config(preset: str) -> None:
    shape = PRESETS[preset]

    config = PlugTransformersConfig(**shape.to_dict())

    assert config.to_plug_config() == shape
    assert PlugTransformersConfig.from_dict(config.to_dict()).to_plug_config() == shape
    assert config.is_encoder_decoder
    assert config.tie_word_embeddings
    assert PlugTransformersConfig().to_plug_config() == PlugConfig()


@pytest.mark.parametrize("bad", [{"hiden_size": 32}, {"hidden_size": 33}, {"vocab_size": "many"}])
def test_a_bad_key_or_value_is_refused(bad: dict[str, Any], directory: Path) -> None:
    with pytest.raises(UsageError, match=next(iter(bad))):
        PlugTransformersConfig(**PRESETS["test"].to_dict() | bad)

    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | bad))
    with pytest.raises(UsageError, match=next(iter(bad))):
        AutoConfig.from_pretrained(directory)


def test_a_value_changed_after_construction_is_checked_when_the_model_is_built() -> None:
    config = PlugTransformersConfig(**PRESETS["test"].to_dict())
    config.hidden_size = 33

    with pytest.raises(UsageError, match="hidden_size=33"):
        PlugForPreTraining(config)


# --- weights and directories -----------------------------------------------------------------


@pytest.mark.parametrize("model_class", WHOLE)
def test_a_directory_of_plug_loads_here_bit_for_bit(
    model_class: type[Any], directory: Path, plug_model: Plug
) -> None:
    model, info = model_class.from_pretrained(directory, output_loading_info=True)

    assert_same_weights(model, plug_model)
    assert not any(info.values())
    assert not model.training


@pytest.mark.parametrize("model_class", WHOLE)
def test_a_directory_saved_here_loads_in_plug_bit_for_bit(
    model_class: type[Any], directory: Path, plug_model: Plug, tmp_path: Path
) -> None:
    model = model_class.from_pretrained(directory)

    model.save_pretrained(tmp_path / "again", max_shard_size="50KB")

    assert len(list((tmp_path / "again").glob("*.safetensors"))) > 1
    loaded = plug.load(tmp_path / "again")
    assert_same_weights(loaded, plug_model)
    assert loaded.config == plug_model.config


def test_saving_again_keeps_the_saved_type(plug_model: Plug, tmp_path: Path) -> None:
    save(plug_model, tmp_path / "half", tokenizer=None, dtype=torch.bfloat16)

    model = PlugForPreTraining.from_pretrained(tmp_path / "half")
    model.save_pretrained(tmp_path / "again")

    assert model.dtype == torch.bfloat16
    assert json.loads((tmp_path / "again/config.json").read_text())["dtype"] == "bfloat16"
    assert_same_weights(plug.load(tmp_path / "again"), plug.load(tmp_path / "half"))


@pytest.mark.parametrize("model_class", WHOLE)
def test_one_seed_gives_both_faces_the_same_new_weights(
    model_class: type[Any], config: PlugConfig
) -> None:
    torch.manual_seed(3)
    expected = Plug(config)
    torch.manual_seed(3)

    assert_same_weights(model_class(PlugTransformersConfig(**config.to_dict())), expected)


def test_a_decoder_that_was_not_saved_starts_as_plug_starts_one(
    config: PlugConfig, make_model: Callable[[PlugConfig], Plug], tmp_path: Path
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


@pytest.mark.parametrize(
    ("auto_class", "model_class"),
    [
        (AutoModel, PlugModel),
        (AutoModelForPreTraining, PlugForPreTraining),
        (AutoModelForSeq2SeqLM, PlugForConditionalGeneration),
        (AutoModelForMaskedLM, PlugForMaskedLM),
        (AutoModelForSequenceClassification, PlugForSequenceClassification),
        (AutoModelForTokenClassification, PlugForTokenClassification),
    ],
)
def test_auto_classes_find_ours(
    auto_class: type[Any], model_class: type[Any], directory: Path, plug_model: Plug
) -> None:
    model = auto_class.from_pretrained(directory)

    assert type(model) is model_class
    assert_same_weights(model.encoder, plug_model.encoder)
    assert model.get_input_embeddings() is model.embeddings.word_embeddings


def test_the_tied_table_can_be_replaced_but_not_resized(directory: Path) -> None:
    model = PlugForConditionalGeneration.from_pretrained(directory)
    table = torch.nn.Embedding(320, 32)

    model.set_input_embeddings(table)

    hidden = torch.randn(4, 32)
    torch.testing.assert_close(model.lm_logits(hidden), hidden @ table.weight.T)
    with pytest.raises(UsageError, match="320"):
        model.resize_token_embeddings(321)


def test_without_transformers_the_message_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, "plug.hf")

    with pytest.raises(PlugError, match=r"plug-zh\[train\]"):
        importlib.import_module("plug").PlugForPreTraining  # noqa: B018


# --- text --------------------------------------------------------------------------------------

PIECES = "[PAD] [UNK] [CLS] [SEP] [MASK] [ ] 春 天 来 了 吗 ？ s ##e ##p"


def word_pieces(folder: Path) -> PlugTokenizer:
    (folder / "vocab.txt").write_text(PIECES.replace(" ", "\n"), encoding="utf-8")
    return PlugTokenizer.from_vocabulary_file(folder / "vocab.txt")


def byte_pieces(folder: Path) -> PlugTokenizer:  # noqa: ARG001
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *BYTE_TOKENS]
    pieces = [*special, "春", "天", "来", "春天"]
    return PlugTokenizer.from_pieces({piece: i for i, piece in enumerate(pieces)}, [("春", "天")])


@pytest.mark.parametrize("make", [word_pieces, byte_pieces])
@pytest.mark.parametrize("text", ["春天来了", "春[SEP]天", ""])
def test_auto_tokenizer_gives_the_ids_of_ours_between_cls_and_sep(
    make: Callable[[Path], PlugTokenizer], text: str, plug_model: Plug, tmp_path: Path
) -> None:
    tokenizer = make(tmp_path)
    save(plug_model, tmp_path / "model", tokenizer=tokenizer)

    theirs = AutoTokenizer.from_pretrained(tmp_path / "model")
    encoded = theirs(text, "来")

    first, second = tokenizer.encode(text), tokenizer.encode("来")
    cls, sep = tokenizer.cls_token_id, tokenizer.sep_token_id
    assert encoded["input_ids"] == [cls, *first, sep, *second, sep]
    assert encoded["token_type_ids"] == [0] * (len(first) + 2) + [1] * (len(second) + 1)
    assert theirs(text)["input_ids"] == [cls, *first, sep]
    assert theirs.pad_token_id == tokenizer.pad_token_id
    assert theirs.mask_token_id == tokenizer.mask_token_id
    theirs.save_pretrained(tmp_path / "again")
    assert PlugTokenizer.load(tmp_path / "again").encode(text) == first
    assert AutoTokenizer.from_pretrained(tmp_path / "again")(text)["input_ids"] == [
        cls,
        *first,
        sep,
    ]


# --- the numbers of both faces ---------------------------------------------------------------


@torch.inference_mode()
def test_pretraining_outputs_are_those_of_plug(
    directory: Path, plug_model: Plug, batch: dict[str, Tensor]
) -> None:
    output = PlugForPreTraining.from_pretrained(directory)(**batch)

    start, pad = plug_model.config.decoder_start_token_id, plug_model.config.pad_token_id
    shifted = [[start, *row[:-1]] for row in batch["labels"].tolist()]
    decoder_ids = torch.tensor([[pad if i == -100 else i for i in row] for row in shifted])
    encoded = plug_model.encode(**source_of(batch))
    decoded = plug_model.decode(decoder_ids, encoded, batch["attention_mask"])
    assert list(output) == [
        "loss",
        "losses",
        "logits",
        "mlm_logits",
        "sentence_logits",
        "encoder_last_hidden_state",
    ]
    assert torch.equal(output.encoder_last_hidden_state, encoded)
    assert torch.equal(output.logits, plug_model.lm_logits(decoded))
    assert torch.equal(output.mlm_logits, plug_model.mlm_logits(encoded))
    assert torch.equal(output.sentence_logits, plug_model.sentence_logits(encoded))
    assert output.logits.shape == (BATCH, TARGET, 320)
    assert output.mlm_logits.shape == (BATCH, SOURCE, 320)
    assert output.sentence_logits.shape == (BATCH, 3)


@torch.inference_mode()
def test_pretraining_losses_are_means_by_name_and_their_sum(
    directory: Path, batch: dict[str, Tensor]
) -> None:
    model = PlugForPreTraining.from_pretrained(directory)
    output = model(**batch)

    expected = {
        "lm": mean_nats(output.logits, batch["labels"]),
        "mlm": mean_nats(output.mlm_logits, batch["mlm_labels"]),
        "word": mean_nats(output.mlm_logits, batch["word_labels"]),
        "sentence": mean_nats(output.sentence_logits, batch["sentence_labels"]),
    }
    torch.testing.assert_close(output.losses, expected)
    torch.testing.assert_close(output.loss, torch.stack(list(expected.values())).sum())

    without = model(**source_of(batch), sentence_labels=batch["sentence_labels"])
    assert without.losses.keys() == {"sentence"}
    assert without.logits is None
    none = model(**source_of(batch), mlm_labels=torch.full((BATCH, SOURCE), -100))
    assert none.loss == 0  # a batch in which nothing was masked
    assert model(**source_of(batch)).loss is None


@torch.inference_mode()
def test_conditional_generation_and_the_bare_model_give_the_numbers_of_plug(
    directory: Path, plug_model: Plug, batch: dict[str, Tensor]
) -> None:
    decoder_ids = torch.randint(5, EMITTED, (BATCH, TARGET))
    encoded = plug_model.encode(**source_of(batch))
    decoded = plug_model.decode(decoder_ids, encoded, batch["attention_mask"])

    model = PlugForConditionalGeneration.from_pretrained(directory)
    output = model(**source_of(batch), decoder_input_ids=decoder_ids, labels=batch["labels"])
    bare = PlugModel.from_pretrained(directory)
    states = bare(**source_of(batch), decoder_input_ids=decoder_ids)

    assert torch.equal(output.logits, plug_model.lm_logits(decoded))
    assert torch.equal(output.encoder_last_hidden_state, encoded)
    torch.testing.assert_close(output.loss, mean_nats(output.logits, batch["labels"]))
    summed = model(
        **source_of(batch),
        decoder_input_ids=decoder_ids,
        labels=batch["labels"],
        num_items_in_batch=torch.tensor(26),
    )
    torch.testing.assert_close(summed.loss, output.loss * 13 / 26)  # 13 labels are not -100
    assert torch.equal(states.last_hidden_state, decoded)
    assert bare(**source_of(batch)).last_hidden_state is None
    as_tuple = bare(**source_of(batch), return_dict=False)
    assert torch.equal(as_tuple[0], encoded)


@torch.inference_mode()
def test_masked_lm_is_the_encoder_and_its_head(
    directory: Path, plug_model: Plug, batch: dict[str, Tensor]
) -> None:
    model, info = PlugForMaskedLM.from_pretrained(directory, output_loading_info=True)

    output = model(**source_of(batch), labels=batch["mlm_labels"])

    assert not any(info.values())
    expected = plug_model.mlm_logits(plug_model.encode(**source_of(batch)))
    assert torch.equal(output.logits, expected)
    torch.testing.assert_close(output.loss, mean_nats(expected, batch["mlm_labels"]))


@torch.inference_mode()
def test_half_precision_loads_and_stays_near(
    directory: Path, plug_model: Plug, batch: dict[str, Tensor]
) -> None:
    model = PlugForPreTraining.from_pretrained(directory, dtype=torch.bfloat16)
    output = model(**batch)

    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert output.loss.dtype == torch.float32
    expected = plug_model.encode(**source_of(batch))
    difference = (output.encoder_last_hidden_state.float() - expected).abs().mean()
    assert difference < 0.05  # values are of unit size, bfloat16 keeps 8 bits


# --- classification --------------------------------------------------------------------------


@pytest.mark.parametrize("model_class", CLASSIFIERS)
def test_a_pretrained_directory_lacks_the_classifier_alone(
    model_class: type[Any], directory: Path, plug_model: Plug
) -> None:
    model, info = model_class.from_pretrained(directory, num_labels=4, output_loading_info=True)

    assert info.pop("missing_keys") == {"classifier.weight", "classifier.bias"}
    assert not any(info.values())  # the decoder and the other heads are not missed
    assert_same_weights(model.encoder, plug_model.encoder)
    assert_same_weights(model.embeddings, plug_model.embeddings)
    assert model.classifier.weight.shape == (4, 32)
    assert model.classifier.bias.eq(0).all()
    assert 0.01 < model.classifier.weight.std() < 0.03  # initializer_range 0.02


@torch.inference_mode()
def test_sequence_classification_reads_the_first_position(
    directory: Path, plug_model: Plug, batch: dict[str, Tensor], tmp_path: Path
) -> None:
    model = PlugForSequenceClassification.from_pretrained(directory, num_labels=4)
    labels = torch.tensor([3, 0, 1])

    output = model(**source_of(batch), labels=labels)

    first = plug_model.encode(**source_of(batch))[:, 0]
    expected = first @ model.classifier.weight.T + model.classifier.bias
    torch.testing.assert_close(output.logits, expected)
    torch.testing.assert_close(output.loss, mean_nats(expected, labels))
    model.save_pretrained(tmp_path / "tuned")
    again, info = PlugForSequenceClassification.from_pretrained(
        tmp_path / "tuned", output_loading_info=True
    )
    assert not any(info.values())
    assert_same_weights(again, model)
    assert again.config.num_labels == 4


@torch.inference_mode()
def test_one_label_is_regression(directory: Path, batch: dict[str, Tensor]) -> None:
    model = PlugForSequenceClassification.from_pretrained(directory, num_labels=1)
    labels = torch.tensor([0.5, -1.0, 2.0])

    output = model(**source_of(batch), labels=labels)

    assert output.logits.shape == (BATCH, 1)
    torch.testing.assert_close(output.loss, (output.logits[:, 0] - labels).square().mean())
    assert model.config.problem_type == "regression"


@torch.inference_mode()
def test_token_classification_labels_every_position(
    directory: Path, plug_model: Plug, batch: dict[str, Tensor]
) -> None:
    model = PlugForTokenClassification.from_pretrained(directory, num_labels=6)
    labels = torch.randint(0, 6, (BATCH, SOURCE)).masked_fill(batch["attention_mask"] == 0, -100)

    output = model(**source_of(batch), labels=labels)

    encoded = plug_model.encode(**source_of(batch))
    expected = encoded @ model.classifier.weight.T + model.classifier.bias
    torch.testing.assert_close(output.logits, expected)
    torch.testing.assert_close(output.loss, mean_nats(expected, labels))


# --- generation ------------------------------------------------------------------------------


@torch.inference_mode()
def greedy_by_hand(model: Plug, input_ids: Tensor, steps: int) -> list[int]:
    """One unpadded row, no cache: argmax over the ids that may be written, until [SEP]."""
    encoded = model.encode(input_ids[None])
    ids = [model.config.decoder_start_token_id]
    for _ in range(steps):
        hidden = model.decode(torch.tensor([ids]), encoded)[0, -1]
        ids.append(int(model.lm_logits(hidden)[: model.config.num_emitted_tokens].argmax()))
        if ids[-1] == model.config.eos_token_id:
            break
    return ids


@pytest.mark.parametrize(
    "how",
    [{}, {"use_cache": False}, {"cache_implementation": "static"}],
    ids=["cached", "uncached", "static"],
)
def test_greedy_generation_of_a_padded_batch_is_that_of_each_row_by_hand(
    how: dict[str, Any], directory: Path, plug_model: Plug, batch: dict[str, Tensor]
) -> None:
    model = PlugForConditionalGeneration.from_pretrained(directory)
    source = {key: batch[key] for key in ("input_ids", "attention_mask")}

    written = model.generate(
        **source, do_sample=False, repetition_penalty=1.0, max_new_tokens=9, **how
    )

    lengths = batch["attention_mask"].sum(1).tolist()
    rows = [ids[:n] for ids, n in zip(batch["input_ids"], lengths, strict=True)]
    by_hand = [greedy_by_hand(plug_model, row, 9) for row in rows]
    pad = plug_model.config.pad_token_id
    width = max(map(len, by_hand))
    assert written.tolist() == [ids + [pad] * (width - len(ids)) for ids in by_hand]
    assert len({tuple(ids) for ids in by_hand}) == BATCH  # the rows do differ
    with torch.inference_mode():  # and padding rows would have been written
        first = plug_model.encode(rows[0][None])
        start = torch.tensor([[plug_model.config.decoder_start_token_id]])
        assert plug_model.lm_logits(plug_model.decode(start, first)).argmax() >= EMITTED


def test_generation_stops_at_the_end_token_and_pads(
    directory: Path, plug_model: Plug, batch: dict[str, Tensor]
) -> None:
    model = PlugForConditionalGeneration.from_pretrained(directory)
    row = batch["input_ids"][:1]
    by_hand = greedy_by_hand(plug_model, row[0], 4)

    written = model.generate(
        row, do_sample=False, repetition_penalty=1.0, max_new_tokens=9, eos_token_id=by_hand[3]
    )

    assert written.tolist() == [by_hand[: by_hand.index(by_hand[3], 1) + 1]]


def test_token_types_reach_the_encoder(
    directory: Path, batch: dict[str, Tensor], plug_model: Plug
) -> None:
    model = PlugForConditionalGeneration.from_pretrained(directory)
    written = model.generate(
        **source_of(batch), do_sample=False, max_new_tokens=4, output_logits=True,
        return_dict_in_generate=True,
    )  # fmt: skip

    start = torch.full((BATCH, 1), plug_model.config.decoder_start_token_id)
    with torch.inference_mode():
        encoded = plug_model.encode(**source_of(batch))
        decoded = plug_model.decode(start, encoded, batch["attention_mask"])
        torch.testing.assert_close(written.logits[0], plug_model.lm_logits(decoded)[:, 0])


@pytest.mark.parametrize("num_encoder_layers", [1, 4])
def test_the_encoder_is_projected_once_whatever_the_layers(
    num_encoder_layers: int, config: PlugConfig, make_model: Callable[[PlugConfig], Plug]
) -> None:
    shape = dataclasses.replace(config, num_hidden_layers=num_encoder_layers)
    expected = make_model(shape)
    model = PlugForConditionalGeneration(PlugTransformersConfig(**shape.to_dict())).eval()
    model.load_state_dict(expected.state_dict())
    calls: list[str] = []
    for name, module in model.decoder.named_modules():
        if name.endswith("cross_attention.k_proj"):
            module.register_forward_hook(lambda *_, name=name: calls.append(name))
    input_ids = torch.randint(5, 320, (1, SOURCE))

    written = model.generate(
        input_ids, do_sample=False, repetition_penalty=1.0, max_new_tokens=6, min_new_tokens=6
    )

    assert len(calls) == config.num_decoder_layers
    assert written.shape == (1, 7)


@torch.inference_mode()
def test_a_cache_that_forward_makes_carries_on_where_it_was(
    directory: Path, batch: dict[str, Tensor]
) -> None:
    model = PlugForConditionalGeneration.from_pretrained(directory)
    ids = torch.randint(5, EMITTED, (BATCH, TARGET))
    full = model(**source_of(batch), decoder_input_ids=ids)

    first = model(**source_of(batch), decoder_input_ids=ids[:, :2], use_cache=True)
    kept = first["past_key_values"]  # both old and new transformers know this name
    then = model(
        attention_mask=batch["attention_mask"],
        decoder_input_ids=ids[:, 2:],
        encoder_outputs=(first.encoder_last_hidden_state,),
        past_key_values=kept,
    )

    torch.testing.assert_close(torch.cat([first.logits, then.logits], 1), full.logits)
    assert kept.get_seq_length() == TARGET


@torch.inference_mode()
def test_decoder_padding_is_not_seen(directory: Path, batch: dict[str, Tensor]) -> None:
    model = PlugForConditionalGeneration.from_pretrained(directory)
    ids = torch.randint(5, EMITTED, (BATCH, TARGET))
    mask = torch.ones_like(ids)
    mask[:, 1] = 0

    first = model(**source_of(batch), decoder_input_ids=ids, decoder_attention_mask=mask)
    ids[:, 1] = 7
    second = model(**source_of(batch), decoder_input_ids=ids, decoder_attention_mask=mask)
    seen = model(**source_of(batch), decoder_input_ids=ids)

    torch.testing.assert_close(first.logits[:, 2:], second.logits[:, 2:])
    assert not torch.allclose(second.logits[:, 2:], seen.logits[:, 2:], atol=1e-3)


@torch.inference_mode()
def best_pair(model: Plug, input_ids: Tensor) -> list[int]:
    """The likeliest two ids after [CLS] of one unpadded row, by trying all; [SEP] is barred."""
    encoded = model.encode(input_ids[None])
    start = torch.tensor([[model.config.decoder_start_token_id]])
    barred = torch.arange(model.config.vocab_size) >= model.config.num_emitted_tokens
    barred[model.config.eos_token_id] = True
    everything = torch.arange(model.config.vocab_size)[:, None]

    def scores(decoder_ids: Tensor) -> Tensor:
        hidden = model.decode(decoder_ids, encoded.expand(len(decoder_ids), -1, -1))[:, -1]
        return model.lm_logits(hidden).log_softmax(-1).masked_fill(barred, -torch.inf)

    first = scores(start)[0]
    second = scores(torch.cat([start.expand_as(everything), everything], 1))
    best = (first[:, None] + second).argmax().item()
    return [start.item(), *divmod(int(best), model.config.vocab_size)]


def test_beams_as_wide_as_the_vocabulary_find_the_best_text(
    directory: Path, plug_model: Plug, batch: dict[str, Tensor]
) -> None:
    model = PlugForConditionalGeneration.from_pretrained(directory)
    source = {key: batch[key] for key in ("input_ids", "attention_mask")}
    settings = {"do_sample": False, "max_new_tokens": 2, "min_new_tokens": 2}

    beam = model.generate(**source, **settings, num_beams=EMITTED)

    lengths = batch["attention_mask"].sum(1).tolist()
    rows = [ids[:n] for ids, n in zip(batch["input_ids"], lengths, strict=True)]
    best = [best_pair(plug_model, row) for row in rows]
    assert beam.tolist() == best
    assert model.generate(**source, **settings).tolist() != best  # greedy misses one


def test_the_cache_changes_nothing_in_beam_search(
    directory: Path, batch: dict[str, Tensor]
) -> None:
    model = PlugForConditionalGeneration.from_pretrained(directory)
    source = {key: batch[key] for key in ("input_ids", "attention_mask")}
    settings = {"do_sample": False, "max_new_tokens": 8, "num_beams": 4}

    cached = model.generate(**source, **settings, num_return_sequences=3)
    uncached = model.generate(**source, **settings, num_return_sequences=3, use_cache=False)

    assert cached.shape[0] == BATCH * 3
    assert cached.tolist() == uncached.tolist()
    assert len({tuple(ids) for ids in cached.tolist()}) == BATCH * 3


def test_sampling_follows_the_seed_and_writes_real_tokens_alone(
    directory: Path, batch: dict[str, Tensor]
) -> None:
    model = PlugForConditionalGeneration.from_pretrained(directory)
    settings = {"do_sample": True, "temperature": 3.0, "top_k": 0, "max_new_tokens": 30}

    def sample(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return model.generate(
            batch["input_ids"], attention_mask=batch["attention_mask"], **settings
        )

    assert torch.equal(sample(5), sample(5))
    assert sample(5).tolist() != sample(6).tolist()
    assert sample(5).max() < EMITTED


def test_forward_without_ids_says_what_is_missing(directory: Path) -> None:
    model = PlugForConditionalGeneration.from_pretrained(directory)
    ids = torch.randint(5, EMITTED, (BATCH, TARGET))

    with pytest.raises(UsageError, match="decoder_input_ids"):
        model(ids)
    with pytest.raises(UsageError, match="input_ids"):
        model(decoder_input_ids=ids)


# --- training --------------------------------------------------------------------------------


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


@pytest.mark.parametrize("from_directory", [True, False])
def test_fine_tuning_for_generation_leaves_the_other_heads_alone(
    from_directory: bool, directory: Path, batch: dict[str, Tensor]
) -> None:
    if from_directory:
        model = PlugForConditionalGeneration.from_pretrained(directory)
    else:
        model = PlugForConditionalGeneration(PlugTransformersConfig.from_pretrained(directory))

    model(**source_of(batch), labels=batch["labels"]).loss.backward()

    frozen = {name for name, one in model.named_parameters() if not one.requires_grad}
    assert {name.split(".")[0] for name in frozen} == {"mlm_head", "sentence_head"}
    assert frozen == {name for name, one in model.named_parameters() if one.grad is None}


class RandomExamples(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """Twelve examples with labels of unlike lengths."""

    def __init__(self) -> None:
        torch.manual_seed(4)
        self.ids = torch.randint(5, EMITTED, (12, SOURCE))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        labels = self.ids[index].clone()
        labels[2 + index % 4 :] = -100
        return {"input_ids": self.ids[index], "labels": labels}


def train(model: Any, folder: Path, **settings: Any) -> Any:
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=3,
        learning_rate=1e-2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
        logging_steps=1,
        dataloader_pin_memory=False,
        **settings,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=RandomExamples())
    trainer.train()
    return trainer


def test_the_trainer_trains_and_what_it_saves_loads_in_plug(
    directory: Path, plug_model: Plug, tmp_path: Path
) -> None:
    model = PlugForConditionalGeneration.from_pretrained(directory)

    new_name = hasattr(model, "activation_checkpointing_enable")
    checkpointing = "activation_checkpointing" if new_name else "gradient_checkpointing"
    trainer = train(model, tmp_path / "run", per_device_train_batch_size=4, **{checkpointing: True})

    assert trainer.state.global_step == 3
    trainer.save_model(tmp_path / "tuned")
    tuned = plug.load(tmp_path / "tuned")
    changed = {
        name
        for name, tensor in tuned.state_dict().items()
        if not torch.equal(tensor, plug_model.state_dict()[name])
    }
    kept = {name for name in tuned.state_dict() if name.startswith(("mlm_head", "sentence_head"))}
    assert changed == tuned.state_dict().keys() - kept


def test_gradient_accumulation_weighs_every_label_alike(directory: Path, tmp_path: Path) -> None:
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


# --- the original's numbers ------------------------------------------------------------------


@pytest.fixture(scope="module")
def imported(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from plug.checkpoints.original import import_original

    target = tmp_path_factory.mktemp("imported") / "plug-tiny"
    import_original(golden / "checkpoints/mp2", target)
    return target


@pytest.mark.shared
@pytest.mark.parametrize(("path", "passes"), [("infer", 2), ("train", 1)])
@torch.inference_mode()
def test_pretraining_gives_the_outputs_of_the_original(
    path: str, passes: int, golden: Path, imported: Path
) -> None:
    """Tolerance: the golden README's, 1e-4 absolute for float32 logits and hidden states."""
    model = PlugForPreTraining.from_pretrained(imported, encoder_final_norm_passes=passes)
    with np.load(golden / "forward.npz") as file:
        values = {key: torch.from_numpy(file[key]) for key in file.files}

    output = model(
        values["input_ids"], values["attention_mask"], decoder_input_ids=values["dec_input_ids"]
    )

    def close(actual: Tensor, key: str) -> None:
        torch.testing.assert_close(actual, values[key], atol=1e-4, rtol=0)

    suffix = "" if path == "infer" else "_train"
    close(output.encoder_last_hidden_state, f"enc_output_{path}")
    close(output.mlm_logits[:, values[f"mlm_positions{suffix}"]], f"mlm_logits_{path}")
    close(output.sentence_logits, f"seq_relationship_{path}")
    if path == "infer":
        close(output.logits, "dec_logits_infer")
        with_types = model(values["input_ids"], values["attention_mask"], values["token_type_ids"])
        close(with_types.encoder_last_hidden_state, "enc_output_infer_token_types")
    else:
        close(output.logits[:, values["dec_positions_train"]], "dec_logits_train")


@pytest.mark.shared
@pytest.mark.parametrize(("key", "passes"), [("loss_train", 1), ("loss_no_checkpoint", 2)])
@torch.inference_mode()
def test_pretraining_gives_the_loss_of_the_original(
    key: str, passes: int, golden: Path, imported: Path
) -> None:
    """The original counts a step when its INPUT is not 0, so that mask is put on the labels."""
    model = PlugForPreTraining.from_pretrained(imported, encoder_final_norm_passes=passes)
    with np.load(golden / "loss.npz") as file:
        values = {name: torch.from_numpy(file[name]) for name in file.files}
    decoder_ids, targets = values["labels"][:, :-1], values["labels"][:, 1:]

    output = model(
        values["input_ids"],
        values["attention_mask"],
        decoder_input_ids=decoder_ids,
        labels=targets.masked_fill(decoder_ids == 0, -100),
    )

    assert output.losses.keys() == {"lm"}
    torch.testing.assert_close(output.loss, values[key], atol=1e-4, rtol=0)
    per_token = F.cross_entropy(output.logits.transpose(1, 2), targets, reduction="none")
    torch.testing.assert_close(per_token, values[f"{key}_per_token"], atol=1e-4, rtol=0)


# --- the documentation -----------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set:UserWarning")  # no GPU here
def test_the_snippets_of_the_documentation_run(
    plug_model: Plug, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(plug_model, tmp_path / "plug-mini-zh", tokenizer=byte_pieces(tmp_path))
    monkeypatch.setattr("plug.checkpoints.directory._ASSETS", tmp_path)
    monkeypatch.chdir(tmp_path)
    yours = types.ModuleType("datasets_of_yours")
    yours.pairs = [{"source": "春天", "target": "来"}] * 4  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets_of_yours", yours)
    text = (Path(__file__).parents[2] / "docs/transformers.md").read_text(encoding="utf-8")
    snippets = re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)

    names: dict[str, Any] = {}
    for snippet in snippets:
        exec(snippet, names)

    assert len(snippets) == 4
    assert names["output"].losses.keys() == {"lm", "mlm", "sentence"}
    assert names["tokenizer"].mask_token_id in names["ids"]
    assert PlugTokenizer.load("runs/tuned").encode("春天") == byte_pieces(tmp_path).encode("春天")
    assert plug.load("runs/tuned").config == plug_model.config


def test_question_answering_points_at_two_ends_of_real_tokens(config: PlugConfig) -> None:
    torch.manual_seed(0)
    shape = PlugTransformersConfig(**config.to_dict())
    model = plug.PlugForQuestionAnswering(shape).eval()
    input_ids = torch.randint(5, EMITTED, (BATCH, SOURCE))
    mask = torch.ones(BATCH, SOURCE).tril(SOURCE - BATCH).long()
    starts, ends = torch.tensor([0, 1, 2]), torch.tensor([3, 2, 4])
    output = model(input_ids, mask, start_positions=starts, end_positions=ends)
    expected = model.classifier(model.encode(input_ids, mask))
    expected = expected.masked_fill(mask[..., None] == 0, -torch.inf)
    assert_close = torch.testing.assert_close
    assert_close(torch.stack([output.start_logits, output.end_logits], -1), expected)
    likelihoods = expected.log_softmax(1)[range(BATCH), torch.stack([starts, ends]), [[0], [1]]]
    assert_close(output.loss, -likelihoods.mean())
    auto = transformers.AutoModelForQuestionAnswering.from_config(shape)
    assert type(auto) is plug.PlugForQuestionAnswering

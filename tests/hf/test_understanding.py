"""The encoder under a head, against `Plug` and BERT."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import plug
from plug.errors import UsageError
from plug.model.configuration import PlugConfig
from plug.model.plug import Plug

transformers = pytest.importorskip("transformers")

from transformers import (  # noqa: E402
    BertConfig,
    BertForMaskedLM,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
)

from plug import (  # noqa: E402
    PlugForMaskedLM,
    PlugForQuestionAnswering,
    PlugForSequenceClassification,
    PlugForTokenClassification,
    PlugTransformersConfig,
)

BATCH, SOURCE, EMITTED = 3, 7, 311  # as in conftest.py
CLASSIFIERS = [PlugForSequenceClassification, PlugForTokenClassification]


@torch.inference_mode()
def test_masked_lm_is_the_encoder_and_its_head(
    directory: Path,
    plug_model: Plug,
    batch: dict[str, Tensor],
    source: dict[str, Tensor],
    mean_nats: Callable[[Tensor, Tensor], Tensor],
) -> None:
    model, info = PlugForMaskedLM.from_pretrained(directory, output_loading_info=True)

    output = model(**source, labels=batch["mlm_labels"])

    assert not any(info.values())
    expected = plug_model.mlm_logits(plug_model.encode(**source))
    assert torch.equal(output.logits, expected)
    torch.testing.assert_close(output.loss, mean_nats(expected, batch["mlm_labels"]))


@pytest.mark.parametrize("model_class", CLASSIFIERS)
def test_a_pretrained_directory_lacks_the_classifier_alone(
    model_class: type[Any],
    directory: Path,
    plug_model: Plug,
    assert_same_weights: Callable[..., None],
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
    directory: Path,
    plug_model: Plug,
    tmp_path: Path,
    source: dict[str, Tensor],
    mean_nats: Callable[[Tensor, Tensor], Tensor],
    assert_same_weights: Callable[..., None],
) -> None:
    model = PlugForSequenceClassification.from_pretrained(directory, num_labels=4)
    labels = torch.tensor([3, 0, 1])

    output = model(**source, labels=labels)

    first = plug_model.encode(**source)[:, 0]
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
def test_one_label_is_regression(directory: Path, source: dict[str, Tensor]) -> None:
    model = PlugForSequenceClassification.from_pretrained(directory, num_labels=1)
    labels = torch.tensor([0.5, -1.0, 2.0])

    output = model(**source, labels=labels)

    assert output.logits.shape == (BATCH, 1)
    torch.testing.assert_close(output.loss, (output.logits[:, 0] - labels).square().mean())
    assert model.config.problem_type == "regression"


@torch.inference_mode()
def test_token_classification_labels_every_position(
    directory: Path,
    plug_model: Plug,
    batch: dict[str, Tensor],
    source: dict[str, Tensor],
    mean_nats: Callable[[Tensor, Tensor], Tensor],
) -> None:
    model = PlugForTokenClassification.from_pretrained(directory, num_labels=6)
    labels = torch.randint(0, 6, (BATCH, SOURCE)).masked_fill(batch["attention_mask"] == 0, -100)

    output = model(**source, labels=labels)

    encoded = plug_model.encode(**source)
    expected = encoded @ model.classifier.weight.T + model.classifier.bias
    torch.testing.assert_close(output.logits, expected)
    torch.testing.assert_close(output.loss, mean_nats(expected, labels))


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


BERT = [
    (PlugForMaskedLM, BertForMaskedLM),
    (PlugForSequenceClassification, BertForSequenceClassification),
    (PlugForTokenClassification, BertForTokenClassification),
    (PlugForQuestionAnswering, BertForQuestionAnswering),
]


@pytest.mark.parametrize(("model_class", "bert_class"), BERT)
@torch.inference_mode()
def test_outputs_have_the_names_and_shapes_of_bert(
    model_class: type[Any], bert_class: type[Any], directory: Path, config: PlugConfig,
    source: dict[str, Tensor],
) -> None:  # fmt: skip
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
             "intermediate_size", "max_position_embeddings")  # fmt: skip
    shape = {name: getattr(config, name) for name in names}
    bert = bert_class(BertConfig(**shape, attn_implementation="eager")).eval()
    model = model_class.from_pretrained(directory)
    asked = {"output_hidden_states": True, "output_attentions": True}

    found, expected = model(**source, **asked), bert(**source, **asked)

    assert list(found) == list(expected)
    for key, value in found.items():
        theirs = expected[key]
        if isinstance(value, Tensor):
            value, theirs = (value,), (theirs,)
        assert [each.shape for each in value] == [each.shape for each in theirs]
    assert len(model(**source, return_dict=False, **asked)) == len(expected)
    others = {key: value for key, value in source.items() if key != "input_ids"}
    embeds = model.get_input_embeddings()(source["input_ids"])
    torch.testing.assert_close(model(inputs_embeds=embeds, **others)[0], found[0])


def test_an_answer_that_was_cut_off_is_ignored(config: PlugConfig) -> None:
    torch.manual_seed(0)
    model = PlugForQuestionAnswering(PlugTransformersConfig(**config.to_dict())).eval()
    ids = torch.randint(5, EMITTED, (BATCH, SOURCE))
    inside = torch.tensor([2, 3])

    some = model(ids, start_positions=torch.tensor([2, 3, 99]), end_positions=torch.full((3,), 4))
    first = model(ids[:2], start_positions=inside, end_positions=inside)

    ends = -some.end_logits.log_softmax(-1)[:, 4].mean()
    starts = -first.start_logits.log_softmax(-1)[[0, 1], inside].mean()
    torch.testing.assert_close(some.loss, (starts + ends) / 2)


def test_the_head_of_another_task_is_not_taken_for_ours(config: PlugConfig, tmp_path: Path) -> None:
    """All classifiers call their head `classifier`; shapes agree where the labels' numbers do."""
    values = config.to_dict() | {"num_labels": 2}
    PlugForSequenceClassification(PlugTransformersConfig(**values)).save_pretrained(tmp_path)

    for other in (PlugForTokenClassification, PlugForQuestionAnswering):
        with pytest.raises(UsageError, match=r"是 PlugForSequenceClassification，它的输出层不是"):
            other.from_pretrained(tmp_path)
    assert PlugForSequenceClassification.from_pretrained(tmp_path).config.num_labels == 2

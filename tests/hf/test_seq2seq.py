"""Pre-training and writing, against `Plug`, BART and the original."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import plug
from plug.checkpoints.directory import generation_config
from plug.errors import UsageError
from plug.loading.save import save
from plug.model.configuration import PlugConfig
from plug.model.plug import Plug
from plug.tokenization import PlugTokenizer

transformers = pytest.importorskip("transformers")

from transformers import (  # noqa: E402
    AutoTokenizer,
    BartConfig,
    BartForConditionalGeneration,
    DataCollatorForSeq2Seq,
    LogitsProcessor,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
)

from plug import (  # noqa: E402
    PlugForConditionalGeneration,
    PlugForPreTraining,
    PlugModel,
    PlugTransformersConfig,
)

BATCH, SOURCE, TARGET, EMITTED = 3, 7, 5, 311  # as in conftest.py


@torch.inference_mode()
def test_pretraining_outputs_are_those_of_plug(
    directory: Path, plug_model: Plug, batch: dict[str, Tensor], source: dict[str, Tensor]
) -> None:
    output = PlugForPreTraining.from_pretrained(directory)(**batch)

    start, pad = plug_model.config.decoder_start_token_id, plug_model.config.pad_token_id
    shifted = [[start, *row[:-1]] for row in batch["labels"].tolist()]
    decoder_ids = torch.tensor([[pad if i == -100 else i for i in row] for row in shifted])
    encoded = plug_model.encode(**source)
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
    directory: Path,
    batch: dict[str, Tensor],
    source: dict[str, Tensor],
    mean_nats: Callable[[Tensor, Tensor], Tensor],
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

    without = model(**source, sentence_labels=batch["sentence_labels"])
    assert without.losses.keys() == {"sentence"}
    assert without.logits is None
    none = model(**source, mlm_labels=torch.full((BATCH, SOURCE), -100))
    assert none.loss == 0  # a batch in which nothing was masked
    assert model(**source).loss is None


@torch.inference_mode()
def test_conditional_generation_and_the_bare_model_give_the_numbers_of_plug(
    directory: Path,
    plug_model: Plug,
    batch: dict[str, Tensor],
    source: dict[str, Tensor],
    mean_nats: Callable[[Tensor, Tensor], Tensor],
) -> None:
    decoder_ids = torch.randint(5, EMITTED, (BATCH, TARGET))
    encoded = plug_model.encode(**source)
    decoded = plug_model.decode(decoder_ids, encoded, batch["attention_mask"])

    model = PlugForConditionalGeneration.from_pretrained(directory)
    output = model(**source, decoder_input_ids=decoder_ids, labels=batch["labels"])
    bare = PlugModel.from_pretrained(directory)
    states = bare(**source, decoder_input_ids=decoder_ids)

    assert torch.equal(output.logits, plug_model.lm_logits(decoded))
    assert torch.equal(output.encoder_last_hidden_state, encoded)
    torch.testing.assert_close(output.loss, mean_nats(output.logits, batch["labels"]))
    summed = model(
        **source,
        decoder_input_ids=decoder_ids,
        labels=batch["labels"],
        num_items_in_batch=torch.tensor(26),
    )
    torch.testing.assert_close(summed.loss, output.loss * 13 / 26)  # 13 labels are not -100
    assert torch.equal(states.last_hidden_state, decoded)
    assert bare(**source).last_hidden_state is None
    as_tuple = bare(**source, return_dict=False)
    assert torch.equal(as_tuple[0], encoded)


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


class Dictated(LogitsProcessor):
    """Has the given ids written, then the end token."""

    def __init__(self, ids: list[int]) -> None:
        self.ids = ids

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        dictated = torch.full_like(scores, -torch.inf)
        dictated[:, self.ids[input_ids.shape[1] - 1]] = 0
        return dictated


@pytest.mark.parametrize(("stop", "written"), [("d", "abcd"), ("bc", "abc"), ("ca", "abcdabca")])
def test_stop_strings_end_a_text(
    stop: str, written: str, plug_model: Plug, byte_pieces: PlugTokenizer, tmp_path: Path
) -> None:
    save(plug_model, tmp_path / "model", tokenizer=byte_pieces)
    model = PlugForConditionalGeneration.from_pretrained(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    ids = tokenizer("abcdabcabcd", add_special_tokens=False).input_ids

    output = model.generate(
        torch.tensor([ids]), max_new_tokens=len(ids), logits_processor=[Dictated(ids)],
        stop_strings=[stop], tokenizer=tokenizer,
    )  # fmt: skip

    assert tokenizer.decode(output[0], skip_special_tokens=True) == written


def test_token_types_reach_the_encoder(
    directory: Path, batch: dict[str, Tensor], plug_model: Plug, source: dict[str, Tensor]
) -> None:
    model = PlugForConditionalGeneration.from_pretrained(directory)
    written = model.generate(
        **source, do_sample=False, max_new_tokens=4, output_logits=True,
        return_dict_in_generate=True,
    )  # fmt: skip

    start = torch.full((BATCH, 1), plug_model.config.decoder_start_token_id)
    with torch.inference_mode():
        encoded = plug_model.encode(**source)
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
    directory: Path, batch: dict[str, Tensor], source: dict[str, Tensor]
) -> None:
    model = PlugForConditionalGeneration.from_pretrained(directory)
    ids = torch.randint(5, EMITTED, (BATCH, TARGET))
    full = model(**source, decoder_input_ids=ids)

    first = model(**source, decoder_input_ids=ids[:, :2], use_cache=True)
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
def test_decoder_padding_is_not_seen(directory: Path, source: dict[str, Tensor]) -> None:
    model = PlugForConditionalGeneration.from_pretrained(directory)
    ids = torch.randint(5, EMITTED, (BATCH, TARGET))
    mask = torch.ones_like(ids)
    mask[:, 1] = 0

    first = model(**source, decoder_input_ids=ids, decoder_attention_mask=mask)
    ids[:, 1] = 7
    second = model(**source, decoder_input_ids=ids, decoder_attention_mask=mask)
    seen = model(**source, decoder_input_ids=ids)

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

    with pytest.raises(UsageError, match=r"decoder_input_ids.*DataCollatorForSeq2Seq"):
        model(ids)  # as the Trainer does with `label_smoothing_factor` and another collator
    with pytest.raises(UsageError, match="input_ids"):
        model(decoder_input_ids=ids)


@pytest.mark.parametrize("from_directory", [True, False])
def test_fine_tuning_for_generation_leaves_the_other_heads_alone(
    from_directory: bool, directory: Path, batch: dict[str, Tensor], source: dict[str, Tensor]
) -> None:
    if from_directory:
        model = PlugForConditionalGeneration.from_pretrained(directory)
    else:
        model = PlugForConditionalGeneration(PlugTransformersConfig.from_pretrained(directory))

    model(**source, labels=batch["labels"]).loss.backward()

    frozen = {name for name, one in model.named_parameters() if not one.requires_grad}
    assert {name.split(".")[0] for name in frozen} == {"mlm_head", "sentence_head"}
    assert frozen == {name for name, one in model.named_parameters() if one.grad is None}


def test_the_trainer_trains_and_what_it_saves_loads_in_plug(
    directory: Path, plug_model: Plug, tmp_path: Path, train: Callable[..., Any]
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


# --- as BART does ----------------------------------------------------------------------------


@pytest.fixture
def bart(config: PlugConfig) -> Any:
    """BART of the same size."""
    shape = BartConfig(
        vocab_size=config.vocab_size, d_model=config.hidden_size,
        encoder_layers=config.num_hidden_layers, decoder_layers=config.num_decoder_layers,
        encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=64,
        decoder_ffn_dim=64, max_position_embeddings=96, pad_token_id=0, bos_token_id=2,
        eos_token_id=3, decoder_start_token_id=2, forced_eos_token_id=None,
        attn_implementation="eager",
    )  # fmt: skip
    return BartForConditionalGeneration(shape).eval()


def shapes(output: Any) -> Any:
    """Names and shapes of all that an output holds."""
    if isinstance(output, Tensor):
        return tuple(output.shape)
    if isinstance(output, tuple):
        return [shapes(each) for each in output]
    if hasattr(output, "items"):
        return {key: shapes(value) for key, value in output.items()}
    return type(output).__name__


@pytest.mark.parametrize(
    "asked",
    [
        {},
        {"output_hidden_states": True, "output_attentions": True},
        {"return_dict": False, "use_cache": False, "output_hidden_states": True},
    ],
)
@torch.inference_mode()
def test_outputs_have_the_names_and_shapes_of_bart(
    asked: dict[str, Any], directory: Path, bart: Any, batch: dict[str, Tensor]
) -> None:
    model = PlugForConditionalGeneration.from_pretrained(directory)
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    inputs["decoder_input_ids"] = torch.randint(5, EMITTED, (BATCH, TARGET))

    assert shapes(model(**inputs, **asked)) == shapes(bart(**inputs, **asked))


@pytest.mark.parametrize(
    "how", [{}, {"num_beams": 3}, {"do_sample": True}, {"use_cache": False}], ids=str
)
def test_generate_returns_the_names_and_shapes_of_bart(
    how: dict[str, Any], directory: Path, bart: Any, batch: dict[str, Tensor]
) -> None:
    model = PlugForConditionalGeneration.from_pretrained(directory)
    asked = dict.fromkeys(
        ("return_dict_in_generate", "output_hidden_states", "output_attentions", "output_scores"),
        True,
    )
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}

    found, expected = (
        each.generate(**inputs, max_new_tokens=4, min_new_tokens=4, **asked, **how)
        for each in (model, bart)
    )

    assert shapes(found) == shapes(expected)


@torch.inference_mode()
def test_hidden_states_and_attentions_are_those_that_the_layers_compute(
    directory: Path, plug_model: Plug, batch: dict[str, Tensor], source: dict[str, Tensor]
) -> None:
    model = PlugForPreTraining.from_pretrained(directory)
    output = model(
        **source, labels=batch["labels"], output_hidden_states=True, output_attentions=True
    )

    embedded = plug_model.embeddings(source["input_ids"], source["token_type_ids"])
    first = plug_model.encoder.layers[0](
        embedded, source["attention_mask"].bool()[:, None, None, :]
    )
    torch.testing.assert_close(output.encoder_hidden_states[0], embedded)
    torch.testing.assert_close(output.encoder_hidden_states[1], first)
    assert torch.equal(output.encoder_hidden_states[-1], output.encoder_last_hidden_state)
    assert len(output.decoder_hidden_states) == plug_model.config.num_decoder_layers + 1
    attention = plug_model.encoder.layers[0].attention
    normalized = plug_model.encoder.layers[0].attention_norm(embedded)
    value = attention.project_key_value(normalized)[1]
    mixed = (output.encoder_attentions[0] @ value).transpose(1, 2).flatten(2)
    mask = source["attention_mask"].bool()[:, None, None, :]
    expected = attention(normalized, *attention.project_key_value(normalized), mask)
    torch.testing.assert_close(attention.out_proj(mixed), expected)
    for weights in (output.decoder_attentions, output.cross_attentions, output.encoder_attentions):
        torch.testing.assert_close(weights[0].sum(-1), torch.ones_like(weights[0][..., 0]))
    assert output.decoder_attentions[0].triu(1).eq(0).all()
    assert not any(part._forward_hooks for part in model.modules())  # nothing stays behind


@pytest.mark.parametrize("model_class", [PlugForConditionalGeneration, PlugModel])
@torch.inference_mode()
def test_embeddings_take_the_place_of_ids(
    model_class: type[Any], directory: Path, source: dict[str, Tensor]
) -> None:
    model = model_class.from_pretrained(directory)
    ids = torch.randint(5, EMITTED, (BATCH, TARGET))
    words = model.get_input_embeddings()
    expected = model(**source, decoder_input_ids=ids)
    others = {key: value for key, value in source.items() if key != "input_ids"}

    found = model(
        **others, inputs_embeds=words(source["input_ids"]), decoder_inputs_embeds=words(ids)
    )

    torch.testing.assert_close(found[0], expected[0])
    with pytest.raises(UsageError, match="inputs_embeds"):
        model(**source, inputs_embeds=words(source["input_ids"]), decoder_input_ids=ids)


def test_padding_is_not_read_where_there_is_no_mask(
    directory: Path, source: dict[str, Tensor]
) -> None:
    model = PlugForConditionalGeneration.from_pretrained(directory)
    ids, mask = source["input_ids"], source["attention_mask"]
    settings = {"do_sample": False, "max_new_tokens": 8}

    assert torch.equal(
        model.generate(ids, **settings), model.generate(ids, attention_mask=mask, **settings)
    )
    with torch.inference_mode():
        start = torch.full((BATCH, 1), 2)
        expected = model(ids, mask, decoder_input_ids=start).logits
        torch.testing.assert_close(model(ids, decoder_input_ids=start).logits, expected)


def test_predictions_of_the_trainer_keep_to_the_length_asked_for(
    plug_model: Plug, tmp_path: Path, tiny_tokenizer: PlugTokenizer,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    save(plug_model, tmp_path / "new", tokenizer=tiny_tokenizer)
    save(plug_model, tmp_path / "old", tokenizer=tiny_tokenizer)
    drawn = {
        "do_sample": True, "temperature": 0.9, "top_k": 20, "repetition_penalty": 1.1,
        "max_new_tokens": 256,
    }  # fmt: skip
    (tmp_path / "old/generation_config.json").write_text(
        json.dumps(drawn | generation_config(plug_model.config))
    )
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "new")
    rows = [{**tokenizer("今天天气很好"), "labels": [5, 3]}]

    predictions = []
    for name in ("new", "old"):
        model = PlugForConditionalGeneration.from_pretrained(tmp_path / name)
        arguments = Seq2SeqTrainingArguments(
            str(tmp_path / "run"), report_to=[], use_cpu=True, disable_tqdm=True,
            predict_with_generate=True, generation_max_length=8, dataloader_pin_memory=False,
        )  # fmt: skip
        trainer = Seq2SeqTrainer(
            model, arguments, DataCollatorForSeq2Seq(tokenizer, model), processing_class=tokenizer
        )
        predictions += [trainer.predict(rows).predictions.tolist() for _ in range(2)]
        model.save_pretrained(tmp_path / f"{name}-again")

    assert all(each == predictions[0] for each in predictions)
    assert sum(index != plug_model.config.pad_token_id for index in predictions[0][0]) <= 8
    told = [record.getMessage() for record in caplog.records if record.name == "plug.hf.seq2seq"]
    assert len(told) == 1
    assert str(tmp_path / "old") in told[0]
    again = json.loads((tmp_path / "old-again/generation_config.json").read_text())
    assert not again.get("do_sample")
    assert again.get("max_new_tokens") is None

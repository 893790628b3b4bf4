from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from plug.errors import UsageError
from plug.evaluation.language_model import cut, default_lengths, evaluate_language_model
from plug.model.configuration import PRESETS, PlugConfig
from plug.model.plug import Plug
from plug.tokenization import SPECIAL_TOKENS, PlugTokenizer

DOCUMENTS = [
    "今天天气很好，我们去公园看花。\n山上有座庙。",
    "短。",  # nothing left to score
    "我们去山上看庙，今天很好。我们去公园看花，天气好。" * 3,
    "庙上有山今🙂很好，Abc。",
    "山上有庙，好",  # six characters, one to score after five
]
SOURCE, TARGET = 5, 20


def one_at_a_time(model: Plug, tokenizer: PlugTokenizer) -> tuple[float, list[int], list[str]]:
    """Nats of all targets, their lengths and texts: no batch, no padding, no cross-entropy."""
    nats, lengths, texts = 0.0, [], []
    for text in DOCUMENTS:
        ids = tokenizer.encode(text)
        target = ids[SOURCE : SOURCE + TARGET]
        source = torch.tensor([[2, *ids[:SOURCE], 3]])  # [CLS] … [SEP]
        for position, token in enumerate(target):
            written = torch.tensor([[2, *target[:position]]])
            hidden = model.decode(written, model.encode(source))
            log_probabilities = torch.log_softmax(model.lm_logits(hidden)[0, -1], dim=-1)
            nats -= float(log_probabilities[token])
        lengths.append(len(target))
        texts.append(tokenizer.decode(target))
    return nats, lengths, texts


@pytest.mark.parametrize("batch_size", [1, 2, 16])
@torch.inference_mode()
def test_the_score_is_that_of_single_documents_token_by_token(
    tiny_model: Plug, tiny_tokenizer: PlugTokenizer, batch_size: int
) -> None:
    nats, lengths, texts = one_at_a_time(tiny_model, tiny_tokenizer)
    score = evaluate_language_model(
        tiny_model,
        tiny_tokenizer,
        DOCUMENTS,
        source_length=SOURCE,
        target_length=TARGET,
        batch_size=batch_size,
    )
    assert (score.documents, score.skipped) == (4, 1)
    assert lengths[1] == 0
    assert score.tokens == sum(lengths)
    assert score.nats == pytest.approx(nats, rel=1e-5)
    assert score.nats_per_token == pytest.approx(nats / sum(lengths), rel=1e-5)
    characters = sum(map(len, texts))
    assert score.characters == characters < sum(lengths)  # the emoji is four bytes, four tokens
    assert score.nats_per_character == pytest.approx(nats / characters, rel=1e-5)
    assert score.unknown_share == 0  # bytes stand for what is not in the vocabulary


def test_pieces_of_several_characters_count_their_characters(
    tiny_tokenizer: PlugTokenizer,
) -> None:
    source, target, characters = cut("去天气好今天很好", tiny_tokenizer, 2, 3)
    assert tiny_tokenizer.decode(source) == "去天气"
    assert tiny_tokenizer.decode(target) == "好今天很"
    assert characters == 4


def test_a_character_that_the_border_cuts_in_two_counts_as_the_target_s(
    tiny_tokenizer: PlugTokenizer,
) -> None:
    _, target, characters = cut("今好🙂去看花", tiny_tokenizer, 4, 5)  # two bytes on each side
    assert len(target) == 5
    assert characters == len("🙂去看花")


@torch.inference_mode()
def test_unknown_tokens_are_counted_in_what_was_read_and_scored(
    make_model: Callable[[PlugConfig], Plug], config: PlugConfig, tmp_path: Path
) -> None:
    """WordPiece, as the original's: blanks have no token, unknown characters are [UNK]."""
    vocabulary = tmp_path / "vocab.txt"
    vocabulary.write_text("\n".join([*SPECIAL_TOKENS.values(), *"山上有庙"]), encoding="utf-8")
    tokenizer = PlugTokenizer.from_vocabulary_file(vocabulary)
    score = evaluate_language_model(
        make_model(config), tokenizer, ["山海 有庙 上水 上有云云"], source_length=3, target_length=4
    )  # read: 山 [UNK] 有; scored: 庙 上 [UNK] 上, the text "庙 上水 上"
    assert (score.read, score.unknown) == (7, 2)
    assert score.unknown_share == 2 / 7
    assert (score.tokens, score.characters) == (4, 6)


@torch.inference_mode()
def test_the_loss_is_taken_in_fp32_whatever_the_model_s_dtype(
    tiny_model: Plug, tiny_tokenizer: PlugTokenizer
) -> None:
    lengths = {"source_length": SOURCE, "target_length": TARGET}
    wide = evaluate_language_model(tiny_model, tiny_tokenizer, DOCUMENTS, **lengths)
    narrow = evaluate_language_model(tiny_model.bfloat16(), tiny_tokenizer, DOCUMENTS, **lengths)
    assert narrow.nats != wide.nats
    assert narrow.nats_per_token == pytest.approx(wide.nats_per_token, rel=0.02)


def test_lengths_that_nobody_gave_fit_the_model(
    tiny_model: Plug, tiny_tokenizer: PlugTokenizer
) -> None:
    text = ["今天天气很好，我们去公园看花。" * 20]
    assert default_lengths(PRESETS["mini"]) == (128, 128)
    assert default_lengths(tiny_model.config) == (48, 48)

    score = evaluate_language_model(tiny_model, tiny_tokenizer, text)

    assert score.tokens == 48


def test_documents_all_too_short_are_an_error_that_counts_them(
    tiny_model: Plug, tiny_tokenizer: PlugTokenizer
) -> None:
    with pytest.raises(UsageError, match="2 篇文档都不超过 40 个词元"):
        evaluate_language_model(
            tiny_model,
            tiny_tokenizer,
            ["今天很好。", "去看花。"],
            source_length=40,
            target_length=9,
        )


@pytest.mark.parametrize(
    ("lengths", "named"),
    [
        ({"source_length": 0}, "source_length=0"),
        ({"source_length": 95}, "source_length=95 应在 1…94"),
        ({"source_length": 9, "target_length": 0}, "target_length=0"),
        ({"source_length": 9, "target_length": 97}, "target_length=97 应在 1…96"),
        ({"source_length": 9, "target_length": 9, "batch_size": 0}, "batch_size=0"),
    ],
)
def test_a_length_out_of_range_is_refused_by_name(
    tiny_model: Plug, tiny_tokenizer: PlugTokenizer, lengths: dict[str, int], named: str
) -> None:
    with pytest.raises(UsageError, match=named):
        evaluate_language_model(tiny_model, tiny_tokenizer, DOCUMENTS, **lengths)


def test_the_longest_lengths_a_model_has_positions_for_are_scored(
    tiny_model: Plug, tiny_tokenizer: PlugTokenizer
) -> None:
    text = "今天很好，我们去看花。" * 30
    score = evaluate_language_model(
        tiny_model, tiny_tokenizer, [text], source_length=94, target_length=96
    )
    assert score.tokens == 96


def test_an_encoder_alone_and_a_foreign_vocabulary_are_refused(
    tiny_tokenizer: PlugTokenizer, config: PlugConfig
) -> None:
    encoder_alone = Plug(dataclasses.replace(config, num_decoder_layers=0))
    smaller = Plug(dataclasses.replace(config, vocab_size=300, num_emitted_tokens=300))
    for model, complaint in ((encoder_alone, "只有编码器"), (smaller, "320 个词元.*300")):
        with pytest.raises(UsageError, match=complaint):
            evaluate_language_model(
                model, tiny_tokenizer, DOCUMENTS, source_length=9, target_length=9
            )

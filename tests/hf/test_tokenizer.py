"""`AutoTokenizer` of a model directory against `PlugTokenizer`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import plug
from plug.loading.save import save
from plug.model.configuration import PlugConfig
from plug.model.plug import Plug
from plug.tokenization import PlugTokenizer

transformers = pytest.importorskip("transformers")

from transformers import (  # noqa: E402
    AutoTokenizer,
    pipeline,
)

PIECES = "[PAD] [UNK] [CLS] [SEP] [MASK] [ ] 春 天 来 了 吗 ？ s ##e ##p"


@pytest.fixture(params=["words", "bytes"])
def tokenizer(
    request: pytest.FixtureRequest, tmp_path: Path, byte_pieces: PlugTokenizer
) -> PlugTokenizer:
    """The original kind of vocabulary, and our own."""
    if request.param == "bytes":
        return byte_pieces
    (tmp_path / "vocab.txt").write_text(PIECES.replace(" ", "\n"), encoding="utf-8")
    return PlugTokenizer.from_vocabulary_file(tmp_path / "vocab.txt")


@pytest.mark.parametrize("text", ["春天来了", "春[SEP]天", "[CLS][PAD]", ""])
def test_auto_tokenizer_gives_the_ids_of_ours_between_cls_and_sep(
    tokenizer: PlugTokenizer, text: str, plug_model: Plug, tmp_path: Path
) -> None:
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


def test_a_typed_mask_is_the_mask_here_and_text_in_ours(
    tokenizer: PlugTokenizer, plug_model: Plug, tmp_path: Path
) -> None:
    save(plug_model, tmp_path / "model", tokenizer=tokenizer)

    theirs = AutoTokenizer.from_pretrained(tmp_path / "model")
    theirs.save_pretrained(tmp_path / "again")

    around = [tokenizer.encode("春"), [tokenizer.mask_token_id], tokenizer.encode("天")]
    for each in (theirs, AutoTokenizer.from_pretrained(tmp_path / "again")):
        ids = each("春[MASK]天", add_special_tokens=False)["input_ids"]
        assert ids == [index for part in around for index in part]
        assert len(each) == tokenizer.vocab_size
    for folder in ("model", "again"):
        assert tokenizer.mask_token_id not in PlugTokenizer.load(tmp_path / folder).encode("[MASK]")


def test_truncation_cuts_to_what_the_model_reads(
    config: PlugConfig, make_model: Callable[[PlugConfig], Plug], tmp_path: Path,
    byte_pieces: PlugTokenizer,
) -> None:  # fmt: skip
    save(make_model(config), tmp_path / "ours", tokenizer=byte_pieces)
    original = dataclasses.replace(config, max_position_embeddings=600, encoder_final_norm_passes=2)
    save(make_model(original), tmp_path / "original", tokenizer=byte_pieces)

    lengths = []
    for name in ("ours", "original"):
        theirs = AutoTokenizer.from_pretrained(tmp_path / name)
        lengths.append(len(theirs("春" * 1000, truncation=True)["input_ids"]))
        assert theirs.model_max_length == lengths[-1]

    assert lengths == [96, 512]  # positions; what the original was trained to read
    byte_pieces.save(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).model_max_length > 10**9  # no model yet


def test_a_text_is_cut_into_characters_where_the_directory_says_so(
    tokenizer: PlugTokenizer, tmp_path: Path
) -> None:
    tokenizer.save(tmp_path, by_character=True)

    theirs = AutoTokenizer.from_pretrained(tmp_path)
    encoded = theirs("春天\n😀来", add_special_tokens=False, return_offsets_mapping=True)

    assert encoded["input_ids"] == tokenizer.encode_characters("春天\n😀来")
    assert all(end - start == 1 for start, end in encoded["offset_mapping"])
    assert PlugTokenizer.load(tmp_path).encode("春天来") == tokenizer.encode("春天来")


def test_the_fill_mask_pipeline_and_plug_fill_mask_agree() -> None:
    from plug.checkpoints.directory import find_model_directory

    directory = str(find_model_directory())
    text = "春[MASK]来了，花开了。"

    fill = pipeline("fill-mask", model=directory, tokenizer=directory, dtype=torch.float32)
    theirs = [(each["token_str"], each["score"]) for each in fill(text, top_k=3)]

    ours = plug.fill_mask(text, top_k=3)[0]
    assert [each[0] for each in theirs] == [each[0] for each in ours]
    assert [each[1] for each in theirs] == pytest.approx([each[1] for each in ours], abs=1e-4)

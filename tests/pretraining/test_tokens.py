"""Token ids on disk, against encoding the same documents by hand."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from pathlib import Path

import numpy as np
import pytest

from plug.errors import PlugError, UsageError
from plug.pretraining.corpus import read_documents, split_sentences
from plug.pretraining.tokens import read_tokens, write_tokens
from plug.tokenization import PlugTokenizer


def text_file(path: Path, documents: list[str]) -> Path:
    path.write_text("\n\n".join(documents), encoding="utf-8")
    return path


def test_ids_documents_and_sentences_are_those_of_encoding_by_hand(
    tiny_tokenizer: PlugTokenizer, tmp_path: Path
) -> None:
    news = ["今天天气很好。我们去公园看花！", "山上有座庙\n庙里有个老和尚。"]
    novels = ["天气。", "😀。今天。今天", "看花"]
    files = [
        text_file(tmp_path / "novels-00.txt", novels[:2]),
        text_file(tmp_path / "news.txt", news),
        text_file(tmp_path / "novels-01.txt", novels[2:]),
    ]
    counts = list(write_tokens(files, tiny_tokenizer, tmp_path / "out", heldout=0))

    domains = read_tokens(tmp_path / "out")
    assert [domain.name for domain in domains] == ["novels", "news"]
    for domain, documents, count in zip(domains, (novels, news), counts, strict=True):
        ids = [tiny_tokenizer.encode(document) for document in documents]
        assert domain.tokens.tolist() == list(chain.from_iterable(ids))
        assert domain.tokens.dtype == np.uint16
        assert domain.documents.tolist() == np.cumsum([0, *map(len, ids)]).tolist()
        pieces = [tiny_tokenizer.encode(s) for d in documents for s in split_sentences(d)]
        assert domain.sentences.tolist() == np.cumsum([0, *map(len, pieces)])[:-1].tolist()
        assert set(domain.documents[:-1].tolist()) <= set(domain.sentences.tolist())
        assert count.documents == len(documents)
        assert count.heldout_documents == 0
        assert not (tmp_path / "out" / "heldout" / f"{count.name}.txt").exists()
        assert count.characters == sum(map(len, documents))
        assert count.tokens == sum(map(len, ids))
        assert count.unknown_tokens == 0
    again = PlugTokenizer.load(tmp_path / "out")
    assert again.encode("今天天气") == tiny_tokenizer.encode("今天天气")


@pytest.mark.parametrize("share", [0.005, 0.01, 0.1, 0.25, 0.4, 0.7, 0.9])
def test_held_out_documents_are_that_share_and_not_in_training(
    share: float, tiny_tokenizer: PlugTokenizer, tmp_path: Path
) -> None:
    total = 2000
    documents = [f"第{number}篇。\n正文" for number in range(total)]
    file = text_file(tmp_path / "a.txt", documents)
    (counts,) = write_tokens([file], tiny_tokenizer, tmp_path / "out", heldout=share)

    kept = list(read_documents(tmp_path / "out" / "heldout" / "a.txt"))
    (domain,) = read_tokens(tmp_path / "out")
    trained = [
        tiny_tokenizer.decode(domain.tokens[begin:end].tolist())
        for begin, end in zip(domain.documents, domain.documents[1:], strict=False)
    ]
    assert len(kept) == counts.heldout_documents == round(share * total)
    assert counts.documents == len(trained) == total - len(kept)
    assert not set(kept) & set(trained)
    assert set(kept) | set(trained) == set(documents)
    held = sorted(documents.index(document) for document in kept)
    gaps = np.diff([-1, *held, total])
    assert gaps.max() <= 1 / share + 1  # evenly spaced
    if share == 0.005:  # which ones: a corpus encoded anew must hold out the same
        assert held == list(range(99, total, 200))


def test_a_share_of_documents_is_cut_by_character(
    tiny_tokenizer: PlugTokenizer, tmp_path: Path
) -> None:
    documents = ["今天天气。今天"] * 100
    file = text_file(tmp_path / "a.txt", documents)
    list(write_tokens([file], tiny_tokenizer, tmp_path / "out", heldout=0, character_share=0.2))
    (domain,) = read_tokens(tmp_path / "out")
    merged = len(tiny_tokenizer.encode(documents[0]))
    sizes = np.diff(domain.documents)
    assert (sizes == len(documents[0])).sum() == 20
    assert (sizes == merged).sum() == 80
    assert merged < len(documents[0])


def test_a_second_run_is_refused(corpus: Path, corpus_files: list[Path]) -> None:
    before = (corpus / "corpus.json").read_bytes()
    with pytest.raises(UsageError, match="已有编码好的语料"):
        list(write_tokens(corpus_files, PlugTokenizer.load(corpus), corpus))
    assert (corpus / "corpus.json").read_bytes() == before


def test_a_broken_file_leaves_an_unfinished_corpus_that_is_refused_and_can_be_redone(
    tiny_tokenizer: PlugTokenizer, tmp_path: Path
) -> None:
    good = text_file(tmp_path / "a.txt", ["今天"])
    bad = tmp_path / "b.txt"
    bad.write_bytes(b"\xff\xfe")
    with pytest.raises(PlugError, match=r"b\.txt"):
        list(write_tokens([good, bad], tiny_tokenizer, tmp_path / "out"))
    with pytest.raises(UsageError, match=r"缺 corpus\.json"):
        read_tokens(tmp_path / "out")
    list(write_tokens([good], tiny_tokenizer, tmp_path / "out"))
    assert [domain.name for domain in read_tokens(tmp_path / "out")] == ["a"]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-4])


@pytest.mark.parametrize(
    "harm",
    [
        lambda folder: (folder / "a.tokens.npy").unlink(),
        lambda folder: cut(folder / "a.tokens.npy"),
        lambda folder: cut(folder / "a.documents.npy"),
        lambda folder: (folder / "a.sentences.npy").write_bytes(b"no array"),
        lambda folder: np.save(folder / "a.tokens.npy", np.zeros(3, np.uint16)),
        lambda folder: (folder / "corpus.json").write_text("[{}]"),
        lambda folder: (folder / "corpus.json").write_text("{"),
    ],
)
def test_a_damaged_corpus_is_refused(
    harm: Callable[[Path], object], tiny_tokenizer: PlugTokenizer, tmp_path: Path
) -> None:
    file = text_file(tmp_path / "a.txt", ["今天天气很好。"] * 3)
    list(write_tokens([file], tiny_tokenizer, tmp_path / "out", heldout=0))
    harm(tmp_path / "out")
    with pytest.raises(UsageError, match="不完整"):
        read_tokens(tmp_path / "out")


@pytest.mark.parametrize("share", [-0.1, 1.0, float("nan")])
def test_shares_outside_their_range(
    share: float, tiny_tokenizer: PlugTokenizer, corpus_files: list[Path], tmp_path: Path
) -> None:
    for name in ("heldout", "character_share"):
        with pytest.raises(UsageError, match=name):
            list(write_tokens(corpus_files, tiny_tokenizer, tmp_path, **{name: share}))


def test_a_folder_that_cannot_be_written(
    tiny_tokenizer: PlugTokenizer, corpus_files: list[Path], tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(PlugError, match="没能写入"):
        list(write_tokens(corpus_files, tiny_tokenizer, tmp_path / "file" / "out"))


def test_a_full_disk_while_encoding_is_told_in_a_line(
    tiny_tokenizer: PlugTokenizer,
    corpus_files: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(PlugError, match=r"没能写入 .*No space left on device"):
        list(write_tokens(corpus_files, tiny_tokenizer, tmp_path / "out"))
    with pytest.raises(UsageError, match=r"缺 corpus\.json"):
        read_tokens(tmp_path / "out")


def test_a_run_killed_at_any_event_leaves_no_corpus_or_a_whole_one(
    tiny_tokenizer: PlugTokenizer, tmp_path: Path, kill: Callable[..., bool]
) -> None:
    """Held-out documents of a stopped run stayed beside those of the next one."""
    file = text_file(tmp_path / "a.txt", ["今天天气很好。"] * 20)
    whole = tmp_path / "whole"
    list(write_tokens([file], tiny_tokenizer, whole, heldout=0.1))
    number, alive = 0, False
    while not alive:
        number += 2
        out = tmp_path / str(number) / "corpus"
        alive = not kill(
            lambda out=out: list(write_tokens([file], tiny_tokenizer, out, heldout=0.1)), number
        )
        if not out.exists():
            list(write_tokens([file], tiny_tokenizer, out, heldout=0.1))
        for path in whole.rglob("*"):
            if path.is_file():
                assert (out / path.relative_to(whole)).read_bytes() == path.read_bytes()
        assert len(list(out.rglob("*"))) == len(list(whole.rglob("*")))
    assert number > 30


def test_a_folder_with_something_in_it_is_refused(
    tiny_tokenizer: PlugTokenizer, corpus_files: list[Path], tmp_path: Path
) -> None:
    (tmp_path / "heldout").mkdir()
    with pytest.raises(UsageError, match="已经存在"):
        list(write_tokens(corpus_files, tiny_tokenizer, tmp_path))

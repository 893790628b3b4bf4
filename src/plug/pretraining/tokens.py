"""Token ids on disk: `plug pretrain data` writes them, the objectives read them memory-mapped.

A folder holds, for each domain (see `corpus.domain_name`), the ids of all documents one after
another (`DOMAIN.tokens.npy`), where each document starts (`DOMAIN.documents.npy`, one entry more
than documents) and where each sentence starts (`DOMAIN.sentences.npy`); `corpus.json` with the
counts; the tokenizer; and in `heldout/` the text of the documents kept for evaluation.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from fractions import Fraction
from itertools import islice
from pathlib import Path

import numpy as np
import numpy.typing as npt

from plug.errors import UsageError
from plug.files import new_directory, refuse_used, write_json
from plug.pretraining.corpus import domain_name, read_documents, split_sentences
from plug.tokenization import PlugTokenizer

Ids = npt.NDArray[np.uint16]
Offsets = npt.NDArray[np.int64]

DOCUMENTS_AT_ONCE = 512
FINGERPRINT_BYTES = 2**16


@dataclass(frozen=True, slots=True)
class Domain:
    """One domain's documents as ids, and where documents and sentences start in them."""

    name: str
    tokens: Ids  # (tokens,)
    documents: Offsets  # (documents + 1,)
    sentences: Offsets  # (sentences,), sorted; every document start is one


@dataclass(frozen=True, slots=True)
class DomainCounts:
    name: str
    documents: int
    heldout_documents: int
    characters: int
    tokens: int
    unknown_tokens: int


def write_tokens(
    paths: Iterable[Path],
    tokenizer: PlugTokenizer,
    directory: Path,
    *,
    heldout: float = 0.005,
    character_share: float = 0.0,
) -> Iterator[DomainCounts]:
    """Encode a corpus into ``directory``, a domain at a time, and yield each domain's counts.

    The directory appears when all counts have been taken.

    Args:
        paths: corpus files.
        tokenizer: written beside the ids.
        directory: is not there yet, or empty.
        heldout: share of documents whose text goes to `heldout/DOMAIN.txt` instead, evenly
            spaced in each domain.
        character_share: share of documents that are encoded one piece a character. Labelling tasks
            read text so, while our own vocabulary merges characters otherwise.

    Raises:
        UsageError: the folder is in use, a share is outside [0, 1), or the
            vocabulary does not fit 16 bits.
        PlugError: a file of the corpus is broken, or the folder cannot be written.
    """
    for name, share in (("heldout", heldout), ("character_share", character_share)):
        if not 0 <= share < 1:
            raise UsageError(f"{name}={share} 应在 [0, 1) 之内。")
    if tokenizer.vocab_size > 2**16:
        raise UsageError(f"词表有 {tokenizer.vocab_size} 项，语料只支持 65536 项以内。")
    if (directory / "corpus.json").exists():
        raise UsageError(f"{directory} 已有编码好的语料。请换一个文件夹或先删去它。")
    refuse_used(directory)
    by_domain: dict[str, list[Path]] = {}
    for path in paths:
        by_domain.setdefault(domain_name(path), []).append(path)
    counts = []
    with new_directory(directory) as temporary:
        (temporary / "heldout").mkdir()
        tokenizer.save(temporary)
        for name, files in by_domain.items():
            counts.append(
                _write_domain(name, files, tokenizer, temporary, heldout, character_share)
            )
            yield counts[-1]
        write_json(temporary / "corpus.json", [asdict(one) for one in counts])


def _write_domain(
    name: str,
    files: list[Path],
    tokenizer: PlugTokenizer,
    directory: Path,
    heldout: float,
    character_share: float,
) -> DomainCounts:
    documents, sentences = [0], [0]
    heldout_documents = characters = unknown = total = 0
    seen = 0
    with ExitStack() as stack:
        raw_path = directory / f"{name}.tokens.raw"
        raw = stack.enter_context(raw_path.open("wb"))
        kept_path = directory / "heldout" / f"{name}.txt"
        kept = stack.enter_context(kept_path.open("w", encoding="utf-8"))
        stream = (document for path in files for document in read_documents(path))
        while batch := list(islice(stream, DOCUMENTS_AT_ONCE)):
            pieces: list[str] = []
            owners: list[int] = []  # the document, from 0, that each sentence belongs to
            number = len(documents) - 1
            for document in batch:
                seen += 1
                if _is_due(seen, heldout):
                    kept.write(document + "\n\n")
                    heldout_documents += 1
                    continue
                characters += len(document)
                cut = split_sentences(document)
                pieces += cut
                owners += [number] * len(cut)
                number += 1
            encoded = tokenizer.encode_batch(pieces)
            for index, (owner, ids) in enumerate(zip(owners, encoded, strict=True)):
                if _is_due(owner + 1, character_share):
                    ids = tokenizer.encode_characters(pieces[index])
                unknown += ids.count(tokenizer.unk_token_id)
                raw.write(np.asarray(ids, dtype=np.uint16).tobytes())
                total += len(ids)
                sentences.append(total)
                if index + 1 == len(owners) or owners[index + 1] != owner:
                    documents.append(total)
    if not heldout_documents:
        kept_path.unlink()  # `plug evaluate lm` refuses a file without documents
    np.save(directory / f"{name}.tokens.npy", np.fromfile(raw_path, dtype=np.uint16))
    raw_path.unlink()
    np.save(directory / f"{name}.documents.npy", np.asarray(documents, dtype=np.int64))
    np.save(directory / f"{name}.sentences.npy", np.asarray(sentences[:-1], dtype=np.int64))
    return DomainCounts(name, len(documents) - 1, heldout_documents, characters, total, unknown)


def _is_due(number: int, share: float) -> bool:
    """Return whether document ``number``, from 1, belongs to an evenly spaced ``share`` of all."""
    if not share:
        return False
    exact = Fraction(str(share))  # 0.005 is one in 200, never one in 200.000…01
    so_far, before = (math.floor(n * exact + Fraction(1, 2)) for n in (number, number - 1))
    return so_far > before


def read_tokens(directory: Path) -> list[Domain]:
    """Return the domains of a folder that `write_tokens` wrote, memory-mapped.

    Raises:
        UsageError: no corpus there, or one that was not finished.
    """
    listing = directory / "corpus.json"
    if not listing.is_file():
        raise UsageError(
            f"{directory} 里没有编码好的语料（缺 corpus.json）。请先运行 plug pretrain data。"
        )
    domains = []
    try:
        for entry in json.loads(listing.read_text(encoding="utf-8")):
            tokens, documents, sentences = (
                np.load(directory / f"{entry['name']}.{part}.npy", mmap_mode="r")
                for part in ("tokens", "documents", "sentences")
            )
            if len(tokens) != entry["tokens"] or documents[-1] != entry["tokens"]:
                raise ValueError(f"{entry['name']} 的词元数与 corpus.json 不符")
            domains.append(Domain(entry["name"], tokens, documents, sentences))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{directory} 里的语料不完整（{error}）。请重新编码语料。") from None
    return domains


def fingerprint(directory: Path) -> str:
    """Return what tells a corpus from another: a hash of its counts and of some of its ids.

    The first and the last `FINGERPRINT_BYTES` of each file are read, so that it takes no time.
    """
    digest = hashlib.sha256((directory / "corpus.json").read_bytes())
    for path in sorted(directory.glob("*.npy")):
        with path.open("rb") as file:
            digest.update(f"{path.name} {path.stat().st_size}".encode())
            digest.update(file.read(FINGERPRINT_BYTES))
            file.seek(max(0, path.stat().st_size - FINGERPRINT_BYTES))
            digest.update(file.read())
    return digest.hexdigest()

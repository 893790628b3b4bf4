"""Readers of checkpoints against damaged files, with an oracle that tells a wrong answer.

`python tests/faults/checkpoint_formats.py 2000` prints the table of docs/reliability.md; the suite
runs a few of each (`test_checkpoint_formats.py`). A damaged file may be refused with a sentence, or
read as what it says, which another reader confirms: safetensors' and PyTorch's own for tensors, a
strict JSON parser for settings.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from campaign import HANG, LOADED, REFUSED, TRACEBACK, WRONG, Counts, WrongAnswerError, campaign
from mutate import json_mutations, mutations, safetensors_mutations, zip_mutations

from plug.checkpoints.directory import check_tokenizer, load_tokenizer
from plug.checkpoints.original import OriginalReader, export_original
from plug.checkpoints.original_shards import open_shard
from plug.distributed.processes import Processes
from plug.loading.load import load
from plug.loading.save import save
from plug.model.configuration import PRESETS, PlugConfig
from plug.model.plug import Plug
from plug.pretraining.optimization import build_optimizers
from plug.pretraining.settings import RunConfig
from plug.pretraining.state import CHECKPOINT, STATE_FILE, State, read_saved
from plug.tokenization import BYTE_TOKENS, PlugTokenizer
from plug.tokenizer_files import SPECIAL_TOKENS

ALONE = Processes(0, 1, torch.device("cpu"))
Mutate = Callable[[bytes, int, int], Iterator[bytes]]
TEXT = "今天天气很好，我们去公园看花。ABC 12 [SEP]\n山上有座庙！"


class Format(NamedTuple):
    """A file, how it is damaged, and the reader that is tried with it (it gets the bytes)."""

    file: Path
    mutate: Mutate
    read: Callable[[bytes], None]


def formats(folder: Path) -> dict[str, Format]:
    """Every format of a checkpoint, on a tiny model that is written into ``folder``."""
    torch.manual_seed(0)
    model, tokenizer = Plug(PRESETS["test"]), _tokenizer()
    for name, size in (("one", 10**9), ("several", 60_000)):
        save(model, folder / name, tokenizer=tokenizer, max_shard_bytes=size)
    ids_of_bert = {"unk_token_id": 100, "mask_token_id": 103}
    ids_of_bert |= {"decoder_start_token_id": 101, "eos_token_id": 102}
    like_original = dataclasses.replace(PRESETS["test"], **ids_of_bert)
    save(Plug(like_original), folder / "ours", tokenizer=None)
    export_original(folder / "ours", folder / "original", 2)
    pieces = [f"字{index}" for index in range(320)]
    pieces[0], pieces[100:104] = "[PAD]", ["[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    lines = "".join(f"{piece}\n" for piece in pieces)
    (folder / "original" / "vocab.txt").write_text(lines, encoding="utf-8")
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ids = tokenizer.encode(TEXT)

    def faithful(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
        for name, tensor in found.items():
            if tensor.dtype != expected[name].dtype or not torch.equal(tensor, expected[name]):
                raise WrongAnswerError(f"{name} is not what the file says")

    def weights(content: bytes) -> None:
        found = load(folder / "one", dtype=None).state_dict()
        faithful(found, safetensors.torch.load(content))

    def index(_content: bytes) -> None:
        faithful(load(folder / "several").state_dict(), state)

    def config(content: bytes) -> None:
        found = load(folder / "one").config
        _check_config(content, found)

    def tokens(content: bytes) -> None:
        found = load_tokenizer(folder / "one")
        said = json.loads(content)["model"]
        if found.backend.get_vocab() != said["vocab"]:
            raise WrongAnswerError("the vocabulary is not what the file says")
        same = json.loads(files["tokenizer.json"])["model"]
        if said == same and found.encode(TEXT) != ids:
            raise WrongAnswerError("text is cut otherwise")

    def vocabulary(content: bytes) -> None:
        found = PlugTokenizer.load(folder / "original")
        check_tokenizer(found, like_original, "vocab.txt")
        pieces = content.decode().replace("\r\n", "\n").replace("\r", "\n").rstrip("\n").split("\n")
        if [found.backend.id_to_token(index) for index in range(len(pieces))] != pieces:
            raise WrongAnswerError("the vocabulary is not what the file says")

    shard = folder / "original" / "model" / "mp_rank_00_model_states.pt"

    def original(_content: bytes) -> None:
        for _ in OriginalReader(folder / "original").tensors():
            pass
        try:
            expected = torch.load(shard, weights_only=True, mmap=True)["module"]
        except Exception:  # torch refuses what we may read: objects beside the tensors
            expected = kept
        found = open_shard(shard).tensors
        same = {name: x for name, x in found.items() if name in expected}
        faithful({name: x.nan_to_num() for name, x in same.items()}, _no_nan(expected))

    trained = _trained(folder)
    undamaged = torch.load(trained, weights_only=True)

    def resumed(_content: bytes) -> None:
        state = _state()
        saved = read_saved(folder, 1, state.config, ALONE, "")
        if saved is None:
            raise WrongAnswerError("the run begins anew without a word")
        state.restore(saved)
        try:
            expected = torch.load(trained, weights_only=True)
        except Exception:  # for something that is not used here, such as a tensor's device
            expected = undamaged
        if (state.step, state.tokens) != (expected["step"], expected["tokens"]):
            raise WrongAnswerError("the step or the tokens are not what the file says")
        for index, moments in state.optimizers[0].state_dict()["state"].items():
            faithful(moments, expected["optimizers"][0]["state"][index])

    kept = {name: x.clone() for name, x in open_shard(shard).tensors.items()}
    single = folder / "one" / "model.safetensors"
    several = folder / "several" / "model.safetensors.index.json"
    found = {
        "model.safetensors": Format(single, safetensors_mutations, weights),
        "model.safetensors.index.json": Format(several, json_mutations, index),
        "config.json": Format(folder / "one/config.json", json_mutations, config),
        "tokenizer.json": Format(folder / "one/tokenizer.json", json_mutations, tokens),
        "vocab.txt": Format(folder / "original/vocab.txt", mutations, vocabulary),
        "mp_rank_00_model_states.pt": Format(shard, zip_mutations, original),
        "training_state.pt": Format(trained, zip_mutations, resumed),
    }
    files = {name: each.file.read_bytes() for name, each in found.items()}
    return found


def run(each: Format, seed: int, count: int) -> Counts:
    """Try ``count`` damaged copies in the file's place; the file is as it was afterwards."""
    intact = each.file.read_bytes()

    def read(content: bytes) -> None:
        each.file.unlink()  # mapped tensors of the last one stay
        each.file.write_bytes(content)
        each.read(content)

    try:
        return campaign(each.mutate(intact, seed, count), read)
    finally:
        each.file.write_bytes(intact)


def _check_config(content: bytes, found: PlugConfig) -> None:
    """The config is what the file says: each key once, each value with its type."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({key for key, _ in pairs}) < len(pairs):
            raise WrongAnswerError("a key stands twice")
        return dict(pairs)

    said = json.loads(content, object_pairs_hook=once)
    fields = found.to_dict()
    for name, value in fields.items():
        given = said.get(name, getattr(PlugConfig(), name))
        if repr(float(value)) != repr(float(given)) or isinstance(given, (bool, str)):
            raise WrongAnswerError(f"{name}={given!r} was read as {value!r}")
    if said.get("model_type", "plug") != "plug" or said.get("tie_word_embeddings") is False:
        raise WrongAnswerError("another architecture")


def _state() -> State:
    """A run that has just begun."""
    torch.manual_seed(0)
    model = Plug(PRESETS["test"])
    config = RunConfig(
        corpus="corpus",
        output="output",
        steps=9,
        shapes=[[32, 1.0]],
        batch_tokens=64,
        learning_rate=1e-3,
    )
    options: dict[str, Any] = {"name": "adamw", "learning_rate": 1e-3, "betas": (0.9, 0.999)}
    optimizers = build_optimizers(model, weight_decay=0.01, **options)
    return State(1, config, model, _tokenizer(), optimizers)


def _trained(folder: Path) -> Path:
    """The state of a run after 2 steps, written into ``folder``."""
    state = _state()
    for _ in range(2):
        sum(parameter.square().sum() for parameter in state.model.parameters()).backward()
        state.optimizers[0].step()
    state.step, state.tokens = 2, 128
    state.save(folder, ALONE)
    return folder / CHECKPOINT / STATE_FILE


def _no_nan(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.nan_to_num() for name, tensor in tensors.items()}


def _pieces() -> list[str]:
    pieces = [*SPECIAL_TOKENS.values(), *BYTE_TOKENS, *"今天气很好，我们去公园看花。山上有座庙\n"]
    pieces += ["今天", "天气"]
    return [piece.replace("\n", "换行") for piece in pieces] + [
        f"空{index}" for index in range(320 - len(pieces))
    ]


def _tokenizer() -> PlugTokenizer:
    merges = [("今", "天"), ("天", "气")]
    return PlugTokenizer.from_pieces({piece: i for i, piece in enumerate(_pieces())}, merges)


def main() -> None:
    """Print the table, and what must not be."""
    count = int(sys.argv[1])
    chosen = sys.argv[2:]
    outcomes = (LOADED, REFUSED, TRACEBACK, HANG, WRONG)
    print("| file | tries |", " | ".join(outcomes), "| seconds |")
    with tempfile.TemporaryDirectory() as folder:
        for name, each in formats(Path(folder)).items():
            if chosen and name not in chosen:
                continue
            began = time.perf_counter()
            counts = run(each, 1, count)
            seconds = time.perf_counter() - began
            row = " | ".join(str(counts[outcome]) for outcome in outcomes)
            print(f"| {name} | {count} | {row} | {seconds:.0f} |", flush=True)
            for number, told in counts.faults[:5]:
                print(f"--- {name} {number}: {told}", file=sys.stderr)


if __name__ == "__main__":
    main()

"""`plug convert` as typed: to the original's shards and back, byte for byte."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from safetensors.torch import load_file

ONLY_ONE = "--to-original 和 --to-modelscope 只能给一个"


def test_what_is_written_as_the_original_s_shards_comes_back(
    run_plug: Callable, model_directory: Path, tmp_path: Path
) -> None:
    shards, back = tmp_path / "shards", tmp_path / "back"

    ran = run_plug("convert", "--from", model_directory, "--to", shards, "--to-original", 2)
    assert (ran.status, f"已写入 {shards}" in ran.out) == (0, True)
    assert len(list((shards / "model").glob("mp_rank_*"))) == 2
    assert run_plug("convert", "--from", shards, "--to", back).status == 0

    [before], [after] = (list(each.glob("*.safetensors")) for each in (model_directory, back))
    ours, theirs = load_file(before), load_file(after)
    assert ours.keys() == theirs.keys()
    assert all(ours[name].equal(theirs[name]) for name in ours)


def test_wrong_use_says_what_to_do(
    run_plug: Callable, model_directory: Path, tmp_path: Path
) -> None:
    both = ("--to-original", 2, "--to-modelscope")
    ran = run_plug("convert", "--from", model_directory, "--to", tmp_path / "x", *both)
    assert (ran.status, ONLY_ONE in ran.err) == (2, True)

    ran = run_plug("convert", "--from", tmp_path / "nothing", "--to", tmp_path / "x")
    assert (ran.status, "nothing" in ran.err, ran.err.count("\n")) == (2, True, 1)

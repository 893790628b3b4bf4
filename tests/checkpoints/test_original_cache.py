"""An original's checkpoint is converted once, and again when either side has changed."""

from __future__ import annotations

import logging
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from plug.checkpoints.original import export_original
from plug.checkpoints.original_cache import RECORD_FILE, converted
from plug.checkpoints.weights import SINGLE_FILE
from plug.errors import PlugError, UsageError
from plug.loading.load import load
from plug.loading.save import save
from plug.model.plug import Plug

Contents = Callable[[Path], dict[str, bytes]]


class Conversions:
    """Counts them, and whatever `before` does comes first."""

    def __init__(self, before: Callable[[], object] = lambda: None) -> None:
        self.count = 0
        self.before = before

    @contextmanager
    def __call__(self) -> Iterator[Callable[[int, int], None]]:
        self.count += 1
        self.before()
        yield lambda _done, _total: None


@pytest.fixture
def original(tiny_model: Plug, tmp_path: Path) -> Path:
    save(tiny_model, tmp_path / "ours", tokenizer=None)
    export_original(tmp_path / "ours", tmp_path / "theirs" / "original", 2)
    return tmp_path / "theirs" / "original"


def test_it_is_converted_once_and_has_the_same_weights(original: Path, tiny_model: Plug) -> None:
    conversions = Conversions()
    first, second = converted(original, conversions), converted(original, conversions)

    assert first == second == original.with_name("original.plug")
    assert conversions.count == 1
    torch.testing.assert_close(load(first).state_dict(), tiny_model.state_dict())


def change_the_source(original: Path, _: Path) -> None:
    shard = original / "model" / "mp_rank_00_model_states.pt"
    os.utime(shard, ns=(0, shard.stat().st_mtime_ns + 1))


def cut_the_result(_: Path, result: Path) -> None:
    os.truncate(result / SINGLE_FILE, 100)


def lose_a_file(_: Path, result: Path) -> None:
    (result / SINGLE_FILE).unlink()


def break_the_record(_: Path, result: Path) -> None:
    (result / RECORD_FILE).write_text('{"format": 1')


@pytest.mark.parametrize(
    "change", [change_the_source, cut_the_result, lose_a_file, break_the_record]
)
def test_what_is_stale_or_damaged_is_made_anew(
    change: Callable[[Path, Path], None],
    original: Path,
    contents: Contents,
    caplog: pytest.LogCaptureFixture,
) -> None:
    conversions = Conversions()
    result = converted(original, conversions)
    before = contents(result)
    change(original, result)

    assert converted(original, conversions) == result
    assert conversions.count == 2
    assert "重新转换" in caplog.text
    after = contents(result)
    assert after.pop(RECORD_FILE) != b"" != before.pop(RECORD_FILE)
    assert after == before


def test_two_at_once_make_it_once(original: Path) -> None:
    waits = threading.Event()

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "另一个进程" in record.getMessage():
                waits.set()

    logger = logging.getLogger("plug.files")
    logger.addHandler(listener := Listener())
    conversions = Conversions(before=lambda: waits.wait(30))  # until the other one waits
    found: list[Path] = []
    threads = [
        threading.Thread(target=lambda: found.append(converted(original, conversions)))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    logger.removeHandler(listener)

    assert waits.is_set()
    assert found == [original.with_name("original.plug")] * 2
    assert conversions.count == 1


def test_what_a_killed_process_left_is_removed(original: Path) -> None:
    leftover = original.with_name(".original.plug.partial-123")
    leftover.mkdir()
    (leftover / "model.safetensors").touch()
    converted(original, Conversions())
    assert not leftover.exists()


def test_something_else_in_its_place_is_kept(original: Path) -> None:
    place = original.with_name("original.plug")
    place.mkdir()
    (place / "config.json").write_text("mine")
    with pytest.raises(UsageError, match=r"那里却有别的东西，不会覆盖.*plug convert"):
        converted(original, Conversions())
    assert (place / "config.json").read_text() == "mine"


def test_a_full_disk_leaves_nothing_and_names_the_place(
    original: Path, full_disk: Callable[[int], object]
) -> None:
    with full_disk(20_000), pytest.raises(PlugError, match=r"original\.plug.*磁盘空间"):
        converted(original, Conversions())
    assert not original.with_name("original.plug").exists()


def test_where_nothing_can_be_written_beside_it_the_users_cache_has_it(
    original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.access", lambda *_: False)  # root may write anywhere
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    conversions = Conversions()
    result = converted(original, conversions)
    assert result.parent == tmp_path / "cache" / "plug"
    assert converted(original, conversions) == result
    assert conversions.count == 1
    assert sorted(path.name for path in original.parent.iterdir()) == ["original"]


def test_a_conversion_killed_at_any_event_is_made_anew(
    original: Path, kill: Callable[..., bool], tiny_model: Plug
) -> None:
    """The record was written after the rest: killed between them, it was refused for ever."""
    number, alive = 0, False
    while not alive:
        number += 3  # of some 60 events
        alive = not kill(lambda: converted(original, Conversions()), number)
        result = converted(original, Conversions())
        torch.testing.assert_close(load(result).state_dict(), tiny_model.state_dict())
        left = {path.name for path in original.parent.iterdir()}
        assert {name for name in left if not name.endswith(".lock")} == {"original", result.name}
        shutil.rmtree(result)
    assert number > 20

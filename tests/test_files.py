"""Whatever stops a writer, there is the old content or the new; nobody writes beside another."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from plug import files
from plug.errors import PlugError, UsageError
from plug.files import BusyError

Contents = Callable[[Path], dict[str, bytes]]
Kill = Callable[[Callable[[], object], int], bool]
FullDisk = Callable[[int], AbstractContextManager[None]]


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A directory that may be replaced."""
    directory = tmp_path / "model"
    directory.mkdir()
    fill(directory, "old")
    return directory


def fill(directory: Path, text: str = "new") -> None:
    for name in ("weights", "config.json"):
        (directory / name).write_text(text)


def replace(directory: Path) -> None:
    with files.replace_directory(directory, "config.json") as temporary:
        fill(temporary)


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


# --- files -----------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform == "win32", reason="there it is a path like any other")
@pytest.mark.parametrize("path", ["D:\\模型\\news", "d:/模型/news"])
def test_a_path_of_windows_is_refused_elsewhere(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for write in (files.new_file, files.new_directory, files.hold):
        with (
            pytest.raises(UsageError, match=r"是 Windows 的路径.*应写 /mnt/d/模型/news"),
            write(path),
        ):
            pass
    assert names(tmp_path) == []
    assert files.about_windows_path("模型/d:") == ""


def test_a_file_is_replaced_and_nothing_else_is_left(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "a.txt"
    files.write_text(path, "一\r\n二\n")
    assert path.read_bytes() == "一\r\n二\n".encode()
    files.write_json(path, {"键": 1})
    assert json.loads(path.read_text(encoding="utf-8")) == {"键": 1}
    assert names(path.parent) == ["a.txt"]


def test_a_failing_block_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")

    def write() -> None:
        with files.new_file(path) as stream:
            stream.write("new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write()
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, full_disk: FullDisk) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with full_disk(1000), pytest.raises(PlugError, match=r"没能写入 .*a\.txt.*没有改动"):
        files.write_text(path, "x" * 2000)
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("adds", [False, True])
def test_an_error_in_a_new_directory_names_it_as_the_user_does(
    adds: bool, tmp_path: Path, full_disk: FullDisk
) -> None:
    target = tmp_path / "model"
    target.mkdir()
    place = files.add_files(target, last="b.txt") if adds else files.new_directory(target)
    message = re.escape(f"没能写入 {target / 'a.txt'}：")
    with full_disk(1000), pytest.raises(PlugError, match=message), place as temporary:
        files.write_text(temporary / "a.txt", "x" * 2000)
    assert names(target) == []


def test_a_link_stays_a_link_and_a_pipe_is_written_to(tmp_path: Path) -> None:
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to("real")
    files.write_text(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_text() == "new"

    os.mkfifo(tmp_path / "pipe")
    got: list[str] = []
    reader = threading.Thread(target=lambda: got.append((tmp_path / "pipe").read_text()))
    reader.start()
    files.write_text(tmp_path / "pipe", "through")
    reader.join()
    assert got == ["through"]
    assert (tmp_path / "pipe").is_fifo()

    with pytest.raises(UsageError, match="是一个目录"):
        files.write_text(tmp_path, "x")


def test_a_name_as_long_as_the_file_system_allows(tmp_path: Path) -> None:
    name = "长" * 85
    files.write_text(tmp_path / name, "x")
    with files.new_directory(tmp_path / f"{name[:-1]}二") as temporary:
        fill(temporary)
    assert len(names(tmp_path)) == 2


@pytest.mark.skipif(sys.platform == "win32", reason="other limits")
def test_a_name_longer_than_that_is_refused_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(PlugError, match=r"没能写入 .*请检查路径和权限"):
        files.refuse_used(tmp_path / ("长" * 86))


# --- directories -----------------------------------------------------------------------------


def test_a_new_directory_appears_whole(tmp_path: Path) -> None:
    with files.new_directory(tmp_path / "deep" / "new") as temporary:
        fill(temporary)
        assert not (tmp_path / "deep" / "new").exists()
    assert names(tmp_path / "deep") == ["new"]
    assert names(tmp_path / "deep" / "new") == ["config.json", "weights"]
    with pytest.raises(UsageError, match="已经存在"):
        files.new_directory(tmp_path / "deep" / "new").__enter__()


def test_what_came_meanwhile_is_kept(tmp_path: Path, old: Path) -> None:
    """Someone without our lock, such as a shell, may write the target while we fill ours."""

    def write(context: AbstractContextManager[Path], target: Path) -> None:
        with context as temporary:
            fill(temporary)
            target.mkdir(exist_ok=True)
            (target / "config.json").unlink(missing_ok=True)
            (target / "letter").write_text("mine")

    for target, context in (
        (tmp_path / "new", files.new_directory(tmp_path / "new")),
        (old, files.replace_directory(old, "config.json")),
    ):
        with pytest.raises(UsageError, match="不会覆盖"):
            write(context, target)
        assert (target / "letter").read_text() == "mine"
    assert names(tmp_path) == ["model", "new"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_a_failing_block_leaves_the_old_directory(
    error: type[BaseException], old: Path, contents: Contents
) -> None:
    before = contents(old.parent)

    def write() -> None:
        with files.replace_directory(old, "config.json") as temporary:
            fill(temporary)
            raise error

    with pytest.raises(error):
        write()
    assert contents(old.parent) == before


def test_a_failing_rename_leaves_the_old_directory(
    old: Path, contents: Contents, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(old.parent)
    rename = Path.rename

    def refuse_the_new(self: Path, target: Path) -> Path:
        if ".partial" in self.name:
            raise PermissionError(13, "Permission denied")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse_the_new)
    with pytest.raises(PlugError, match="Permission denied"):
        replace(old)
    assert contents(old.parent) == before


def test_files_are_added_to_a_directory_the_marker_last(
    old: Path, contents: Contents, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved: list[str] = []
    move = Path.replace

    def note(self: Path, target: Path) -> Path:
        moved.append(self.name)
        return move(self, target)

    monkeypatch.setattr(Path, "replace", note)
    with files.add_files(old, last="config.json") as temporary:
        fill(temporary)
        (temporary / "z").write_text("z")
    assert contents(old) == {"config.json": b"new", "weights": b"new", "z": b"z"}
    assert moved == ["weights", "z", "config.json"]


# --- kills -----------------------------------------------------------------------------------


def test_a_kill_at_any_event_leaves_the_old_file_or_the_new(tmp_path: Path, kill: Kill) -> None:
    path = tmp_path / "a.txt"
    number, alive = 0, False
    while not alive:
        number += 1
        path.write_text("old")
        alive = not kill(lambda: files.write_text(path, "new"), number)
        assert path.read_text() in ("old", "new")
        files.write_text(path, "again")
        assert names(tmp_path) == ["a.txt"]
    assert number > 5


@pytest.mark.parametrize("is_new", [False, True])
def test_a_kill_at_any_event_leaves_the_old_directory_or_the_new(
    is_new: bool, tmp_path: Path, kill: Kill, contents: Contents
) -> None:
    number, alive = 0, False
    while not alive:
        number += 1
        directory = tmp_path / str(number) / "model"
        directory.parent.mkdir()
        if not is_new:
            directory.mkdir()
            fill(directory, "old")
        alive = not kill(lambda path=directory: replace(path), number)
        files.recover(directory)
        found = set(contents(directory).values())
        assert found in ({b"new"}, {b"old"}, set())
        assert is_new or found
        replace(directory)
        assert contents(directory) == {"config.json": b"new", "weights": b"new"}
        assert names(directory.parent) == ["model"]
    assert number > 8


def test_a_kill_while_files_are_added_can_be_tried_again(
    tmp_path: Path, kill: Kill, contents: Contents
) -> None:
    def add() -> None:
        with files.hold(directory), files.add_files(directory, last="config.json") as temporary:
            fill(temporary)

    number, alive = 0, False
    while not alive:
        number += 1
        directory = tmp_path / str(number)
        alive = not kill(add, number)
        if (directory / "config.json").exists():
            assert (directory / "weights").read_text() == "new"
        add()
        assert contents(directory) == {"config.json": b"new", "weights": b"new"}
    assert number > 8


def test_leftovers_of_an_earlier_version_are_taken_up(old: Path) -> None:
    """The number of the process was in the name. Another container may have the same."""
    old.rename(old.with_name(f".model.old-{os.getpid()}"))
    partial = old.with_name(f".model.partial-{os.getpid()}")
    partial.mkdir()
    files.recover(old)
    assert (old / "weights").read_text() == "old"
    assert names(old.parent) == ["model"]


# --- two at once -----------------------------------------------------------------------------

HOLDER = """
import sys, time
from plug import files
with files.{function}(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("function", ["new_directory", "new_file", "hold"])
def test_the_second_is_told_who_the_first_is(function: str, tmp_path: Path) -> None:
    target = tmp_path / "target"
    command = [sys.executable, "-c", HOLDER.format(function=function), str(target)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "held\n"
        with pytest.raises(BusyError, match=rf"target 正由另一个进程写入（进程 {first.pid}，主机"):
            getattr(files, function)(target).__enter__()
        first.kill()
    with getattr(files, function)(target):
        pass
    assert [path.name for path in tmp_path.iterdir() if path.name != "target"] == []


def test_a_worker_of_a_killed_process_does_not_keep_its_lock(tmp_path: Path) -> None:
    code = """
import os, sys, time
from plug import files
with files.hold(sys.argv[1]):
    if os.fork() == 0:
        print(os.getpid(), flush=True)
        time.sleep(60)
    time.sleep(60)
"""
    command = [sys.executable, "-c", code, str(tmp_path / "run")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout is not None
        worker = int(first.stdout.readline())
        first.kill()
        first.wait()
        try:
            with files.hold(tmp_path / "run"):
                pass
        finally:
            os.kill(worker, 9)


def test_of_several_threads_one_makes_it_and_the_others_wait(tmp_path: Path) -> None:
    made: list[int] = []

    def make(number: int) -> None:
        with files.wait_for(tmp_path / "cache"):
            if not (tmp_path / "cache").exists():
                time.sleep(0.05)
                files.write_text(tmp_path / "cache", str(number))
                made.append(number)

    threads = [threading.Thread(target=make, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1
    assert names(tmp_path) == ["cache"]


def test_of_several_processes_with_one_target_one_succeeds(tmp_path: Path) -> None:
    code = """
import sys, time
from plug import files
from plug.errors import PlugError
time.sleep(max(0, float(sys.argv[2]) - time.time()))
try:
    with files.new_directory(sys.argv[1]) as temporary:
        (temporary / "who").write_text(sys.argv[3])
        time.sleep(0.02)
except PlugError:
    sys.exit(1)
"""
    start = str(time.time() + 1.5)
    running = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "new"), start, str(number)])
        for number in range(4)
    ]
    done = [process.wait() for process in running]
    assert sorted(done) == [0, 1, 1, 1]
    assert (tmp_path / "new" / "who").read_text() == str(done.index(0))
    assert names(tmp_path) == ["new"]


def test_a_held_directory_is_cleaned_and_goes_again_if_it_stays_empty(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with files.hold(run):
        assert not files.is_used(run)
        with pytest.raises(BusyError):
            files.hold(run).__enter__()
    assert not run.exists()
    run.mkdir()
    (run / ".log.csv.partial-0a").touch()
    assert not files.is_used(run)
    with files.hold(run):
        (run / "log.csv").touch()
    assert names(run) == ["log.csv"]

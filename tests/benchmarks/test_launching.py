"""Parts of a benchmark in processes of their own: what they answer, and that they end."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

psutil = pytest.importorskip("psutil")
sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

from launching import call, run_part  # noqa: E402

ANSWERS = "import sys; open(sys.argv[2], 'w').write('{\"speed\": 3}')"
# A process of another session, as torchrun starts them, which a signal to a group does not reach.
HANGS = """
import subprocess, sys, time
open(sys.argv[2], 'w').write('{"speed": 3}')
sleeps = [sys.executable, '-c', 'import time; time.sleep(99)']
child = subprocess.Popen(sleeps, start_new_session=True)
open(%r, 'w').write(str(child.pid))
time.sleep(99)
"""


def test_a_part_answers_by_its_output() -> None:
    found = run_part("answers", [sys.executable, "-c", ANSWERS], 30)

    assert found.pop("wall_s") < 30
    assert found == {"speed": 3}


def test_a_part_that_fails_says_so() -> None:
    found = run_part("fails", [sys.executable, "-c", "raise SystemExit(5)"], 30)

    assert found["error"] == "exit status 5"


def test_a_part_that_takes_too_long_is_ended_with_all_it_started(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    number = tmp_path / "pid"
    found = run_part("hangs", [sys.executable, "-c", HANGS % str(number)], 3)

    assert found["error"] == "not done after 3 s"
    assert found["speed"] == 3  # what it had written
    assert "Fatal Python error: Aborted" in capfd.readouterr().err  # where it hung
    deadline = time.monotonic() + 10
    while psutil.pid_exists(int(number.read_text())) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not psutil.pid_exists(int(number.read_text()))


def test_a_command_gives_its_output_or_raises() -> None:
    assert call([sys.executable, "-c", "print('春')"], 30, {}) == "春\n"
    with pytest.raises(RuntimeError, match="exit status 5"):
        call([sys.executable, "-c", "raise SystemExit(5)"], 30, {})
    with pytest.raises(RuntimeError, match="not done after 1 s"):
        call([sys.executable, "-c", "import time; time.sleep(99)"], 1, {})

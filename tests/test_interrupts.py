"""The first signal is noted, a second Ctrl-C ends at once, handlers are put back afterwards."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from plug.interrupts import Interrupted, Interrupts

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_is_noted_and_told(number: int, capfd: pytest.CaptureFixture[str]) -> None:
    before = [signal.getsignal(each) for each in SIGNALS]
    with Interrupts() as interrupts:
        assert interrupts.asked is None
        os.kill(os.getpid(), number)
        assert interrupts.asked == number
        os.kill(os.getpid(), signal.SIGTERM)  # a launcher may send both
        assert interrupts.asked == number
    assert "正在保存检查点" in capfd.readouterr().err
    assert before == [signal.getsignal(each) for each in SIGNALS]


def test_a_second_ctrl_c_ends_at_once() -> None:
    def press_twice() -> None:
        with Interrupts():
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        press_twice()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_handlers_of_the_program_stay() -> None:
    noted: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: noted.append(number))
    try:
        with Interrupts() as interrupts:
            os.kill(os.getpid(), signal.SIGTERM)
        assert noted == [signal.SIGTERM]
        assert interrupts.asked is None
    finally:
        signal.signal(signal.SIGTERM, before)


def test_threads_set_no_handlers() -> None:
    def work() -> None:
        with Interrupts():
            found.append(signal.getsignal(signal.SIGINT))

    found: list[object] = []
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [signal.default_int_handler]


def test_exit_codes_are_those_of_shells() -> None:
    assert Interrupted("", signal.SIGINT).exit_code == 130
    assert Interrupted("", signal.SIGTERM).exit_code == 143

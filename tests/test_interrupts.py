"""The first signal is noted, a second Ctrl-C ends at once, handlers are put back afterwards."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from plug.interrupts import Interrupted, Interrupts
from plug.kernels.cpu.build import library

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


LOSES_ITS_FILE = """
import sys
import torch
from plug.interrupts import end_on_bus_errors
from plug.kernels.cpu.build import library
from plug.quantization.linear import QuantizedLinear
from plug.quantization.scheme import Scheme

end_on_bus_errors()
torch.set_num_threads(2)
path, reader = sys.argv[1:]
weight = torch.from_file(path, shared=True, size=2**24, dtype=torch.int8).view(2**12, 2**12)
with torch.inference_mode():
    if reader == "pytorch":
        read = weight.sum
    else:
        from plug.kernels.cpu.products import CpuProduct

        assert library() is not None
        product = CpuProduct(weight, None, torch.ones(2**12))
        read = lambda: product(torch.ones(1, 2**12))
    read()
    open(path, "r+b").truncate(8192)
    print("truncated", flush=True)
    read()
print("read on")
"""


@pytest.mark.skipif(not hasattr(signal, "SIGBUS"), reason="Windows has no SIGBUS")
@pytest.mark.parametrize("reader", ["pytorch", "kernels"])
def test_a_file_that_is_cut_while_it_is_mapped_ends_the_command_with_a_sentence(
    reader: str, tmp_path: Path
) -> None:
    if reader == "kernels" and library() is None:
        pytest.skip("needs a C++ compiler")
    path = tmp_path / "weights"
    path.write_bytes(bytes(2**24))

    command = [sys.executable, "-c", LOSES_ITS_FILE, str(path), reader]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)

    assert ran.stdout == "truncated\n"
    assert ran.returncode == 1
    assert set(ran.stderr.splitlines()) == {
        "读不到模型的文件了：它在使用中被截短或替换，或磁盘出错。请检查模型目录，然后重试。"
    }

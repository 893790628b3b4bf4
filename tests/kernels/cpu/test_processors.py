"""The products on every kind of processor that can be run here, Arm by an emulator."""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

from plug.kernels.cpu import build

pytestmark = pytest.mark.slow  # a build takes seconds

CHECK = Path(__file__).with_name("check_products.cpp")
IS_X86 = platform.machine() in ("x86_64", "AMD64")


def built(compiler: str, flags: list[str], target: Path) -> None:
    kernels = Path(build.__file__).parent
    options = ["-std=c++20", "-O2", "-ffp-contract=off", "-pthread", f"-I{kernels}", *flags]
    subprocess.run([compiler, *options, str(CHECK), "-o", str(target)], check=True)


def processor_has(*names: str) -> bool:
    info = Path("/proc/cpuinfo")
    return info.is_file() and set(names) <= set(info.read_text(encoding="utf-8").split())


@pytest.mark.parametrize(
    ("architecture", "needs", "instructions"),
    [
        ("x86-64", (), "0"),
        ("x86-64-v3", ("avx2", "fma"), "256"),
        ("alderlake", ("avx2", "fma", "avx_vnni"), "256"),
        ("icelake-server", ("avx512_vnni", "avx512bw", "avx512ifma", "avx512_vbmi2"), "512"),
        ("sapphirerapids", ("amx_int8", "amx_bf16", "avx512_fp16"), "512 and AMX"),
    ],
)
def test_products_on_x86(
    architecture: str, needs: tuple[str, ...], instructions: str, tmp_path: Path
) -> None:
    if not IS_X86 or shutil.which("g++") is None or not processor_has(*needs):
        pytest.skip(f"needs g++ and a processor with {needs}")
    built("g++", [f"-march={architecture}"], tmp_path / "check")

    found = subprocess.run([tmp_path / "check"], capture_output=True, text=True, check=False)

    assert (found.stdout, found.returncode) == (f"instructions {instructions}\n", 0)


@pytest.mark.parametrize(
    ("architecture", "instructions"), [("armv8.2-a+dotprod", 128), ("armv8-a", 0)]
)
def test_products_on_arm(architecture: str, instructions: int, tmp_path: Path) -> None:
    compiler, emulator = "aarch64-linux-gnu-g++", "qemu-aarch64"
    if shutil.which(compiler) is None or shutil.which(emulator) is None:
        pytest.skip("needs g++-aarch64-linux-gnu and qemu-user")
    built(compiler, [f"-march={architecture}", "-static"], tmp_path / "check")

    command = [emulator, "-cpu", "max", tmp_path / "check"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)

    assert (found.stdout, found.returncode) == (f"instructions {instructions}\n", 0)

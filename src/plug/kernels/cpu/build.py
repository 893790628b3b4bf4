"""The compiled library of this folder's C++: found in the user's cache, or built by a C++ compiler.

A build takes a few seconds, once for a version of plug-zh and a processor. Without a compiler there
is no library, and PyTorch's products serve in its place.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from plug.errors import PlugError
from plug.files import BusyError, new_file

logger = logging.getLogger(__name__)

_FOLDER = Path(__file__).parent
_SOURCES = ("step.cpp", "products.h", "adapters.h", "amx.h", "lanes.h", "functions.h", "pool.h")
_COMPILERS = ("c++", "g++", "clang++")
# Sums must not be contracted differently in tiles of one row and of four: equal rows, equal bits.
_FLAGS = ("-std=c++20", "-O3", "-ffp-contract=off", "-fPIC", "-shared", "-pthread")
_BUILD_SECONDS = 120
# Runs in a process of its own: an instruction that the processor lacks ends a process.
_CHECK = "import ctypes, sys; sys.exit(ctypes.CDLL(sys.argv[1]).plug_self_test())"


@cache
def library() -> ctypes.CDLL | None:
    """The library; None where it cannot be built, which is said once, with the reason."""
    if sys.platform == "win32":
        return None
    target = library_file()
    if not target.is_file():
        compiler = os.environ.get("CXX") or next(filter(shutil.which, _COMPILERS), None)
        if compiler is None:
            logger.info(
                "没有找到 C++ 编译器（c++、g++ 或 clang++），用 PyTorch 的乘法，量化模型会慢一些。"
                "装好编译器（如 apt install g++）后会自动编译。"
            )
            return None
        if way_out := _way_out(target):
            logger.warning(
                "编译好的矩阵乘法没有地方存（%s 不能写），用 PyTorch 的乘法，会慢一些。%s",
                target.parent,
                way_out,
            )
            return None
        logger.warning("首次使用：为这台机器的处理器编译矩阵乘法，几秒钟，只此一次。")
        try:
            _build_once([compiler, *_FLAGS, *_target()], target)
        except (OSError, PlugError) as error:
            logger.warning("没能编译（%s），用 PyTorch 的乘法，会慢一些。", error)
            return None
    try:
        return _declared(ctypes.CDLL(str(target)))
    except (OSError, AttributeError) as error:
        logger.warning("没能载入 %s（%s），用 PyTorch 的乘法。删去它就会重新编译。", target, error)
        return None


def instructions() -> str:
    """What the products use on this machine, for people."""
    found = library()
    if found is None:
        return "PyTorch 的乘法（没有 C++ 编译器，或没能编译）"
    names = {1024: "AMX、AVX-512 VNNI", 512: "AVX-512 VNNI", 256: "AVX2", 128: "Arm 点积"}
    return f"{names.get(found.plug_instructions(), '普通循环')}（为这台机器编译）"


def library_file() -> Path:
    """Where the library is kept: a name for each version of the sources and each processor."""
    content = hashlib.sha256("\n".join([*_FLAGS, *_target(), *_processor()]).encode())
    for name in _SOURCES:
        content.update((_FOLDER / name).read_bytes())
    own = os.environ.get("XDG_CACHE_HOME")
    folder = Path(own) if own else Path("~/.cache").expanduser()
    return folder / "plug" / f"cpu-{content.hexdigest()[:16]}.so"


def _way_out(target: Path) -> str:
    """What helps where the user's cache cannot be written, as in a container's home."""
    folder = next(each for each in target.parents if each.exists())
    return "" if os.access(folder, os.W_OK) else "请把环境变量 XDG_CACHE_HOME 设为能写的目录。"


def _target() -> list[str]:
    """Flags that name the processor: the one at hand, or the one in `PLUG_CPU_TARGET`."""
    name = os.environ.get("PLUG_CPU_TARGET", "native")
    if platform.machine() in ("arm64", "aarch64"):
        return [f"-mcpu={name}"]
    return [f"-march={name}", "-mprefer-vector-width=512"]


def _build_once(command: list[str], target: Path) -> None:
    """Build ``target``, or wait until the process that does has done so."""
    end = time.monotonic() + _BUILD_SECONDS
    while not target.is_file():
        try:
            return _build(command, target)
        except BusyError:
            if time.monotonic() > end:
                raise
            time.sleep(0.2)
    return None


def _build(command: list[str], target: Path) -> None:
    with new_file(target, "wb") as stream, tempfile.TemporaryDirectory() as folder:
        built = Path(folder) / target.name
        _run([*command, "-o", str(built), str(_FOLDER / _SOURCES[0])], command[0])
        _run([sys.executable, "-c", _CHECK, str(built)], "自检")
        stream.write(built.read_bytes())


def _run(command: list[str], name: str) -> None:
    try:
        run = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_BUILD_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise PlugError(f"{name} 没有成功：{error}") from error
    if run.returncode:
        reason = (run.stderr.strip() or f"退出码 {run.returncode}").splitlines()[0]
        if run.returncode == -getattr(signal, "SIGILL", 0):
            reason = "处理器没有其中的指令"
        raise PlugError(f"{name} 没有成功：{reason}")


def _processor() -> Iterator[str]:
    """What `-march=native` depends on."""
    yield platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        yield platform.processor()
        return
    yield from dict.fromkeys(x for x in lines if x.startswith(("model name", "flags", "Features")))


class Product(ctypes.Structure):
    """A weight as `products.h` has it. Tensors behind the pointers must be kept by the caller."""

    _fields_ = [
        ("bits", ctypes.c_int64),
        ("weight", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("center", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("out", ctypes.c_int64),
        ("inputs", ctypes.c_int64),
    ]


class Norm(ctypes.Structure):
    """Weight and bias of a layer norm, float32."""

    _fields_ = [("weight", ctypes.c_void_p), ("bias", ctypes.c_void_p)]


class Layer(ctypes.Structure):
    """A decoder layer and its caches, as `step.cpp` has it."""

    _fields_ = [
        ("self_norm", Norm),
        ("cross_norm", Norm),
        ("feed_forward_norm", Norm),
        ("query_key_value", Product * 3),
        ("out", Product),
        ("source_query", Product),
        ("source_out", Product),
        ("fc1", Product),
        ("fc2", Product),
        ("keys", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        ("source_keys", ctypes.c_void_p),
        ("source_values", ctypes.c_void_p),
    ]


class LowRank(ctypes.Structure):
    """What an adapter adds to a product: a (rank, in) and b (rank, out), float32."""

    _fields_ = [("a", ctypes.c_void_p), ("b", ctypes.c_void_p), ("rank", ctypes.c_int64)]


class Adapters(ctypes.Structure):
    """The adapters of a step, as `step.cpp` has them."""

    _fields_ = [
        ("parts", ctypes.POINTER(LowRank)),
        ("numbers", ctypes.c_void_p),
        ("count", ctypes.c_int64),
    ]


class Shape(ctypes.Structure):
    """Sizes of a step, as `step.cpp` has them."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("hidden", "heads", "head_dim")),
        *((name, ctypes.c_int64) for name in ("capacity", "source_capacity", "layers")),
        ("eps", ctypes.c_double),
    ]


def _declared(found: ctypes.CDLL) -> ctypes.CDLL:
    pointer, count = ctypes.c_void_p, ctypes.c_int64
    found.plug_multiply.argtypes = [ctypes.c_int, *[pointer] * 3, count, pointer]
    found.plug_step.argtypes = [ctypes.c_int, *[pointer] * 5, count, *[pointer] * 5]
    found.plug_multiply.restype = found.plug_step.restype = None
    return found

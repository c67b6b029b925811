"""The measuring client against the reference server, beside httpx and openai: lateness and CPU per chunk.

    python -m benchmarks.client

1, 8 and 32 streams at a time. Clients take turns in one run, each in its own process, so that their costs do not mix
and the machine's drift meets all of them. Every stream asks for 64 tokens, 20 ms apart; the content of each chunk is
the time it was sent.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from importlib.metadata import version
from typing import Any

from engines.client.load import measure
from engines.client.self_test import lateness_ms, reference_server, self_test
from engines.process.telemetry import Telemetry, interval
from engines.settings import Endpoint

CLIENTS = ("switchyard", "httpx", "openai")
STREAMS = (1, 8, 32)
TOKENS, TTFT_MS, ITL_MS = 64, 100, 20
LATENESS_P99_MS, CPU_US = 1.5, 50.0  # at 32 streams
BODY: dict[str, Any] = {"model": "reference-server", "messages": [{"role": "user", "content": "time"}]}

Lateness = list[float]


# --- one client, in its own process -------------------------------------------------------------------------------


def run_client(client: str, streams: int, base_url: str) -> dict[str, float]:
    """Lateness in ms, CPU in us per chunk of this whole process, and chunks seen, after a warm-up."""
    load = {"switchyard": _switchyard, "httpx": _httpx, "openai": _openai}[client]
    load(base_url, streams, 4)
    cpu_ns = time.process_time_ns()
    late = load(base_url, streams, TOKENS)
    cpu_ns = time.process_time_ns() - cpu_ns
    percent = statistics.quantiles(late, n=100, method="inclusive")
    return {"p50_ms": percent[49], "p99_ms": percent[98], "cpu_us": cpu_ns / 1e3 / len(late), "chunks": len(late)}


def _switchyard(base_url: str, streams: int, tokens: int) -> Lateness:
    endpoint = Endpoint(base_url=base_url, model_id="reference-server", engine="reference-server")
    records = measure(endpoint, [{**BODY, "max_tokens": tokens}] * streams, concurrency=streams)
    return [late for record in records for late in lateness_ms(record)]


def _httpx(base_url: str, streams: int, tokens: int) -> Lateness:
    import httpx

    async def one(client: httpx.AsyncClient) -> Lateness:
        late: Lateness = []
        body = {**BODY, "max_tokens": tokens, "stream": True}
        async with client.stream("POST", f"{base_url}/v1/chat/completions", json=body) as response:
            async for line in response.aiter_lines():
                now = time.monotonic_ns()
                if line.startswith("data: {"):
                    choices = json.loads(line[6:])["choices"]
                    stamp = choices[0]["delta"].get("content") if choices else None
                    late += [(now - int(stamp)) / 1e6] if stamp else []
        return late

    async def all_of_them() -> Lateness:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(timeout=60, limits=limits, trust_env=False) as client:
            return await _gathered(lambda: one(client), streams)

    return asyncio.run(all_of_them())


def _openai(base_url: str, streams: int, tokens: int) -> Lateness:
    import openai

    async def one(client: openai.AsyncOpenAI) -> Lateness:
        late: Lateness = []
        stream = await client.chat.completions.create(
            model="reference-server", messages=[{"role": "user", "content": "time"}], max_tokens=tokens, stream=True
        )
        async for chunk in stream:
            now = time.monotonic_ns()
            stamp = chunk.choices[0].delta.content if chunk.choices else None
            late += [(now - int(stamp)) / 1e6] if stamp else []
        return late

    async def all_of_them() -> Lateness:
        async with openai.AsyncOpenAI(base_url=f"{base_url}/v1", api_key="none", max_retries=0) as client:
            return await _gathered(lambda: one(client), streams)

    return asyncio.run(all_of_them())


async def _gathered(one: Callable[[], Awaitable[Lateness]], streams: int) -> Lateness:
    return [late for each in await asyncio.gather(*(one() for _ in range(streams))) for late in each]


# --- the run ------------------------------------------------------------------------------------------------------


def in_child(client: str, streams: int, base_url: str) -> dict[str, Any]:
    """What `run_client` found in a process of its own, with the machine's load meanwhile."""
    telemetry = Telemetry(os.getpid())
    before = telemetry.snapshot()
    argv = [sys.executable, "-m", "benchmarks.client", "--client", client, "--streams", str(streams), "--url", base_url]
    done = subprocess.run(argv, capture_output=True, text=True, check=True)
    machine = interval(before, telemetry.snapshot())
    return {**json.loads(done.stdout), "client": client, "streams": streams, "machine": machine}


def collect(rounds: int) -> list[dict[str, Any]]:
    """Every client at every number of streams, `rounds` times, the clients taking turns in alternating order."""
    found = []
    with reference_server(ttft_ms=TTFT_MS, itl_ms=ITL_MS, tokens=TOKENS) as endpoint:
        for turn in range(rounds):
            for streams in STREAMS:
                for client in CLIENTS if turn % 2 == 0 else reversed(CLIENTS):
                    found.append(in_child(client, streams, endpoint.base_url))
    return found


def report(found: list[dict[str, Any]]) -> None:
    """Prints the medians over rounds and their ratios to our client, then what was reached."""
    print(f"our client on uvloop {version('uvloop')}; {TOKENS} tokens, {ITL_MS} ms apart; medians of rounds\n")
    columns = f"{'late p50 ms':>12}{'late p99 ms':>12}{'CPU us/chunk':>14}{'ratio p99':>11}{'ratio CPU':>11}"
    print(f"{'streams':>7}  {'client':<11}{columns}")
    for streams in STREAMS:
        ours = median_of(found, "switchyard", streams)
        for client in CLIENTS:
            row = median_of(found, client, streams)
            print(
                f"{streams:>7}  {client:<11}{row['p50_ms']:>12.3f}{row['p99_ms']:>12.3f}{row['cpu_us']:>14.1f}"
                f"{row['p99_ms'] / ours['p99_ms']:>11.2f}{row['cpu_us'] / ours['cpu_us']:>11.2f}"
            )
    print()
    print_reach(found)


def median_of(found: list[dict[str, Any]], client: str, streams: int) -> dict[str, float]:
    """Each number's median over the rounds of one client at one number of streams."""
    rows = [row for row in found if row["client"] == client and row["streams"] == streams]
    return {name: statistics.median(row[name] for row in rows) for name in ("p50_ms", "p99_ms", "cpu_us")}


def print_reach(found: list[dict[str, Any]]) -> None:
    """What was to be reached, whether it was, and under which load."""
    most = max(STREAMS)
    ours = median_of(found, "switchyard", most)
    rows = [row for row in found if row["client"] == "switchyard" and row["streams"] == most]
    late, cpu, budget = ours["p99_ms"], ours["cpu_us"], self_test()
    mark(late < LATENESS_P99_MS, f"lateness p99 at {most} streams: {late:.2f} ms (reach < {LATENESS_P99_MS} ms)")
    mark(cpu < CPU_US, f"CPU per chunk at {most} streams: {cpu:.1f} us (reach < {CPU_US:g} us)")
    mark(budget["passed"], f"self-test: {budget['why']} ({json.dumps(budget)})")
    for row in rows:
        print(f"one round: p99 {row['p99_ms']:.2f} ms, CPU {row['cpu_us']:.1f} us, others took {foreign([row])}")
    print(f"machine: {os.cpu_count()} CPUs, load average {os.getloadavg()[0]:.2f}")
    print(f"CPU taken by others, whole run: {foreign(found)}")


def mark(reached: bool, what: str) -> None:
    """Prints one number with whether it was reached."""
    print(f"{'reached    ' if reached else 'not reached'}  {what}")


def foreign(rows: list[dict[str, Any]]) -> str:
    """The machine's foreign CPU share in `rows`: median and largest; 'not measured' where there is nothing."""
    known = [share for row in rows if (share := row["machine"]["foreign_cpu_fraction"]) is not None]
    return f"median {100 * statistics.median(known):.0f}%, most {100 * max(known):.0f}%" if known else "not measured"


def main() -> None:
    """Runs the whole comparison, or one client when called by it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--client", choices=CLIENTS, help=argparse.SUPPRESS)
    parser.add_argument("--streams", type=int, default=1, help=argparse.SUPPRESS)
    parser.add_argument("--url", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.client:
        print(json.dumps(run_client(chosen.client, chosen.streams, chosen.url)))
    else:
        report(collect(chosen.rounds))


if __name__ == "__main__":
    main()

"""What a proxy adds on this machine: direct against through it, in turns, over a server whose timing is known."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import httpx
import psutil

from engines.client.load import measure
from engines.client.record import StreamRecord
from engines.errors import EngineError
from engines.openai.paths import CHAT
from engines.settings import Endpoint
from tasks.verdicts.statistics import percentile, t_quantile

TTFT_MS, ITL_MS, TOKENS = 50.0, 20.0, 32  # of the reference server's streams
STREAMS = {1: 4, 8: 16}  # at a time, and requests of each in a round
CALLS = 100  # without a stream, one after the other
CALL, CALL_S = "call", 60.0


class Way(NamedTuple):
    """Where a way begins, and the process that does its work; None where there is nothing between."""

    endpoint: Endpoint
    pid: int | None


class Taken(NamedTuple):
    """One load over one way: medians in ms, CPU of the proxy in us, and the share of gaps over twice the interval."""

    ms: float
    cpu_us: float
    late: float


def measure_proxy_cost(
    ways: Mapping[str, Way], *, rounds: int, seed: int = 0, progress: Callable[[str], None] = lambda _: None
) -> dict[str, Any]:
    """`streams` by their number and `calls`, each with both ways' medians over all rounds and the difference.

    `ways` are `direct` and `through`. They take turns in random order within a round; a difference is that of one
    round's medians, with 95% bounds on their mean. Raises EngineError where a request fails.
    """
    dice = random.Random(seed)
    found: dict[str, dict[str, list[Taken]]] = {str(what): {way: [] for way in ways} for what in (*STREAMS, CALL)}
    for way in ways.values():
        _load(way, [_body(stream=True, max_tokens=2)] * max(STREAMS), concurrency=max(STREAMS))  # connections, imports
    for number in range(rounds):
        for what, taken in found.items():
            for name in dice.sample(sorted(ways), len(ways)):
                taken[name].append(_calls(ways[name]) if what == CALL else _streams(ways[name], int(what)))
        progress(f"round {number + 1} of {rounds}")
    return {
        "rounds": rounds,
        "streams": {what: compared(taken) for what, taken in found.items() if what != CALL},
        "calls": compared(found[CALL]),
    }


def _streams(way: Way, streams: int) -> Taken:
    """Time to the first token. The first request of each stream is left out: they begin all at once."""
    bodies = [_body(stream=True, max_tokens=TOKENS)] * STREAMS[streams]
    records, cpu_s = _load(way, bodies, concurrency=streams)
    timed = records[streams:] if streams > 1 else records
    gaps = [gap for record in records for gap in record.icl_ms]
    chunks = sum(len(record.output_events) for record in records)
    late = sum(gap > 2 * ITL_MS for gap in gaps) / len(gaps)
    return Taken(statistics.median(record.measured("ttft_ms") for record in timed), 1e6 * cpu_s / chunks, late)


def _calls(way: Way) -> Taken:
    """The time of a whole call, which the server answers at once: all of it is overhead."""
    times_ms, body = [], _body(model=way.endpoint.model_id, max_tokens=1)
    with httpx.Client(base_url=way.endpoint.base_url, timeout=CALL_S, trust_env=False, verify=False) as http:
        before = _cpu_s(way.pid)
        for _ in range(CALLS):
            began = time.perf_counter()
            try:
                http.post(CHAT, json=body).raise_for_status()
            except httpx.HTTPError as error:
                raise EngineError(f"a request to {way.endpoint.base_url} failed: {error}") from error
            times_ms.append(1000 * (time.perf_counter() - began))
    return Taken(statistics.median(times_ms), 1e6 * (_cpu_s(way.pid) - before) / CALLS, 0.0)


def _load(way: Way, bodies: Sequence[dict[str, Any]], *, concurrency: int) -> tuple[list[StreamRecord], float]:
    before = _cpu_s(way.pid)
    records = measure(way.endpoint, bodies, concurrency=concurrency)
    cpu_s = _cpu_s(way.pid) - before
    if failed := next((record for record in records if not record.ok), None):
        raise EngineError(f"a request to {way.endpoint.base_url} failed: {failed.error}")
    return records, cpu_s


def _cpu_s(pid: int | None) -> float:
    if pid is None:
        return 0.0
    spent = psutil.Process(pid).cpu_times()
    return float(spent.user + spent.system)


def _body(**more: object) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "time"}], "temperature": 0, **more}


def compared(taken: Mapping[str, Sequence[Taken]]) -> dict[str, Any]:
    """Medians of both ways over the rounds, and the mean of what a round's differ by, with its 95% bounds."""
    added = [there.ms - here.ms for here, there in zip(taken["direct"], taken["through"], strict=True)]
    spread = t_quantile(0.975, len(added) - 1) * statistics.stdev(added) / len(added) ** 0.5
    mean = statistics.fmean(added)
    return {
        "direct_ms": percentile([one.ms for one in taken["direct"]], 0.5),
        "through_ms": percentile([one.ms for one in taken["through"]], 0.5),
        "added_ms": mean,
        "added_low_ms": mean - spread,
        "added_high_ms": mean + spread,
        "cpu_us": statistics.fmean(one.cpu_us for one in taken["through"]),
        "late_direct": statistics.fmean(one.late for one in taken["direct"]),
        "late_through": statistics.fmean(one.late for one in taken["through"]),
    }

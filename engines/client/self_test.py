"""The measuring client's error budget on this machine: lateness, TPOT and CPU against a server of known timing."""

from __future__ import annotations

import contextlib
import os
import queue
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import TypedDict

from engines.client.load import measure
from engines.client.record import StreamRecord
from engines.client.reference_server import MODEL, STAMP_DIGITS
from engines.environment import of_child
from engines.errors import EngineExited, EngineStalled
from engines.settings import Endpoint
from engines.units import figure, number_of

START_S = 20.0


class ErrorBudget(TypedDict):
    """What the client itself adds to a measurement. Times in ms; None where nothing was measured.

    `ttft_error` is the client's TTFT minus the server's (request arrived to first chunk): connecting, sending and the
    lateness of the first chunk. `client_cpu_share` is of one core.
    """

    streams: int
    n_chunks: int
    n_requests: int
    n_failed: int
    lateness_p50_ms: float | None
    lateness_p99_ms: float | None
    ttft_error_p50_ms: float | None
    ttft_error_p99_ms: float | None
    tpot_error_percent: float | None
    cpu_us_per_chunk: float | None
    client_cpu_share: float | None
    passed: bool
    why: str


@contextlib.contextmanager
def reference_server(*, ttft_ms: float = 50, itl_ms: float = 10, tokens: int = 32) -> Iterator[Endpoint]:
    """The endpoint of a reference server while the context lasts. Raises EngineExited, EngineStalled."""
    flags = (f"--ttft-ms={ttft_ms}", f"--itl-ms={itl_ms}", f"--tokens={tokens}")
    argv = [sys.executable, "-m", "engines.client.reference_server", *flags]
    pipe = subprocess.PIPE
    with subprocess.Popen(argv, stdin=pipe, stdout=pipe, stderr=pipe, env=of_child(os.environ)) as child:
        try:
            base_url = f"http://127.0.0.1:{_port_of(child)}"
            yield Endpoint(base_url=base_url, model_id=MODEL, engine=MODEL)
        finally:
            child.kill()  # it holds nothing that needs an orderly end


def _port_of(child: subprocess.Popen[bytes]) -> int:
    assert child.stdout is not None
    assert child.stderr is not None
    lines: queue.Queue[bytes] = queue.Queue()
    read_line = child.stdout.readline
    threading.Thread(target=lambda: lines.put(read_line()), daemon=True).start()
    try:
        line = lines.get(timeout=START_S)
    except queue.Empty as late:
        raise EngineStalled(f"the reference server did not start in {START_S:g} s", stalled_s=START_S) from late
    if not line.startswith(b"listening "):
        tail = tuple(child.stderr.read().decode(errors="replace").splitlines()[-5:])
        status = child.wait()
        why = f"the reference server exited with {status}: {tail[-1] if tail else 'no output'}"
        raise EngineExited(why, returncode=status, engine=MODEL, log_tail=tail)
    return int(line.split()[1])


def lateness_ms(record: StreamRecord) -> list[float]:
    """Receive minus send of each content chunk of a reference server's stream; needs the record's text."""
    text = record.text or ""
    stamps = [int(text[start : start + STAMP_DIGITS]) for start in range(0, len(text), STAMP_DIGITS)]
    return [
        (record.sent_ns + event.t_ns - stamp) / 1e6 for event, stamp in zip(record.output_events, stamps, strict=True)
    ]


def self_test(
    *,
    streams: int = 4,
    rounds: int = 4,
    ttft_ms: float = 50,
    itl_ms: float = 10,
    tokens: int = 32,
    max_lateness_p99_ms: float = 3.0,
    max_tpot_error_percent: float = 1.0,
    max_cpu_share: float = 0.5,
) -> ErrorBudget:
    """The client's error budget on this machine; takes 2-3 s with the defaults.

    `streams` requests at a time, `rounds` times, after one round of warm-up. The `max_*` are its tolerances: 3 ms of
    lateness are a third of a 10% margin on a TTFT of 90 ms; past half a core the client disturbs the engine.
    """
    body = {"messages": [{"role": "user", "content": "time"}]}
    with reference_server(ttft_ms=ttft_ms, itl_ms=itl_ms, tokens=tokens) as endpoint:
        measure(endpoint, [body] * streams, concurrency=streams, stall_s=START_S)
        wall_ns, cpu_ns = time.monotonic_ns(), time.thread_time_ns()
        records = measure(endpoint, [body] * (streams * rounds), concurrency=streams, stall_s=START_S)
        cpu_ns, wall_ns = time.thread_time_ns() - cpu_ns, time.monotonic_ns() - wall_ns
    good = [record for record in records if record.ok]
    late = [value for record in good for value in lateness_ms(record)]
    timed = [(record, record.engine_timings) for record in good if record.engine_timings]
    ttft = [record.ttft_ms - truth["prompt_ms"] for record, truth in timed]
    tpot = [abs(record.decode_ms / truth["predicted_ms"] - 1) for record, truth in timed if truth["predicted_ms"] > 0]
    budget = ErrorBudget(
        streams=streams,
        n_chunks=len(late),
        n_requests=len(records),
        n_failed=len(records) - len(good),
        lateness_p50_ms=_quantile(late, 0.5),
        lateness_p99_ms=_quantile(late, 0.99),
        ttft_error_p50_ms=_quantile(ttft, 0.5),
        ttft_error_p99_ms=_quantile(ttft, 0.99),
        tpot_error_percent=100 * max(tpot) if tpot else None,
        cpu_us_per_chunk=cpu_ns / 1e3 / len(late) if late else None,
        client_cpu_share=cpu_ns / wall_ns if wall_ns else None,
        passed=False,
        why="",
    )
    why = "; ".join(_objections(budget, max_lateness_p99_ms, max_tpot_error_percent, max_cpu_share))
    return {**budget, "passed": not why, "why": why or "the client stamps every chunk in time"}


def _objections(budget: ErrorBudget, lateness_ms: float, tpot_percent: float, cpu_share: float) -> Iterator[str]:
    if budget["n_failed"]:
        yield f"{budget['n_failed']} of {number_of(budget['n_requests'], 'stream')} failed"
    limits = {
        "lateness p99": (budget["lateness_p99_ms"], lateness_ms, "ms"),
        "largest TPOT error": (budget["tpot_error_percent"], tpot_percent, "%"),
        "CPU of the client": (budget["client_cpu_share"], cpu_share, "of a core"),
    }
    for name, (value, limit, unit) in limits.items():
        if value is None:
            yield f"{name} was not measured"
        elif value > limit:
            yield f"{name} is {figure(value, limit)} {unit}, {figure(limit)} allowed"


def _quantile(values: list[float], share: float) -> float | None:
    """The `share` quantile by linear interpolation; None without values."""
    if len(values) < 2:
        return values[0] if values else None
    return statistics.quantiles(values, n=1000, method="inclusive")[round(share * 1000) - 1]

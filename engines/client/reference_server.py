"""A server whose timing is known exactly, and the self-test of the measuring client against it.

    python -m engines.client.reference_server --port 0 --ttft-ms 50 --itl-ms 10 --tokens 32

prints `listening PORT` and streams chunks shaped like llama.cpp's. The content of every chunk is the monotonic time,
in ns, at which it was handed to the kernel; client and server share that clock on one host, so receive minus send is
the client's lateness, with nothing estimated. A request that asks for no stream is answered at once: what a call takes
then is all its way. It ends when its stdin closes: so it dies with its parent, even when that one is killed; with
`--forever` somebody else ends it.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import queue
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, TypedDict

if TYPE_CHECKING:
    from engines.client.client import StreamRecord
    from engines.settings import Endpoint

CHUNK_BYTES = 278  # of a llama.cpp content chunk
STAMP_DIGITS = 20
START_S = 20.0


class ErrorBudget(TypedDict):
    """What the client adds to the truth on this machine, now. Times in ms; None where nothing was measured.

    `ttft_error` is the client's TTFT minus the server's (its first chunk minus the arrival of the request): it holds
    connecting, sending and the lateness of the first chunk. `client_cpu_share` is of one core.
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


# --- the server ---------------------------------------------------------------------------------------------------


class _Connection(asyncio.Protocol):
    """One HTTP/1.1 connection; a timer per chunk on an absolute schedule, no task."""

    def __init__(self, ttft_s: float, itl_s: float, tokens: int) -> None:
        self._ttft_s, self._itl_s, self._default_tokens = ttft_s, itl_s, tokens
        self._received = b""
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        if self._timer:
            self._timer.cancel()

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, blank, body = self._received.partition(b"\r\n\r\n")
        if not blank or len(body) < _content_length(head):
            return
        self._arrived_ns, self._received = time.monotonic_ns(), b""
        if head.startswith(b"GET /health "):
            return self._answer({"status": "ok"})
        if head.startswith(b"GET /v1/models "):
            return self._answer({"object": "list", "data": [{"id": "known-truth", "object": "model"}]})
        if not head.startswith(b"POST /v1/chat/completions "):
            return self._refuse(404, "only POST /v1/chat/completions is served")
        try:
            request = json.loads(body)
            self._tokens = int(request.get("max_tokens") or self._default_tokens)
        except (ValueError, AttributeError):
            return self._refuse(400, "the body is no JSON object")
        if request.get("stream"):
            self._start()
        else:
            self._answer(_completion(self._tokens))

    def _answer(self, fields: dict[str, object]) -> None:
        self._transport.write(_whole("200 OK", fields))

    def _refuse(self, status: int, message: str) -> None:
        error: dict[str, object] = {"code": status, "message": message, "type": "invalid_request_error"}
        self._transport.write(_whole(f"{status} Refused", {"error": error}, "Connection: close\r\n"))
        self._transport.close()

    def _start(self) -> None:
        loop = asyncio.get_running_loop()
        self._loop, self._first_at, self._sent, self._sent_ns = loop, loop.time() + self._ttft_s, 0, [0, 0]
        self._timer = loop.call_at(self._first_at, self._send_next)

    def _send_next(self) -> None:
        if self._sent == 0:
            # headers and role travel with the first token, as llama.cpp holds them back until prefill is over
            self._transport.write(_HEAD + _framed(_ROLE))
        now = time.monotonic_ns()
        self._transport.write(_BEFORE + b"%0*d" % (STAMP_DIGITS, now) + _AFTER)
        self._sent_ns[self._sent > 0] = now
        self._sent += 1
        if self._sent < self._tokens:
            self._timer = self._loop.call_at(self._first_at + self._sent * self._itl_s, self._send_next)
        else:
            self._finish()

    def _finish(self) -> None:
        first_ns, last_ns = self._sent_ns[0], max(self._sent_ns)
        timings = {
            "prompt_n": 1,
            "prompt_ms": (first_ns - self._arrived_ns) / 1e6,
            "predicted_n": self._tokens,
            "predicted_ms": (last_ns - first_ns) / 1e6,
        }
        usage = _usage(self._tokens)
        end = _framed(_event({"choices": [{"index": 0, "delta": {}, "finish_reason": "length"}]}))
        end += _framed(_event({"choices": [], "usage": usage, "timings": timings})) + _framed(b"data: [DONE]\n\n")
        self._transport.write(end + b"0\r\n\r\n")  # the connection stays open, as an engine's does


def _content_length(head: bytes) -> int:
    for line in head.split(b"\r\n"):
        name, _, value = line.partition(b":")
        if name.lower() == b"content-length":
            return int(value)
    return 0


def _usage(tokens: int) -> dict[str, int]:
    return {"prompt_tokens": 1, "completion_tokens": tokens, "total_tokens": 1 + tokens}


def _completion(tokens: int) -> dict[str, object]:
    message = {"role": "assistant", "content": f"{time.monotonic_ns():0{STAMP_DIGITS}d}"}
    choice = {"index": 0, "message": message, "finish_reason": "length"}
    common = {"id": "chatcmpl-known-truth", "object": "chat.completion", "created": 0, "model": "known-truth"}
    return {**common, "choices": [choice], "usage": _usage(tokens)}


def _whole(status: str, fields: dict[str, object], more_headers: str = "") -> bytes:
    body = json.dumps(fields).encode()
    head = f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n{more_headers}\r\n"
    return head.encode() + body


def _event(fields: dict[str, object]) -> bytes:
    common = {"id": "chatcmpl-known-truth", "object": "chat.completion.chunk", "created": 0, "model": "known-truth"}
    return b"data: " + json.dumps({**common, **fields}).encode() + b"\n\n"


def _framed(event: bytes) -> bytes:
    return b"%x\r\n" % len(event) + event + b"\r\n"


def _content_event() -> bytes:
    delta = {"index": 0, "finish_reason": None, "delta": {"content": "0" * STAMP_DIGITS}}
    bare = _event({"choices": [delta], "system_fingerprint": ""})
    return _event({"choices": [delta], "system_fingerprint": "x" * (CHUNK_BYTES - len(bare))})


_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
_ROLE = _event({"choices": [{"index": 0, "finish_reason": None, "delta": {"role": "assistant", "content": None}}]})
_BEFORE, _AFTER = _framed(_content_event()).split(b"0" * STAMP_DIGITS)


async def _serve(port: int, ttft_ms: float, itl_ms: float, tokens: int, *, forever: bool = False) -> None:
    # The plain loop on purpose: its transport writes at once, uvloop's waits for the end of the turn, after the stamp.
    loop, parent_gone = asyncio.get_running_loop(), asyncio.Event()
    server = await loop.create_server(lambda: _Connection(ttft_ms / 1e3, itl_ms / 1e3, tokens), "127.0.0.1", port)
    print(f"listening {server.sockets[0].getsockname()[1]}", flush=True)

    def wait_for_stdin() -> None:
        with contextlib.suppress(OSError):
            while os.read(0, 4096):
                pass
        with contextlib.suppress(RuntimeError):  # the loop has already ended
            loop.call_soon_threadsafe(parent_gone.set)

    if not forever:
        threading.Thread(target=wait_for_stdin, daemon=True).start()
    await parent_gone.wait()
    server.close()


# --- the self-test ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def known_truth_server(*, ttft_ms: float = 50, itl_ms: float = 10, tokens: int = 32) -> Iterator[Endpoint]:
    """Where the server answers, while the context lasts; raises EngineExited or EngineStalled if it never does."""
    from engines.environment import of_child  # not at the top: the server process must start fast
    from engines.settings import Endpoint

    child = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "engines.client.reference_server",
            f"--ttft-ms={ttft_ms}",
            f"--itl-ms={itl_ms}",
            f"--tokens={tokens}",
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=of_child(os.environ),
    )
    try:
        port = _port_of(child)
        yield Endpoint(base_url=f"http://127.0.0.1:{port}", model_id="known-truth", engine="known-truth")
    finally:
        _stop(child)


def _port_of(child: subprocess.Popen[bytes]) -> int:
    from engines.errors import EngineExited, EngineStalled

    assert child.stdout is not None
    assert child.stderr is not None
    lines: queue.Queue[bytes] = queue.Queue()
    read_line = child.stdout.readline
    threading.Thread(target=lambda: lines.put(read_line()), daemon=True).start()
    try:
        line = lines.get(timeout=START_S)
    except queue.Empty as late:
        raise EngineStalled(f"the known-truth server did not start in {START_S:g} s", stalled_s=START_S) from late
    if not line.startswith(b"listening "):
        tail = tuple(child.stderr.read().decode(errors="replace").splitlines()[-5:])
        status = child.wait()
        reason = tail[-1] if tail else "it said nothing"
        raise EngineExited(
            f"the known-truth server exited with {status}: {reason}",
            returncode=status,
            engine="known-truth",
            log_tail=tail,
        )
    return int(line.split()[1])


def _stop(child: subprocess.Popen[bytes]) -> None:
    child.kill()  # it holds nothing that needs an orderly end
    child.wait()
    for pipe in (child.stdin, child.stdout, child.stderr):
        if pipe:
            pipe.close()


def lateness_ms(record: StreamRecord) -> list[float]:
    """Receive minus send of each content chunk of a known-truth stream; needs the record's text."""
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
    """The client's error budget on this machine, now; some 2-3 s with the defaults.

    `streams` requests at a time, `rounds` times, after one round of warm-up. 3 ms of lateness lets a margin of 10 % on
    a TTFT of 90 ms be told from the client's own error with a factor of three; past half a core the client disturbs.
    """
    from engines.client.client import measure

    body = {"messages": [{"role": "user", "content": "time"}]}
    with known_truth_server(ttft_ms=ttft_ms, itl_ms=itl_ms, tokens=tokens) as endpoint:
        measure(endpoint, [body] * streams, concurrency=streams, stall_s=START_S)
        wall_ns, cpu_ns = time.monotonic_ns(), time.thread_time_ns()
        records = measure(endpoint, [body] * (streams * rounds), concurrency=streams, stall_s=START_S)
        cpu_ns, wall_ns = time.thread_time_ns() - cpu_ns, time.monotonic_ns() - wall_ns
    budget = _budget(streams, records, cpu_ns, wall_ns)
    budget["why"] = "; ".join(_objections(budget, max_lateness_p99_ms, max_tpot_error_percent, max_cpu_share))
    budget["passed"] = not budget["why"]
    budget["why"] = budget["why"] or "the client sees every chunk, in time"
    return budget


def resolves(error_p99: float, value: float, margin: float) -> bool:
    """Whether `margin` (0.1 for 10 %) of `value` is at least three times the client's error, in the same unit."""
    return margin * value >= 3 * error_p99


def _budget(streams: int, records: list[StreamRecord], cpu_ns: int, wall_ns: int) -> ErrorBudget:
    good = [record for record in records if record.ok]
    late = [value for record in good for value in lateness_ms(record)]
    timed = [(record, record.engine_timings) for record in good if record.engine_timings]
    ttft = [record.ttft_ms - truth["prompt_ms"] for record, truth in timed]
    tpot = [abs(record.decode_ms / truth["predicted_ms"] - 1) for record, truth in timed if truth["predicted_ms"] > 0]
    return ErrorBudget(
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


def _objections(budget: ErrorBudget, lateness_ms: float, tpot_percent: float, cpu_share: float) -> Iterator[str]:
    if budget["n_failed"]:
        yield f"{budget['n_failed']} of {budget['n_requests']} streams failed"
    limits = {
        "lateness p99": (budget["lateness_p99_ms"], lateness_ms, "ms"),
        "largest TPOT error": (budget["tpot_error_percent"], tpot_percent, "%"),
        "CPU of the client": (budget["client_cpu_share"], cpu_share, "of a core"),
    }
    for name, (value, limit, unit) in limits.items():
        if value is None:
            yield f"{name} was not measured"
        elif value > limit:
            yield f"{name} is {value:.3g} {unit}, {limit:g} allowed"


def _quantile(values: list[float], share: float) -> float | None:
    """The `share` quantile by linear interpolation; None without values."""
    if len(values) < 2:
        return values[0] if values else None
    return statistics.quantiles(values, n=1000, method="inclusive")[round(share * 1000) - 1]


def main() -> None:
    """Serves until stdin closes, or for ever."""
    parser = argparse.ArgumentParser(description="An OpenAI-like stream whose timing is known exactly.")
    parser.add_argument("--port", type=int, default=0, help="0 takes a free one")
    parser.add_argument("--ttft-ms", type=float, default=50)
    parser.add_argument("--itl-ms", type=float, default=10)
    parser.add_argument("--tokens", type=int, default=32, help="of a reply whose request names no max_tokens")
    parser.add_argument("--forever", action="store_true", help="stay when stdin closes")
    chosen = parser.parse_args()
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(_serve(chosen.port, chosen.ttft_ms, chosen.itl_ms, chosen.tokens, forever=chosen.forever))


if __name__ == "__main__":
    main()

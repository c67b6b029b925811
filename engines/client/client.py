"""The measuring client: one stream of chat completion, stamped first and parsed afterwards.

Raw chunks get a `time.monotonic_ns` stamp as they arrive; SSE and JSON are taken apart after the stream ended, so
that parsing costs no lateness. One code path serves every engine: what differs between their streams (a role-only
first chunk, a usage-only last one, several tokens in one chunk) is sorted out here.

Names of the numbers: TTFT, TPOT, ICL and E2E as AIPerf defines them; vLLM's "ITL" is our ICL, GuideLLM's is our TPOT.
"""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

import aiohttp

from engines.client.read_stream import ERROR_TEXT_CHARS, RecordReader, error_text
from engines.client.record import ErrorType, StreamRecord
from engines.errors import BadInput
from engines.settings import Endpoint
from engines.units import number_of

STALL_S = 300.0  # a CPU engine may prefill a long prompt for minutes without a word
CONNECT_S = 10.0
PARSED_AT_ONCE = 8  # chunks, some 0.1 ms: what parsing one stream may delay the stamps of the others


def client_session() -> aiohttp.ClientSession:
    """A session for `stream_chat`: no proxy, no limit of connections, and a fresh connection for every request."""
    # a kept connection that the engine closes while we send would look like a failure of the engine
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, force_close=True),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S),
    )


async def stream_chat(
    session: aiohttp.ClientSession,
    endpoint: Endpoint,
    body: dict[str, Any],
    *,
    cancel_after_chunks: int | None = None,
    stall_s: float = STALL_S,
) -> StreamRecord:
    """The record of one streamed chat completion; a failure is a record with an `error_type`, never an exception.

    `body` goes out as it is, with the endpoint's model (unless it names one), streaming and usage asked for.
    `cancel_after_chunks` closes the connection after that many SSE events. `stall_s` is the longest silence: no byte
    but keep-alive comments, which mistral.rs keeps sending while it is stuck; there is no limit on the whole.
    """
    return await parse_capture(await capture_stream(session, endpoint, body, stall_s, cancel_after=cancel_after_chunks))


async def capture_stream(
    session: aiohttp.ClientSession,
    endpoint: Endpoint,
    body: dict[str, Any],
    stall_s: float,
    *,
    cancel_after: int | None = None,
) -> Capture:
    """The stamped chunks of one request, unparsed; see `stream_chat`."""
    options = {**(body.get("stream_options") or {}), "include_usage": True}
    asked = {"model": endpoint.model_id, **endpoint.request_defaults, **body, "stream": True, "stream_options": options}
    data = json.dumps(asked).encode()
    url = f"{endpoint.base_url.rstrip('/')}/v1/chat/completions"
    headers = {
        "Content-Type": "application/json",
        "Accept": "text/event-stream",
        "Accept-Encoding": "identity",  # a compressor would hold chunks back
        **endpoint.headers,
    }
    record = StreamRecord(sent_ns=time.monotonic_ns())
    capture = Capture(record, stall_s, cancel_after)
    try:
        async with asyncio.timeout(None) as guard:
            capture.watch(guard)
            async with session.post(url, data=data, headers=headers, allow_redirects=False) as response:
                await capture.read(response)
    except aiohttp.InvalidURL as problem:
        raise BadInput(f"endpoint of {endpoint.model_id}: base_url {endpoint.base_url!r} is no URL") from problem
    except aiohttp.ConnectionTimeoutError:
        _fail(record, "timeout", f"no connection to {endpoint.base_url} within {CONNECT_S:g} s")
    except TimeoutError:
        _fail(record, "hang", f"no byte from {endpoint.base_url} for {stall_s:g} s")
    except aiohttp.ClientConnectorError as problem:
        _fail(record, "connect", str(problem))
    except (aiohttp.ClientError, OSError) as problem:
        when = "before a reply" if record.status is None else f"after {number_of(len(capture.chunks), 'chunk')}"
        _fail(record, "stream_truncated", f"connection lost {when}: {type(problem).__name__}: {problem}")
    finally:
        if capture.timer is not None:
            capture.timer.cancel()
    return capture


def _fail(record: StreamRecord, error_type: ErrorType, error: str) -> None:
    record.error_type, record.error = error_type, error[:ERROR_TEXT_CHARS]


class Capture:
    """Stamps what arrives, and ends the wait when nothing has for too long."""

    timer: asyncio.TimerHandle | None = None

    def __init__(self, record: StreamRecord, stall_s: float, cancel_after: int | None) -> None:
        self.chunks: list[tuple[int, bytes]] = []
        self.record = record
        self._stall_ns = int(stall_s * 1e9)
        self._cancel_after = cancel_after
        self._progress_ns = record.sent_ns

    def watch(self, guard: asyncio.Timeout) -> None:
        """Looks at the last progress when a timer rings, instead of setting the timer anew at every chunk."""
        loop, left_s = asyncio.get_running_loop(), (self._progress_ns + self._stall_ns - time.monotonic_ns()) / 1e9
        if left_s <= 0:
            guard.reschedule(loop.time())
        else:
            self.timer = loop.call_later(left_s + 0.001, self.watch, guard)

    async def read(self, response: aiohttp.ClientResponse) -> None:
        """Collects the body of a 200 as stamped chunks; anything else becomes an error with the body's message."""
        self.record.status = response.status
        if response.status != 200:
            body = await response.read()
            self._progress_ns = time.monotonic_ns()
            try:
                text = error_text(json.loads(body.decode()))
            except ValueError:
                text = body[:ERROR_TEXT_CHARS].decode(errors="replace")
            _fail(self.record, "http_5xx" if response.status >= 500 else "http_4xx", text)
            return
        read, stamp, keep = response.content.readany, time.monotonic_ns, self.chunks.append
        events_left = self._cancel_after
        while data := await read():
            now = stamp()
            keep((now, data))
            if data[0] != 0x3A or b"\ndata:" in data:  # 0x3A is ":", which opens a keep-alive comment
                self._progress_ns = now
            if events_left is not None:
                events_left -= data.count(b"data:")
                if events_left <= 0:
                    self.record.cancelled = True
                    response.close()
                    return


async def parse_capture(capture: Capture, *, keep_text: bool = True) -> StreamRecord:
    """The record of `capture`, parsed in turns with the streams that still run and take their stamps."""
    record, chunks = capture.record, capture.chunks
    if record.status != 200:
        return record
    reader = RecordReader(record, keep_text=keep_text)
    for start in range(0, len(chunks), PARSED_AT_ONCE):
        for t_ns, data in chunks[start : start + PARSED_AT_ONCE]:
            reader.feed(t_ns, data)
        await asyncio.sleep(0)
    return reader.finish()

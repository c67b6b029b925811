"""The measuring client: one stream of chat completion, stamped first and parsed afterwards.

Raw chunks get a `time.monotonic_ns` stamp as they arrive; SSE and JSON are taken apart after the stream ended, so
that parsing costs no lateness. One code path serves every engine: what differs between their streams (a role-only
first chunk, a usage-only last one, several tokens in one chunk) is sorted out here.

Names of the numbers: TTFT, TPOT, ICL and E2E as AIPerf defines them; vLLM's "ITL" is our ICL, GuideLLM's is our TPOT.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import json
import math
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import aiohttp

from engines.errors import BadInput, NoMeasurement
from engines.openai.sse import DONE_DATA, SseSplitter, read_event
from engines.redaction import redacted_text
from engines.settings import Endpoint

try:
    import uvloop
except ImportError:  # not built for Windows; the standard loop measures too, about 1 ms later at 32 streams
    uvloop = None  # type: ignore[assignment, unused-ignore]

Kind = Literal["role", "content", "reasoning", "tool", "usage", "empty", "error"]
ErrorType = Literal[
    "connect", "timeout", "http_4xx", "http_5xx", "stream_truncated", "invalid_json", "hang", "error_event"
]

STALL_S = 300.0  # a CPU engine may prefill a long prompt for minutes without a word
CONNECT_S = 10.0
PARSED_AT_ONCE = 8  # chunks, some 0.1 ms: what parsing one stream may delay the stamps of its neighbours
SETTLE_S = 0.002  # streams of one batch end together: the last chunks of all are stamped before the first is parsed
ERROR_TEXT_CHARS = 500

_LETTER: dict[Kind, str] = {
    "role": "r",
    "content": "c",
    "reasoning": "n",
    "tool": "t",
    "usage": "u",
    "empty": "e",
    "error": "x",
}
_KIND: dict[str, Kind] = {letter: kind for kind, letter in _LETTER.items()}
_OUTPUT: frozenset[Kind] = frozenset({"content", "reasoning", "tool"})


class Event(NamedTuple):
    """One SSE event: ns after the request was sent, bytes on the wire, characters of output, and what it carried."""

    t_ns: int
    n_bytes: int
    n_content_chars: int
    kind: Kind


@dataclass(slots=True)
class StreamRecord:
    """All that one streamed request left behind; the derived numbers raise NoMeasurement where there is nothing.

    `sent_ns` is taken before the connection is opened, on the monotonic clock. `scheduled_ns` is set in open loop,
    and latencies then count from it. `engine_timings` is in ms and tokens, named as llama.cpp names them.
    """

    sent_ns: int
    scheduled_ns: int | None = None
    status: int | None = None
    error_type: ErrorType | None = None
    error: str | None = None
    cancelled: bool = False
    done: bool = False
    finish_reason: str | None = None
    events: list[Event] = field(default_factory=list)
    keepalives: int = 0
    first_chunk_tokens: int = 1
    usage: dict[str, int] | None = None
    engine_timings: dict[str, float] | None = None
    text: str | None = None
    reasoning: str | None = None
    tool_calls: list[dict[str, Any]] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """The stream came to its end, or was cancelled by us, without an error."""
        return self.error_type is None

    @property
    def output_events(self) -> list[Event]:
        """Events with non-empty content, reasoning or tool delta, in order of arrival."""
        return [event for event in self.events if event.kind in _OUTPUT]

    @property
    def dispatch_delay_ms(self) -> float:
        """From the scheduled to the actual sending; the client's own delay, not the engine's."""
        if self.scheduled_ns is None:
            raise NoMeasurement("no dispatch delay: the request was not sent on a schedule")
        return (self.sent_ns - self.scheduled_ns) / 1e6

    @property
    def ttft_ms(self) -> float:
        """Scheduled (open loop) or sent (closed loop) to the first event with output."""
        return self._since_start_ms(self._output()[0])

    @property
    def e2e_ms(self) -> float:
        """Scheduled (open loop) or sent (closed loop) to the last event with output."""
        return self._since_start_ms(self._output()[-1])

    @property
    def icl_ms(self) -> list[float]:
        """Gaps between successive events with output: n-1 values for n events."""
        output = self._output(at_least=2)
        return [(after.t_ns - before.t_ns) / 1e6 for before, after in itertools.pairwise(output)]

    @property
    def tpot_ms(self) -> float:
        """(last - first event with output) / (completion tokens - tokens in the first event).

        A natural stop counts a token that has no event, which reads 1/n low: compare speeds at a fixed length.
        """
        return self.decode_ms / self._decoded_tokens()

    @property
    def decode_ms(self) -> float:
        """From the first to the last event with output, on the client's clock."""
        output = self._output(at_least=2)
        return (output[-1].t_ns - output[0].t_ns) / 1e6

    @property
    def decode_tok_s(self) -> float:
        """Tokens after the first event per second of decode; 1000 / tpot_ms."""
        decode_ms = self.decode_ms
        if decode_ms <= 0:
            raise NoMeasurement("no decode rate: all output arrived at one instant")
        return 1000 * self._decoded_tokens() / decode_ms

    @property
    def prefill_tok_s(self) -> float:
        """Prompt tokens that were not cached, per second of TTFT; so it includes the front-end and one decode step."""
        prompt, cached = self.prompt_tokens, self.cached_tokens
        if prompt is None:
            raise NoMeasurement("no prefill rate: the stream carried no usage.prompt_tokens")
        if prompt - (cached or 0) < 1:
            raise NoMeasurement("no prefill rate: the whole prompt was cached")
        return 1000 * (prompt - (cached or 0)) / self.ttft_ms

    @property
    def prompt_tokens(self) -> int | None:
        """As `usage` says; None when it does not."""
        return (self.usage or {}).get("prompt_tokens")

    @property
    def completion_tokens(self) -> int | None:
        """As `usage` says, else the engine's own timing; None when neither does."""
        from_usage = (self.usage or {}).get("completion_tokens")
        return from_usage if from_usage is not None else _whole(self.engine_timings, "predicted_n")

    @property
    def cached_tokens(self) -> int | None:
        """Prompt tokens taken from a cache, by `usage`, else by the engine's timing; None when neither says."""
        from_usage = (self.usage or {}).get("cached_tokens")
        return from_usage if from_usage is not None else _whole(self.engine_timings, "cache_n")

    def metrics(self) -> dict[str, Any]:
        """The derived numbers by name; None where there is no measurement."""
        names = ("ttft_ms", "tpot_ms", "icl_ms", "e2e_ms", "prefill_tok_s", "decode_tok_s", "dispatch_delay_ms")
        return {name: _measured(self, name) for name in names}

    def to_dict(self) -> dict[str, Any]:
        """JSON-able, some 12 bytes an event: times as gaps in ns, kinds as one letter each. `from_dict` undoes it."""
        plain: dict[str, Any] = {
            name: getattr(self, name) for name in self.__slots__ if name != "events" and getattr(self, name) is not None
        }
        times = [0, *(event.t_ns for event in self.events)]
        plain["events"] = {
            "gap_ns": [after - before for before, after in itertools.pairwise(times)],
            "bytes": [event.n_bytes for event in self.events],
            "chars": [event.n_content_chars for event in self.events],
            "kinds": "".join(_LETTER[event.kind] for event in self.events),
        }
        return plain

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> StreamRecord:
        """The record that `to_dict` was called on."""
        columns = plain["events"]
        events, t_ns = [], 0
        for gap, n_bytes, chars, letter in zip(
            columns["gap_ns"], columns["bytes"], columns["chars"], columns["kinds"], strict=True
        ):
            t_ns += gap
            events.append(Event(t_ns, n_bytes, chars, _KIND[letter]))
        return cls(**{**plain, "events": events})

    def _output(self, at_least: int = 1) -> list[Event]:
        output = self.output_events
        if len(output) < at_least:
            raise NoMeasurement(
                f"{len(output)} events with output, {at_least} needed ({self.error_type or 'no error'})"
            )
        return output

    def _since_start_ms(self, event: Event) -> float:
        start_ns = self.sent_ns if self.scheduled_ns is None else self.scheduled_ns
        return (self.sent_ns + event.t_ns - start_ns) / 1e6

    def _decoded_tokens(self) -> int:
        tokens = self.completion_tokens
        if tokens is None:
            raise NoMeasurement("no token count: the stream carried neither usage nor timings")
        if tokens < 2 or tokens <= self.first_chunk_tokens:
            raise NoMeasurement(f"{tokens} tokens, {self.first_chunk_tokens} of them in the first event: no decode")
        return tokens - self.first_chunk_tokens


def _measured(record: StreamRecord, name: str) -> Any:
    try:
        return getattr(record, name)
    except NoMeasurement:
        return None


def _whole(numbers: dict[str, float] | None, name: str) -> int | None:
    value = (numbers or {}).get(name)
    return None if value is None else int(value)


# --- parsing: from stamped chunks to a record ---------------------------------------------------------------------


def parse_stream(chunks: Iterable[tuple[int, bytes]], record: StreamRecord, *, keep_text: bool = True) -> StreamRecord:
    """`record`, filled from (monotonic ns, bytes) of a 200 reply; the chunk that completes an event gives its time."""
    reader = _RecordReader(record, keep_text=keep_text)
    for t_ns, data in chunks:
        reader.feed(t_ns, data)
    return reader.finish()


class _RecordReader:
    """Fills a record from chunks, a few at a time."""

    def __init__(self, record: StreamRecord, *, keep_text: bool) -> None:
        self._record = record
        self._keep_text = keep_text
        self._splitter = SseSplitter()
        self._content: list[str] = []
        self._reasoning: list[str] = []
        self._tools: dict[int, dict[str, Any]] = {}

    def feed(self, t_ns: int, data: bytes) -> None:
        for event in self._splitter.feed(data):
            self._read_event(t_ns - self._record.sent_ns, event)

    def finish(self) -> StreamRecord:
        record, rest = self._record, self._splitter.rest
        if read_event(rest)[1].strip() == DONE_DATA:
            record.done = True
        if not (record.done or record.cancelled or record.error_type):
            record.error_type = "stream_truncated"
            unread = f", in the middle of {_head(rest)!r}" if rest.strip() else ""
            record.error = f"the stream ended after {len(record.events)} events without [DONE]{unread}"
        if self._keep_text:
            record.text = "".join(self._content)
            record.reasoning = "".join(self._reasoning) or None
        record.tool_calls = [self._tools[index] for index in sorted(self._tools)]
        return record

    def _read_event(self, t_ns: int, raw: bytes) -> None:
        name, data = read_event(raw)
        if not data:
            self._record.keepalives += 1
        elif data == DONE_DATA:
            self._record.done = True
        else:
            n_chars, kind = self._read_data(name, data)
            self._record.events.append(Event(t_ns, len(raw) + 2, n_chars, kind))

    def _read_data(self, name: bytes, data: bytes) -> tuple[int, Kind]:
        try:
            chunk = json.loads(data.decode())
        except ValueError as problem:
            return self._failed("invalid_json", f"{problem}: {_head(data)}")
        if not isinstance(chunk, dict):
            return self._failed("invalid_json", f"an object was expected: {_head(data)}")
        if chunk.get("error") or name == b"error":
            return self._failed("error_event", error_text(chunk))
        return self._read_chunk(chunk)

    def _read_chunk(self, chunk: dict[str, Any]) -> tuple[int, Kind]:
        usage, timings = read_usage(chunk.get("usage")), read_timings(chunk)
        choices = [choice for choice in chunk.get("choices") or () if isinstance(choice, dict)]
        n_chars, kind = 0, "usage" if usage else "empty"
        for choice in choices:
            chars, found = self._read_choice(choice)
            n_chars += chars
            if found in _OUTPUT or (found == "role" and kind == "empty"):
                kind = found
        if kind in _OUTPUT and not any(event.kind in _OUTPUT for event in self._record.events):
            self._record.first_chunk_tokens = _tokens_so_far(usage, timings)
        self._record.usage = usage or self._record.usage
        self._record.engine_timings = timings or self._record.engine_timings
        return n_chars, kind  # type: ignore[return-value]

    def _read_choice(self, choice: dict[str, Any]) -> tuple[int, Kind]:
        delta = choice.get("delta") or {}
        content = delta.get("content") or ""
        reasoning = delta.get("reasoning_content") or delta.get("reasoning") or ""
        calls = delta.get("tool_calls") or []
        if not choice.get("index"):
            self._record.finish_reason = choice.get("finish_reason") or self._record.finish_reason
            self._content.append(content)
            self._reasoning.append(reasoning)
            n_call_chars = sum(self._read_call(place, call) for place, call in enumerate(calls))
        else:
            n_call_chars = 0
        kind: Kind = "role" if delta.get("role") else "empty"
        if content:
            kind = "content"
        elif reasoning:
            kind = "reasoning"
        elif calls:
            kind = "tool"
        return len(content) + len(reasoning) + n_call_chars, kind

    def _read_call(self, place: int, call: dict[str, Any]) -> int:
        known = self._tools.setdefault(call.get("index", place), {"id": None, "name": "", "arguments": ""})
        function = call.get("function") or {}
        arguments = function.get("arguments") or ""
        if not isinstance(arguments, str):  # the specification wants a string; some engines send the object
            arguments = json.dumps(arguments)
        known["id"] = call.get("id") or known["id"]
        known["name"] += function.get("name") or ""
        known["arguments"] += arguments
        return len(arguments)

    def _failed(self, error_type: ErrorType, text: str) -> tuple[int, Kind]:
        if self._record.error_type is None:
            self._record.error_type, self._record.error = error_type, text
        return 0, "error"


def _head(data: bytes) -> str:
    return data[:120].decode(errors="replace")


def _tokens_so_far(usage: dict[str, int] | None, timings: dict[str, float] | None) -> int:
    """Tokens in the first event with output, where that event itself says so (vLLM continuous usage); else 1."""
    from_usage = (usage or {}).get("completion_tokens")
    return max(1, from_usage or _whole(timings, "predicted_n") or 1)


def read_usage(usage: Any) -> dict[str, int] | None:
    """`prompt_tokens`, `completion_tokens`, `cached_tokens` as far as an OpenAI usage object has them; None if none."""
    if not isinstance(usage, dict):
        return None
    details = usage.get("prompt_tokens_details") or {}
    found = {name: usage.get(name) for name in ("prompt_tokens", "completion_tokens")}
    found["cached_tokens"] = details.get("cached_tokens") if isinstance(details, dict) else None
    return {name: value for name, value in found.items() if isinstance(value, int)} or None


def read_timings(chunk: dict[str, Any]) -> dict[str, float] | None:
    """An engine's own timing in llama.cpp's names: `prompt_ms`, `predicted_ms`, `prompt_n`, `predicted_n`, `cache_n`.

    llama.cpp sends `timings`; mistral.rs puts `total_prompt_time_sec` and `total_completion_time_sec` into `usage`
    (may be infinite for one token, and is left out then).
    """
    timings, usage = chunk.get("timings"), chunk.get("usage")
    found: dict[str, Any] = {}
    if isinstance(timings, dict):
        found = {
            name: timings.get(name) for name in ("prompt_ms", "predicted_ms", "prompt_n", "predicted_n", "cache_n")
        }
    elif isinstance(usage, dict):
        seconds = {"prompt_ms": "total_prompt_time_sec", "predicted_ms": "total_completion_time_sec"}
        found = {name: 1000 * usage[key] for name, key in seconds.items() if isinstance(usage.get(key), int | float)}
    return {k: v for k, v in found.items() if isinstance(v, int | float) and math.isfinite(v)} or None


def error_text(body: Any) -> str:
    """The message in an error body: OpenAI's `error.message`, mistral.rs's `message`, FastAPI's `detail`; else all."""
    if isinstance(body, dict):
        inner = body.get("error", body)
        if isinstance(inner, dict):
            inner = inner.get("message") or inner.get("detail") or inner
        body = inner if isinstance(inner, str) else json.dumps(inner)
    return redacted_text(str(body))[:ERROR_TEXT_CHARS]


# --- reconciliation: do client, usage and engine tell the same story? ---------------------------------------------


def reconcile(record: StreamRecord) -> list[dict[str, Any]]:
    """Disagreements between client, `usage` and engine timing, with the numbers; empty when they agree.

    A stop token is counted by `usage` but carries no text, and old llama.cpp builds count the first token's time as
    decode (ggml-org/llama.cpp#5863): one token of difference is none.
    """
    chunks, tokens = len(record.output_events), (record.usage or {}).get("completion_tokens")
    expected = None if tokens is None else tokens - record.first_chunk_tokens + 1
    timed_n = (record.engine_timings or {}).get("predicted_n")
    found = [
        _disagreement("content_chunks_vs_usage", chunks, expected, limit=1, unit="tokens"),
        _disagreement("usage_vs_engine_tokens", tokens, timed_n, limit=0, unit="tokens"),
        _decode_disagreement(record),
    ]
    if record.ok and not record.cancelled and tokens is None:
        why = "the stream ended without usage.completion_tokens"
        found.append({"finding": "usage_missing", "client": chunks, "engine": None, "unit": "tokens", "why": why})
    return [finding for finding in found if finding]


def _decode_disagreement(record: StreamRecord) -> dict[str, Any] | None:
    client_ms, tpot_ms = _measured(record, "decode_ms"), _measured(record, "tpot_ms")
    engine_ms = (record.engine_timings or {}).get("predicted_ms")
    if client_ms is None or tpot_ms is None:
        return None
    limit = tpot_ms + max(5.0, 0.05 * client_ms)
    return _disagreement("client_vs_engine_decode", client_ms, engine_ms, limit=limit, unit="ms")


def _disagreement(
    finding: str, client: float | None, engine: float | None, *, limit: float, unit: str
) -> dict[str, Any] | None:
    if client is None or engine is None or abs(client - engine) <= limit:
        return None
    why = f"{client:.6g} against {engine:.6g} {unit}: apart by {abs(client - engine):.4g}, {limit:.4g} allowed"
    return {"finding": finding, "client": client, "engine": engine, "limit": limit, "unit": unit, "why": why}


# --- the wire -----------------------------------------------------------------------------------------------------


def client_session() -> aiohttp.ClientSession:
    """A session for `stream_chat`: no proxy, no limit of connections, and a fresh connection for every request.

    A kept-alive connection that the engine closes while we send would look like a failure of the engine.
    """
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
    keep_text: bool = True,
    scheduled_ns: int | None = None,
) -> StreamRecord:
    """What came of one streamed chat completion; a failure is a record with an `error_type`, never an exception.

    `body` goes out as it is, with the endpoint's model (unless it names one), streaming and usage asked for.
    `cancel_after_chunks` closes the connection after that many SSE events. `stall_s` is the longest silence: no byte
    but keep-alive comments, which mistral.rs goes on sending while it is stuck; there is no limit on the whole.
    """
    capture = await _capture(
        session, endpoint, body, cancel_after=cancel_after_chunks, stall_s=stall_s, scheduled_ns=scheduled_ns
    )
    return await _parse_gently(capture, keep_text=keep_text)


async def _capture(
    session: aiohttp.ClientSession,
    endpoint: Endpoint,
    body: dict[str, Any],
    *,
    stall_s: float,
    cancel_after: int | None = None,
    scheduled_ns: int | None = None,
) -> _Capture:
    url, data, headers = _request(endpoint, body)
    record = StreamRecord(sent_ns=time.monotonic_ns(), scheduled_ns=scheduled_ns)
    capture = _Capture(record, stall_s, cancel_after)
    try:
        async with asyncio.timeout(None) as guard:
            with _Watch(guard, capture):
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
        when = "before a reply" if record.status is None else f"after {len(capture.chunks)} chunks"
        _fail(record, "stream_truncated", f"connection lost {when}: {type(problem).__name__}: {problem}")
    return capture


def _request(endpoint: Endpoint, body: dict[str, Any]) -> tuple[str, bytes, dict[str, str]]:
    options = {**(body.get("stream_options") or {}), "include_usage": True}
    whole = {"model": endpoint.model_id, **body, "stream": True, "stream_options": options}
    headers = {
        "Content-Type": "application/json",
        "Accept": "text/event-stream",
        "Accept-Encoding": "identity",  # a compressor would hold chunks back
        **endpoint.headers,
    }
    return f"{endpoint.base_url.rstrip('/')}/v1/chat/completions", json.dumps(whole).encode(), headers


def _fail(record: StreamRecord, error_type: ErrorType, error: str) -> None:
    record.error_type, record.error = error_type, error[:ERROR_TEXT_CHARS]


class _Capture:
    """Stamps what arrives and watches for silence."""

    def __init__(self, record: StreamRecord, stall_s: float, cancel_after: int | None) -> None:
        self.chunks: list[tuple[int, bytes]] = []
        self.record = record
        self._stall_ns = int(stall_s * 1e9)
        self._cancel_after = cancel_after
        self._progress_ns = record.sent_ns

    def silent_ns_left(self) -> int:
        """How much longer the silence may last."""
        return self._progress_ns + self._stall_ns - time.monotonic_ns()

    async def read(self, response: aiohttp.ClientResponse) -> None:
        """Collects the body of a 200 as stamped chunks; anything else becomes an error with the body's message."""
        self.record.status = response.status
        if response.status != 200:
            body = await response.read()
            self._progress_ns = time.monotonic_ns()
            _fail(self.record, "http_5xx" if response.status >= 500 else "http_4xx", _body_text(body))
            return
        await self._read_stream(response)

    async def _read_stream(self, response: aiohttp.ClientResponse) -> None:
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


class _Watch:
    """A timer that looks at the last progress when it rings, instead of being wound up again at every chunk."""

    def __init__(self, guard: asyncio.Timeout, capture: _Capture) -> None:
        self._guard = guard
        self._capture = capture
        self._loop = asyncio.get_running_loop()

    def __enter__(self) -> None:
        self._timer = self._loop.call_later(self._capture.silent_ns_left() / 1e9, self._look)

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()

    def _look(self) -> None:
        left_s = self._capture.silent_ns_left() / 1e9
        if left_s <= 0:
            self._guard.reschedule(self._loop.time())
        else:
            self._timer = self._loop.call_later(left_s + 0.001, self._look)


def _body_text(body: bytes) -> str:
    try:
        return error_text(json.loads(body.decode()))
    except ValueError:
        return body[:ERROR_TEXT_CHARS].decode(errors="replace")


async def _parse_gently(capture: _Capture, *, keep_text: bool) -> StreamRecord:
    """As `parse_stream`, letting the streams that still run take their stamps in between."""
    record, chunks = capture.record, capture.chunks
    if record.status != 200:
        return record
    reader = _RecordReader(record, keep_text=keep_text)
    for start in range(0, len(chunks), PARSED_AT_ONCE):
        for t_ns, data in chunks[start : start + PARSED_AT_ONCE]:
            reader.feed(t_ns, data)
        await asyncio.sleep(0)
    return reader.finish()


# --- load ---------------------------------------------------------------------------------------------------------


def measure(
    endpoint: Endpoint,
    bodies: Sequence[dict[str, Any]],
    *,
    concurrency: int = 1,
    open_loop_rate: float | None = None,
    seed: int = 0,
    stall_s: float = STALL_S,
    keep_text: bool = True,
    on_record: Callable[[StreamRecord], None] | None = None,
) -> list[StreamRecord]:
    """One record per body, in the order of `bodies`.

    Closed loop by default: `concurrency` requests at a time. With `open_loop_rate` (requests per second) requests
    leave on an absolute schedule with exponential gaps drawn from `seed`, however many are under way; their latency
    counts from the schedule (no coordinated omission) and `dispatch_delay_ms` says how late the client itself was.
    `on_record` is called in this thread as each request ends: keep it short, the other streams wait for it.
    Ctrl-C closes the connections and comes out as KeyboardInterrupt.
    """
    if concurrency < 1:
        raise BadInput(f"concurrency {concurrency}: at least 1 request at a time is needed")
    if open_loop_rate is not None and not (open_loop_rate > 0 and math.isfinite(open_loop_rate)):
        raise BadInput(f"open_loop_rate {open_loop_rate}: a positive number of requests per second is needed")
    load = _Load(endpoint, bodies, stall_s, keep_text, on_record)
    with _old_objects_left_alone(), asyncio.Runner(loop_factory=uvloop.new_event_loop if uvloop else None) as runner:
        try:
            return runner.run(load.closed(concurrency) if open_loop_rate is None else load.open(open_loop_rate, seed))
        except ExceptionGroup as several:  # the first cancelled the others; it is what the caller can act on
            raise several.exceptions[0] from None


@contextlib.contextmanager
def _old_objects_left_alone() -> Iterator[None]:
    """The garbage collector looks at new objects only: a full walk takes 67 ms once Prefect is imported."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


class _Load:
    """Sends the bodies, in closed or in open loop, and keeps the records in their order."""

    def __init__(
        self,
        endpoint: Endpoint,
        bodies: Sequence[dict[str, Any]],
        stall_s: float,
        keep_text: bool,
        on_record: Callable[[StreamRecord], None] | None,
    ) -> None:
        self._endpoint = endpoint
        self._bodies = bodies
        self._stall_s = stall_s
        self._keep_text = keep_text
        self._on_record = on_record
        self._records: dict[int, StreamRecord] = {}
        self._one_parses = asyncio.Lock()
        self._under_way = 0

    async def closed(self, concurrency: int) -> list[StreamRecord]:
        places = iter(range(len(self._bodies)))

        async def worker() -> None:
            for place in places:
                await self._send(session, place, None)

        async with client_session() as session, asyncio.TaskGroup() as group:
            for _ in range(min(concurrency, len(self._bodies))):
                group.create_task(worker())
        return self._in_order()

    async def open(self, rate: float, seed: int) -> list[StreamRecord]:
        dice, due_ns = random.Random(seed), time.monotonic_ns()
        async with client_session() as session, asyncio.TaskGroup() as group:
            for place in range(len(self._bodies)):
                due_ns += int(dice.expovariate(rate) * 1e9)
                # uvloop's timers count whole ms and may ring a little early
                while (left_ns := due_ns - time.monotonic_ns()) > 0:  # noqa: ASYNC110 - it waits for a time, not an event
                    await asyncio.sleep(left_ns / 1e9)
                group.create_task(self._send(session, place, due_ns))
        return self._in_order()

    async def _send(self, session: aiohttp.ClientSession, place: int, scheduled_ns: int | None) -> None:
        self._under_way += 1
        try:
            capture = await _capture(
                session, self._endpoint, self._bodies[place], stall_s=self._stall_s, scheduled_ns=scheduled_ns
            )
        finally:
            self._under_way -= 1
        if self._under_way:
            await asyncio.sleep(SETTLE_S)
        # one at a time: streams that end together would otherwise all parse in the same turn of the loop
        async with self._one_parses:
            record = await _parse_gently(capture, keep_text=self._keep_text)
        self._records[place] = record
        if self._on_record:
            self._on_record(record)

    def _in_order(self) -> list[StreamRecord]:
        return [self._records[place] for place in range(len(self._bodies))]

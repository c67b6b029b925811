"""The record of one streamed request: stamped events, the latencies from them, and whether the engine agrees."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from engines.errors import NoMeasurement
from engines.units import figure, number_of

Kind = Literal["role", "content", "reasoning", "tool", "usage", "empty", "error"]
ErrorType = Literal[
    "connect", "timeout", "http_4xx", "http_5xx", "stream_truncated", "invalid_json", "hang", "error_event"
]
_LETTER: dict[Kind, str] = {
    "role": "r",
    "content": "c",
    "reasoning": "n",
    "tool": "t",
    "usage": "u",
    "empty": "e",
    "error": "x",
}
OUTPUT_KINDS: frozenset[Kind] = frozenset({"content", "reasoning", "tool"})


class Event(NamedTuple):
    """One SSE event: ns after the request was sent, bytes on the wire, characters of output, and what it carried."""

    t_ns: int
    n_bytes: int
    n_content_chars: int
    kind: Kind


@dataclass(slots=True)
class StreamRecord:
    """One streamed request; the derived numbers raise NoMeasurement where there is nothing to derive them from.

    `sent_ns` is taken before the connection is opened, on the monotonic clock. `engine_timings` is in ms and
    tokens, named as llama.cpp names them.
    """

    sent_ns: int
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
        return [event for event in self.events if event.kind in OUTPUT_KINDS]

    @property
    def ttft_ms(self) -> float:
        """From sending to the first event with output."""
        return self._output()[0].t_ns / 1e6

    @property
    def e2e_ms(self) -> float:
        """From sending to the last event with output."""
        return self._output()[-1].t_ns / 1e6

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
        if self.prompt_tokens is None:
            raise NoMeasurement("no prefill rate: the stream carried no usage.prompt_tokens")
        computed = self.prompt_tokens - (self.cached_tokens or 0)
        if computed < 1:
            raise NoMeasurement("no prefill rate: the whole prompt was cached")
        return 1000 * computed / self.ttft_ms

    @property
    def prompt_tokens(self) -> int | None:
        return (self.usage or {}).get("prompt_tokens")

    @property
    def completion_tokens(self) -> int | None:
        """By `usage`, else by the engine's own timing; None when neither has it."""
        from_usage = (self.usage or {}).get("completion_tokens")
        return from_usage if from_usage is not None else whole_number(self.engine_timings, "predicted_n")

    @property
    def cached_tokens(self) -> int | None:
        """Prompt tokens taken from a cache, by `usage`, else by the engine's timing; None when neither has it."""
        from_usage = (self.usage or {}).get("cached_tokens")
        return from_usage if from_usage is not None else whole_number(self.engine_timings, "cache_n")

    def measured(self, name: str) -> Any:
        """The derived number of this name; None where there is no measurement."""
        try:
            return getattr(self, name)
        except NoMeasurement:
            return None

    def to_dict(self) -> dict[str, Any]:
        """JSON-able, some 12 bytes an event: times as gaps in ns, kinds as one letter each."""
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

    def _output(self, at_least: int = 1) -> list[Event]:
        output = self.output_events
        if len(output) < at_least:
            why = f"{number_of(len(output), 'event')} with output, {at_least} needed ({self.error_type or 'no error'})"
            raise NoMeasurement(why)
        return output

    def _decoded_tokens(self) -> int:
        tokens = self.completion_tokens
        if tokens is None:
            raise NoMeasurement("no token count: the stream carried neither usage nor timings")
        if tokens < 2 or tokens <= self.first_chunk_tokens:
            raise NoMeasurement(
                f"{number_of(tokens, 'token')}, {self.first_chunk_tokens} of them in the first event: no decode"
            )
        return tokens - self.first_chunk_tokens


def whole_number(numbers: dict[str, float] | None, name: str) -> int | None:
    value = (numbers or {}).get(name)
    return None if value is None else int(value)


def reconcile(record: StreamRecord) -> list[dict[str, Any]]:
    """Disagreements between client, `usage` and engine timing, with the numbers; empty when they agree.

    A stop token is counted by `usage` but carries no text, and old llama.cpp builds count the first token's time as
    decode (ggml-org/llama.cpp#5863): one token of difference is none.
    """
    chunks, tokens = len(record.output_events), (record.usage or {}).get("completion_tokens")
    expected = None if tokens is None else tokens - record.first_chunk_tokens + 1
    timings = record.engine_timings or {}
    tpot_ms = record.measured("tpot_ms")
    decode_ms = None if tpot_ms is None else record.decode_ms
    within_ms = 0.0 if tpot_ms is None else tpot_ms + max(5.0, 0.05 * record.decode_ms)
    compared = (
        ("content_chunks_vs_usage", chunks, expected, 1, "tokens"),
        ("usage_vs_engine_tokens", tokens, timings.get("predicted_n"), 0, "tokens"),
        ("client_vs_engine_decode", decode_ms, timings.get("predicted_ms"), within_ms, "ms"),
    )
    found = []
    for finding, client, engine, limit, unit in compared:
        if client is not None and engine is not None and abs(client - engine) > limit:
            apart = f"apart by {figure(abs(client - engine), limit)}, {figure(limit)} allowed"
            why = f"{figure(client, engine)} against {figure(engine, client)} {unit}: {apart}"
            numbers = {"client": client, "engine": engine, "limit": limit, "unit": unit}
            found.append({"finding": finding, **numbers, "why": why})
    if record.ok and not record.cancelled and tokens is None:
        why = "the stream ended without usage.completion_tokens"
        found.append({"finding": "usage_missing", "client": chunks, "engine": None, "unit": "tokens", "why": why})
    return found

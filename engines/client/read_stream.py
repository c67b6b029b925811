"""Read a stamped stream of server-sent events into a StreamRecord."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from typing import Any

from engines.client.record import OUTPUT_KINDS, ErrorType, Event, Kind, StreamRecord, whole_number
from engines.openai.sse import DONE_DATA, SseSplitter, read_event
from engines.redaction import redacted_text
from engines.units import number_of

ERROR_TEXT_CHARS = 500


def parse_stream(chunks: Iterable[tuple[int, bytes]], record: StreamRecord) -> StreamRecord:
    """`record`, filled from (monotonic ns, bytes) of a 200 reply; the chunk that completes an event gives its time."""
    reader = RecordReader(record, keep_text=True)
    for t_ns, data in chunks:
        reader.feed(t_ns, data)
    return reader.finish()


class RecordReader:
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
            name, payload = read_event(event)
            if not payload:
                self._record.keepalives += 1
            elif payload == DONE_DATA:
                self._record.done = True
            else:
                n_chars, kind = self._read_data(name, payload)
                self._record.events.append(Event(t_ns - self._record.sent_ns, len(event) + 2, n_chars, kind))

    def finish(self) -> StreamRecord:
        record, rest = self._record, self._splitter.rest
        if read_event(rest)[1].strip() == DONE_DATA:
            record.done = True
        if not (record.done or record.cancelled or record.error_type):
            record.error_type = "stream_truncated"
            unread = f", in the middle of {_head(rest)!r}" if rest.strip() else ""
            record.error = f"the stream ended after {number_of(len(record.events), 'event')} without [DONE]{unread}"
        if self._keep_text:
            record.text = "".join(self._content)
            record.reasoning = "".join(self._reasoning) or None
        record.tool_calls = [self._tools[index] for index in sorted(self._tools)]
        return record

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
            if found in OUTPUT_KINDS or (found == "role" and kind == "empty"):
                kind = found
        if kind in OUTPUT_KINDS and not any(event.kind in OUTPUT_KINDS for event in self._record.events):
            # more than 1 where the event itself says so (vLLM's continuous usage)
            so_far = (usage or {}).get("completion_tokens") or whole_number(timings, "predicted_n")
            self._record.first_chunk_tokens = max(1, so_far or 1)
        self._record.usage = usage or self._record.usage
        self._record.engine_timings = timings or self._record.engine_timings
        return n_chars, kind  # type: ignore[return-value]

    def _read_choice(self, choice: dict[str, Any]) -> tuple[int, Kind]:
        delta = choice.get("delta") or {}
        content = delta.get("content") or ""
        reasoning = delta.get("reasoning_content") or delta.get("reasoning") or ""
        calls = delta.get("tool_calls") or []
        n_call_chars = 0
        if not choice.get("index"):
            self._record.finish_reason = choice.get("finish_reason") or self._record.finish_reason
            self._content.append(content)
            self._reasoning.append(reasoning)
            n_call_chars = sum(self._read_call(place, call) for place, call in enumerate(calls))
        plain: Kind = "tool" if calls else "role" if delta.get("role") else "empty"
        kind: Kind = "content" if content else "reasoning" if reasoning else plain
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

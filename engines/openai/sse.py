"""Server-sent events as OpenAI-style servers send them: cut a stream into events, read one, write one."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any

DONE_DATA = b"[DONE]"
DONE = b"data: [DONE]\n\n"


class SseSplitter:
    """Chunks in, whole events out (WHATWG HTML, 9.2.6); `rest` is what has no blank line after it yet."""

    def __init__(self) -> None:
        self.rest = b""

    def feed(self, data: bytes) -> list[bytes]:
        """The events that `data` completes, without their blank lines and with LF between their lines."""
        data = self.rest + data
        if b"\r" in data:
            # a trailing \r may be the first half of \r\n: it stays for the next chunk to decide
            held = b"\r" if data.endswith(b"\r") else b""
            data = data.removesuffix(held).replace(b"\r\n", b"\n").replace(b"\r", b"\n") + held
        *events, self.rest = data.split(b"\n\n")
        return events


def read_event(event: bytes) -> tuple[bytes, bytes]:
    """(event name, data lines joined); both empty for a comment."""
    if event.startswith(b"data: ") and b"\n" not in event:
        return b"", event[6:]
    name, data = b"", []
    for line in event.split(b"\n"):
        label, _, value = line.partition(b":")
        if label == b"data":
            data.append(value.removeprefix(b" "))
        elif label == b"event":
            name = value.strip()
    return name, b"\n".join(data)


def payloads(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """The data of each event of a stream, DONE_DATA included; the last event may lack its blank line."""
    splitter = SseSplitter()
    for chunk in chunks:
        yield from filter(None, (read_event(event)[1].strip() for event in splitter.feed(chunk)))
    if data := read_event(splitter.rest)[1].strip():
        yield data


def compact(body: dict[str, Any]) -> bytes:
    return json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode()


def write_event(body: dict[str, Any]) -> bytes:
    return b"data: " + compact(body) + b"\n\n"

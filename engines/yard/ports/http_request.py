"""HTTP/1.1 of the public port: a request, whose body may still arrive, and its answer, written as it is made."""

from __future__ import annotations

import asyncio
import functools
import json
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from email.utils import formatdate
from http import HTTPStatus
from typing import Any

from multidict import CIMultiDict
from yarl import URL

from engines.openai.call import Refusal

CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
REASONS = {status.value: status.phrase for status in HTTPStatus}
UNASKED_BYTES = 64 * 1024  # of a body that nobody reads yet


class ClientLeft(Exception):
    """Nobody reads the answer any more."""


class UnreadableBody(Exception):
    """The body is not what its headers say, or does not end."""


class BodyTooLarge(Exception):
    """The body is larger than whoever reads it wants."""


@dataclass
class Response:
    """An answer in one piece."""

    status: int = 200
    body: bytes = b""
    headers: CIMultiDict[str] = field(default_factory=CIMultiDict)


def json_response(data: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    kind = {"Content-Type": "application/json; charset=utf-8"}
    return Response(status, json.dumps(data).encode(), CIMultiDict({**kind, **(headers or {})}))


def error_response(refusal: Refusal, headers: Mapping[str, str] | None = None, **detail: Any) -> Response:
    later = {} if refusal.retry_after_s is None else {"Retry-After": str(refusal.retry_after_s)}
    return json_response({**refusal.body(), **detail}, refusal.status, {**later, **(headers or {})})


class Request:
    """One request. `target` is its path as it was written, with the query; `path` is decoded.

    Its body is kept here as it arrives: without limit once it is `read`, else UNASKED_BYTES of it.
    """

    def __init__(
        self,
        transport: asyncio.Transport,
        drain: Callable[[], Awaitable[None]],
        extra_headers: Callable[[Request], Mapping[str, str]],
    ) -> None:
        self.headers: CIMultiDict[str] = CIMultiDict()
        self.method = self.target = self.path = ""
        self.is_http_11 = self.keeps = True  # `keeps`: the client wants the connection to stay
        self.begun = self.ended = False  # its answer
        self.arrived: asyncio.Future[None] | None = None  # while somebody waits for the end of the body
        self.is_whole = False  # the body has arrived
        self._transport, self.drain, self._extra_headers = transport, drain, extra_headers
        self._parts: list[bytes] = []
        self._size, self._limit = 0, UNASKED_BYTES
        self._broken: Exception | None = None
        self._head, self._is_chunked, self._has_body = b"", False, True

    def describe(self, method: str, target: str, version: str, *, keeps: bool) -> None:
        """Take over what is known once the headers are complete."""
        self.method, self.is_http_11, self.keeps = method, version == "1.1", keeps
        if not target.startswith("/") and method != "CONNECT":  # with scheme and host, or "*"
            target = str(URL(target, encoded=True).relative()) if "://" in target else target
        self.target = target.partition("#")[0]
        path = self.target.partition("?")[0]
        self.path = URL.build(path=path, encoded=True).path if "%" in path else path

    @property
    def query(self) -> Mapping[str, str]:
        _, mark, query = self.target.partition("?")
        return URL.build(query_string=query, encoded=True).query if mark else NO_QUERY

    @property
    def transport(self) -> asyncio.Transport:
        """The connection. Raises ClientLeft once it is closed, or about to be."""
        if self._transport.is_closing():
            raise ClientLeft
        return self._transport

    @property
    def chunked_to(self) -> asyncio.Transport | None:
        """The connection, while an answer in chunks is under way on it."""
        return self._transport if self._is_chunked and not self._head else None

    # --- its body

    async def read(self, limit: int) -> bytes:
        """All of the body. Raises BodyTooLarge beyond `limit` bytes, UnreadableBody."""
        self._limit = limit
        if int(self.headers.get("Content-Length", 0)) > limit:
            raise BodyTooLarge
        self.transport.resume_reading()  # what came before it may have been too much to read on
        if self.is_http_11 and self.headers.get("Expect", "").lower() == "100-continue":
            self.transport.write(CONTINUE)
        if not self.is_whole and self._broken is None and self._size <= limit:
            await self.whole()
        if self._broken is not None:
            raise self._broken
        if self._size > limit:
            raise BodyTooLarge
        return b"".join(self._parts)

    async def whole(self) -> None:
        """Return when the body has arrived, cannot any more, or is too large."""
        self.arrived = asyncio.get_running_loop().create_future()
        await self.arrived

    def drop_body(self) -> None:
        """Keep no more of the body, whatever arrives."""
        self._parts.clear()
        self._size, self._limit = 0, -1
        self.transport.resume_reading()

    def body_came(self, data: bytes) -> None:
        if self._limit < 0:
            return
        self._parts.append(data)
        self._size += len(data)
        if self._size > self._limit and not self._transport.is_closing():
            self._transport.pause_reading()
            self._note_arrived()

    def body_ended(self, broken: Exception | None = None) -> None:
        self.is_whole, self._broken = broken is None, broken
        self._note_arrived()

    def _note_arrived(self) -> None:
        if self.arrived is not None and not self.arrived.done():
            self.arrived.set_result(None)

    # --- its answer

    def begin(self, status: int, headers: CIMultiDict[str], length: int | None = None) -> None:
        """Begin the answer; its head goes out with the first piece. A `length` of None is not known beforehand."""
        self._has_body = self.method != "HEAD" and status >= 200 and status not in (204, 304)
        if extra := self._extra_headers(self):
            headers = headers.copy()
            headers.update(extra)
        lines = [f"HTTP/1.{1 if self.is_http_11 else 0} {status} {REASONS.get(status, '')}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        lines.append(date_line(int(time.time())))
        if length is not None and status >= 200 and status not in (204, 304):
            lines.append(f"Content-Length: {length}")
        elif self._has_body and "Content-Length" not in headers:
            self._is_chunked = self.is_http_11
            self.keeps = self.keeps and self._is_chunked
            if self._is_chunked:
                lines.append("Transfer-Encoding: chunked")
        if not self.keeps:
            lines.append("Connection: close")
        elif not self.is_http_11:
            lines.append("Connection: keep-alive")
        head = "\r\n".join(lines)
        if head.count("\r") != len(lines) - 1 or head.count("\n") != len(lines) - 1:
            raise ValueError("a line end within a header")
        self.begun = True
        self._head = f"{head}\r\n\r\n".encode("utf-8", "surrogateescape")

    def write(self, data: bytes) -> int:
        """Send a piece of the answer; how many bytes wait for the client then. Raises ClientLeft."""
        transport = self._transport
        if transport.is_closing():
            raise ClientLeft
        if self._is_chunked and data:
            data = b"%x\r\n%b\r\n" % (len(data), data)
        if self._head:
            data = self._head + data if self._has_body else self._head
            self._head = b""
        elif not self._has_body:
            data = b""
        transport.write(data)
        return transport.get_write_buffer_size()

    def end(self) -> None:
        """End the answer. Raises ClientLeft."""
        self.ended = True
        rest = self._head + b"0\r\n\r\n" if self._is_chunked else self._head
        self._head = b""
        if rest:
            self.transport.write(rest)

    def respond(self, response: Response) -> None:
        """Send the answer in one piece. Raises ClientLeft."""
        self.begin(response.status, response.headers, len(response.body))
        self.ended = True
        self.transport.write(self._head + response.body if self._has_body else self._head)


NO_QUERY: Mapping[str, str] = URL().query


@functools.lru_cache(maxsize=1)
def date_line(at_s: int) -> str:
    return f"Date: {formatdate(at_s, usegmt=True)}"

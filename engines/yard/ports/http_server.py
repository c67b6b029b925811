"""HTTP/1.1 of the public port: connections, and the server that has them.

The parser is llhttp (`httptools`). What arrives is parsed in the callback that reads it; the requests of a connection
are answered one after the other, by a task that ends with the last of them.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import cast

import httptools

from engines.openai.call import Refusal
from engines.yard.ports.http_request import ClientLeft, Request, Response, UnreadableBody, error_response

IDLE_S = 3600.0  # clients keep connections for long; each costs next to nothing
HEAD_S = 60.0  # for the headers of a request that has begun
LINGER_S = 10.0  # for the rest of a body that nobody wants: a client reads the answer only when it has sent all
MOST_HEADERS = 128
MOST_WAITING = 16  # requests that a client sends before it has the answer to the first
BACKLOG = 1024
SINGLE = frozenset(  # headers that mean something else to each who reads them where there are two
    ("content-length", "content-type", "host", "transfer-encoding", "user-agent")
)


def _ends_in_chunks(codings: Sequence[str]) -> bool:
    """Whether a body in these codings, which are one list, has an end that can be found (RFC 9112, 6.3)."""
    return not codings or codings[-1].rpartition(",")[2].strip().lower() == "chunked"


class Connection(asyncio.Protocol):
    """One client's connection."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._waiting: deque[Request] = deque()
        self._arriving: Request | None = None  # its headers, or its body
        self._head_bytes = 0  # of the request whose headers arrive
        self._target = b""
        self._answering: asyncio.Task[None] | None = None
        self._no_http = ""  # why what arrives is no HTTP
        self._resumes = False  # the parser is a new one, for the body of a request whose upgrade is not taken up
        self._drained: asyncio.Future[None] | None = None
        self._is_full = False
        self.since = time.monotonic()  # it has waited for a request, or for the rest of its headers
        self.transport: asyncio.Transport | None = None

    # --- asyncio

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = self.transport = cast(asyncio.Transport, transport)  # uvloop's is none by name
        self._parser = httptools.HttpRequestParser(self)
        self._server.connections.add(self)
        if (its_socket := transport.get_extra_info("socket")) is not None:
            its_socket.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)

    def connection_lost(self, exc: Exception | None) -> None:
        self.transport = None
        del self._parser  # it has this object's methods
        self._server.connections.discard(self)
        if self._answering is not None:
            self._answering.cancel()

    def pause_writing(self) -> None:
        self._is_full = True

    def resume_writing(self) -> None:
        self._is_full = False
        if self._drained is not None and not self._drained.done():
            self._drained.set_result(None)

    def data_received(self, data: bytes) -> None:
        if self._no_http:
            return
        try:
            self._feed(data)
        except httptools.HttpParserError as error:
            self._end_of_http(type(error).__name__)
        if self._head_bytes:
            self._head_bytes += len(data)
            if self._head_bytes > self._server.head_limit:
                self._end_of_http("HeadersTooLong")
        if self._answering is None and (self._waiting or self._no_http):
            self._answering = asyncio.get_running_loop().create_task(self._answer_all())

    def _feed(self, data: bytes) -> None:
        while True:
            try:
                self._parser.feed_data(data)
                return
            except httptools.HttpParserUpgrade as upgrade:
                data = self._without_upgrade(data[upgrade.args[0] :])

    def _end_of_http(self, why: str) -> None:
        self._no_http = self._no_http or why
        if self._arriving is not None and not self._head_bytes:
            self._arriving.body_ended(UnreadableBody(self._no_http))
        self._arriving, self._head_bytes = None, 0

    def _without_upgrade(self, rest: bytes) -> bytes:
        """What to parse after headers that ask for another protocol, which is not taken up: their body, and on."""
        request = self._arriving
        assert request is not None
        self._parser, self._resumes = httptools.HttpRequestParser(self), True
        if request.method == "CONNECT":  # what follows is for whoever it wanted to reach
            request.keeps, rest = False, b""
        names = ("Content-Length", "Transfer-Encoding")
        lines = [f"{name}: {request.headers[name]}\r\n" for name in names if name in request.headers]
        return f"POST / HTTP/1.1\r\nHost: -\r\n{''.join(lines)}\r\n".encode() + rest

    # --- httptools

    def on_message_begin(self) -> None:
        if not self._resumes:
            self._arriving = Request(self._transport, self.drain, self._server.extra_headers)
            self._target, self._head_bytes = b"", 1
            self.since = time.monotonic()

    def on_url(self, url: bytes) -> None:
        self._target += url

    def on_header(self, name: bytes, value: bytes) -> None:
        request = self._arriving
        if not self._head_bytes or request is None or self._resumes:  # of the upgrade, or behind a body
            return
        headers, text = request.headers, name.decode("ascii")
        if len(name) + len(value) > self._server.field_limit:
            self._no_http = "HeaderTooLong"
        elif b"\0" in value:
            self._no_http = "InvalidHeader"
        elif text in headers and text.lower() in SINGLE:
            self._no_http = "DuplicateHeader"
        elif len(headers) >= MOST_HEADERS:
            self._no_http = "TooManyHeaders"
        if self._no_http:
            raise ValueError
        headers.add(text, value.rstrip(b" \t").decode("utf-8", "surrogateescape"))

    def on_headers_complete(self) -> None:
        if self._resumes:
            return
        request, parser = self._arriving, self._parser
        assert request is not None
        version = parser.get_http_version()
        if version not in ("1.1", "1.0"):
            self._no_http = "UnknownVersion"
        elif len(self._target) > self._server.field_limit:
            self._no_http = "LineTooLong"
        elif version == "1.1" and "Host" not in request.headers:
            self._no_http = "MissingHost"
        elif not _ends_in_chunks(request.headers.getall("Transfer-Encoding", ())):
            self._no_http = "InvalidTransferEncoding"  # the parser says so as late as it meets the body
        if self._no_http:
            raise ValueError
        target = self._target.decode("utf-8", "surrogateescape")
        try:
            request.describe(parser.get_method().decode(), target, version, keeps=parser.should_keep_alive())
        except ValueError:
            self._no_http = "InvalidURL"
            raise
        self._head_bytes = 0
        self._waiting.append(request)
        if len(self._waiting) > MOST_WAITING:
            self._transport.pause_reading()

    def on_body(self, data: bytes) -> None:
        if self._arriving is not None:
            self._arriving.body_came(data)

    def on_message_complete(self) -> None:
        if self._parser.should_upgrade() and not self._resumes:
            return  # its body is behind it
        self._resumes = False
        if self._arriving is not None:
            self._arriving.body_ended()
            self._arriving = None

    # --- answers

    async def _answer_all(self) -> None:
        transport = self._transport
        try:
            while self._waiting and not transport.is_closing():
                request = self._waiting.popleft()
                await self._answer(request)
                if not request.ended:
                    transport.abort()  # the client must not take half of it for all
                    return
                if not await self._rests(request) or not request.keeps or self._server.closing:
                    if self._no_http:
                        await self._linger()
                    transport.close()
                    return
                await self.drain()
                if len(self._waiting) <= MOST_WAITING and not transport.is_closing():
                    transport.resume_reading()
            if self._no_http and not transport.is_closing():
                self._server.log.info("not HTTP: %s", self._no_http)
                request = Request(transport, self.drain, lambda _: {})
                request.keeps = False
                request.respond(error_response(Refusal(400, f"not HTTP: {self._no_http}")))
                await self._linger()
                transport.close()
        except ClientLeft:
            transport.close()
        finally:
            self._answering = None
            self.since = time.monotonic()

    async def _answer(self, request: Request) -> None:
        try:
            if (response := await self._server.handle(request)) is not None:
                request.respond(response)
        except ClientLeft:
            pass
        except Exception:
            self._server.log.exception("error in a handler")
            if not request.begun:
                request.keeps = False
                request.respond(error_response(Refusal(500, "an error of the yard's own; its log has more")))

    async def _linger(self) -> None:
        """Say that no more comes, and wait for the client to close: one that still sends would lose the answer."""
        self._transport.write_eof()
        await asyncio.sleep(LINGER_S)

    async def drain(self) -> None:
        """Return when the client has taken most of what was written."""
        if self._is_full:
            self._drained = asyncio.get_running_loop().create_future()
            await self._drained

    async def _rests(self, request: Request) -> bool:
        """True once all of the request has arrived; what nobody read of it is dropped."""
        if not request.is_whole and not self._no_http:
            request.drop_body()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LINGER_S):
                    await request.whole()
        return request.is_whole

    # --- the server

    @property
    def is_idle(self) -> bool:
        return self._answering is None

    def is_late(self, now: float) -> bool:
        """True for one that has been idle, or half way through the headers of a request, for too long."""
        return self._answering is None and now - self.since > (HEAD_S if self._head_bytes else IDLE_S)


class Server:
    """The public port. `handle` answers each request; with None it has answered it by itself.

    `extra_headers` go with each answer.
    """

    def __init__(
        self,
        handle: Callable[[Request], Awaitable[Response | None]],
        *,
        extra_headers: Callable[[Request], Mapping[str, str]],
        field_limit: int,
        log: logging.Logger,
    ) -> None:
        self.handle, self.extra_headers, self.log = handle, extra_headers, log
        self.field_limit, self.head_limit = field_limit, 8 * field_limit
        self.connections: set[Connection] = set()
        self.closing = False
        self._listener: asyncio.Server | None = None

    async def listen(self, host: str, port: int) -> None:
        """Open the port. Raises OSError."""
        loop = asyncio.get_running_loop()
        self._listener = await loop.create_server(lambda: Connection(self), host, port, backlog=BACKLOG)

    def close_late(self) -> None:
        """Close the connections that have waited for too long."""
        now = time.monotonic()
        for connection in [one for one in self.connections if one.is_late(now)]:
            if connection.transport is not None:
                connection.transport.close()

    async def close(self, within_s: float) -> None:
        """Close the port and every connection, those with a request under way after `within_s` at most."""
        self.closing = True
        if self._listener is not None:
            self._listener.close()
        until = time.monotonic() + within_s
        while self.connections:
            late = time.monotonic() >= until
            for connection in list(self.connections):
                if connection.transport is not None and (late or connection.is_idle):
                    connection.transport.abort() if late else connection.transport.close()
            await asyncio.sleep(0.02)
